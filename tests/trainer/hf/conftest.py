"""Small random models: runs of Stepline with a checkpoint, and folders that transformers has saved."""

import json
import random
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml

from stepline.models.config import ModelConfig
from stepline.models.init import init_model
from stepline.models.sparse_linear import Recipe, convert
from stepline.models.transformer import Transformer
from stepline.trainer.hf.shards import INDEX
from stepline.trainer.run.launch import run_training
from stepline.trainer.run.manifest import COMPLETE, MANIFEST, STATE, checkpoint_path, file_entry
from stepline.trainer.run.sparsity import set_betas
from stepline.trainer.run.state import model_tensors
from stepline.trainer.watch.metrics import read_metrics

SMALL = {
    "vocab_size": 331,
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn_size": 48,
    "init_std": 0.15,
}


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    """120 documents of a small grammar."""
    draw = random.Random(0)
    folder = tmp_path_factory.mktemp("hf") / "texts"
    folder.mkdir()
    names, verbs = ["alice", "bob", "carol", "dave"], ["sees", "finds", "sends", "keeps"]
    things = ["the tree", "a letter", "nine stones", "the old map"]
    for i in range(120):
        sentences = (
            f"{draw.choice(names)} {draw.choice(verbs)} {draw.choice(things)} at {draw.randint(0, 99)}."
            for _ in range(60)
        )
        (folder / f"{i:03}.txt").write_text(" ".join(sentences))
    return folder


@pytest.fixture(scope="session")
def data(texts) -> Path:
    """The prepared documents, vocabulary 330."""
    from stepline.trainer.data.prepare import prepare

    prepare([texts], texts.parent / "data", vocab_size=330, workers=1, val_share=0.02, progress=False)
    return texts.parent / "data"


def stir(model: torch.nn.Module) -> None:
    """Norm weights that are not 1, Canon weights that are not 0, balance biases that move choices."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.copy_(torch.linspace(0.5, 1.5, p.numel()))
            elif "canon" in name:
                p.copy_(torch.linspace(-0.4, 0.6, p.numel()))
        for name, b in model.named_buffers():
            if name.endswith("balance_bias"):
                b.copy_(torch.linspace(-0.05, 0.05, b.numel()))


@pytest.fixture
def make_run(tmp_path, data):
    """Writes a run with the checkpoint of a random model; returns both."""

    def make(
        name: str = "run", *, balanced: bool = False, sparse: bool = False, **changed
    ) -> tuple[Path, Transformer]:
        config = ModelConfig(**SMALL | changed)
        torch.manual_seed(0)
        model = Transformer(config)
        convert(model, Recipe(sparse=sparse), Recipe())
        init_model(model, config, seed=0)
        stir(model)
        for key, buffer in model.named_buffers():
            if not balanced and key.endswith("balance_bias"):
                buffer.zero_()
        set_betas(model)
        run = tmp_path / name
        path = checkpoint_path(run, 7)
        path.mkdir(parents=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.distributed.checkpoint.save(model_tensors(model), checkpoint_id=path, no_dist=True)
        state = {"step": 7, "tokens": 700, "fingerprints": ["abc123"]}
        (path / STATE).write_text(json.dumps(state))
        files = {file.name: file_entry(file) for file in path.iterdir()}
        (path / MANIFEST).write_text(json.dumps({"kind": "permanent", "step": 7, "files": files}))
        (path / COMPLETE).touch()
        sections = {"model": config.model_dump(mode="json"), "data": {"path": str(data), "seq_len": 64}}
        sections["precision"], sections["budget"] = {"compute": "fp32"}, {"steps": 7, "batch_tokens": 64}
        sections["sparse"] = {"mode": "s-ste" if sparse else "none"}
        (run / "config.yaml").write_text(yaml.safe_dump(sections))
        return run, model.eval()

    return make


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 330, (2, 60), generator=torch.Generator().manual_seed(1))


def one_rank(config: str, overrides: list[str]) -> int:
    sys.argv = ["stepline"]
    return run_training(config, overrides, "auto")


@pytest.fixture
def train(pool, data):
    """Rows of metrics.jsonl of a run on `world` gloo processes."""

    def start(world: int, config: Path, folder: Path, *overrides: str) -> list[dict]:
        options = [
            f"run.folder={folder}", f"data.path={data}", "data.seq_len=32", "budget.batch_tokens=192",
            "parallel.micro_batch=2", "optimizer.weight_decay=0.0", "checkpoint.every=1000", "logging.every=1",
            "logging.eval_every=0", "logging.wandb=off", *overrides,
        ]  # fmt: skip
        codes = pool.run(world, one_rank, str(config), options, init=False, timeout=300)
        assert codes == [0] * world
        return [row for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]

    return start


COMMON = {
    "vocab_size": 331,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}  # fmt: skip
FAMILIES = {
    "Llama": {"tie_word_embeddings": True, "rope_parameters": LLAMA3},
    "Qwen3": {"head_dim": 24, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
    "Qwen3Moe": {"head_dim": 24, "moe_intermediate_size": 40, "num_experts": 6, "num_experts_per_tok": 2},
    "Mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": None},
}


@pytest.fixture
def save():
    def make(family: str, folder: Path, **changed):
        """A random model, saved by transformers in several files."""
        import transformers

        config = getattr(transformers, f"{family}Config")(**COMMON | FAMILIES[family] | changed)
        torch.manual_seed(0)
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "norm" in name:
                    p.copy_(torch.linspace(0.5, 1.5, p.numel()))
        model.save_pretrained(folder, max_shard_size="60KB")
        assert (folder / INDEX).is_file()
        return model

    return make
