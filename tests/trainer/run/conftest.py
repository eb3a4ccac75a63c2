"""A tiny prepared corpus and a tiny config for tests of whole runs."""

import random
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from stepline.trainer.plan.grid import Grid
from stepline.trainer.run.launch import run_training
from stepline.trainer.run.manifest import complete_checkpoints
from stepline.trainer.run.sweep import Request
from stepline.trainer.watch.metrics import read_metrics

TINY = {
    # Widths and counts that two or four ranks cannot divide.
    "model": {
        "vocab_size": 331,
        "hidden_size": 36,
        "num_layers": 2,
        "num_heads": 3,
        "ffn_size": 50,
        "qk_norm": True,
        "z_loss": 1e-4,
    },
    "data": {"seq_len": 32},
    "budget": {"steps": 20, "batch_tokens": 6 * 32},
    "optimizer": {"lr": 5e-3, "weight_decay": 0.1},
    "parallel": {"micro_batch": 2},
    "checkpoint": {"every": 1000},
    "logging": {"every": 1, "eval_every": 0, "wandb": "off"},
}

FIRST_TEXT = 1560  # of these documents the keyed hash holds out one for validation and one to tune on


def _text(words: int, seed: int) -> str:
    """Sentences of a small grammar: learnable, and different in every document."""
    draw = random.Random(seed)
    names, verbs = ["alice", "bob", "carol", "dave"], ["sees", "finds", "sends", "keeps"]
    things = ["the tree", "a letter", "nine stones", "the old map"]
    return " ".join(
        f"{draw.choice(names)} {draw.choice(verbs)} {draw.choice(things)} at {draw.randint(0, 99)}."
        for _ in range(words)
    )


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """120 documents of about 780 tokens, vocabulary 330; one is for validation, which ends every run."""
    from stepline.trainer.data.prepare import prepare

    folder = tmp_path_factory.mktemp("tiny")
    texts = folder / "texts"
    texts.mkdir()
    for i in range(120):
        (texts / f"{i:03}.txt").write_text(_text(60, FIRST_TEXT + i))
    prepare([texts], folder / "data", vocab_size=330, workers=1, val_share=0.01, progress=False)
    return folder / "data"


@pytest.fixture
def tiny_config(tmp_path, tiny_data) -> Path:
    """A config file of a 20-step run; tests override single keys."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY | {"data": {"path": str(tiny_data), "seq_len": 32}}))
    return path


def one_rank(config: str, overrides: list[str], resume: str) -> int:
    sys.argv = ["stepline"]
    return run_training(config, overrides, resume)


@pytest.fixture
def train(pool):
    """Rows of metrics.jsonl of a run on `world` gloo processes."""

    def start(world: int, config: Path, folder: Path, *overrides: str, resume: str = "never") -> list[dict]:
        options = [f"run.folder={folder}", *overrides]
        codes = pool.run(world, one_rank, str(config), options, resume, init=False, timeout=300)
        assert codes == [0] * world
        return read_metrics(folder / "metrics.jsonl")

    return start


@pytest.fixture(scope="session")
def tuned_data(tiny_data, tmp_path_factory) -> Path:
    """The tiny corpus with a split to tune on."""
    from stepline.trainer.data.prepare import prepare

    texts, folder = tiny_data.parent / "texts", tmp_path_factory.mktemp("tuned") / "data"
    prepare([texts], folder, vocab_size=330, workers=1, val_share=0.01, tune_share=0.01, progress=False)
    return folder


@pytest.fixture
def request_of(tiny_config, tuned_data, tmp_path):
    """A request for a sweep of 2 sizes x 1 budget x 2 learning rates x 1 batch in tmp_path/sweep."""

    def make(*overrides: str, grid: dict | None = None, **options) -> Request:
        options = {"output": tmp_path / "sweep", "config": str(tiny_config)} | options
        given = {
            "sizes": (0.5, 1.0),
            "tokens": (1920.0,),
            "lr": (1e-3, 2e-3),
            "batch_tokens": (192.0,),
        } | (grid or {})
        every = [f"data.path={tuned_data}", *overrides] if options["config"] else []
        return Request(overrides=every, grid=Grid(**given) if options["config"] else Grid(), **options)

    return make


@pytest.fixture
def column():
    """A value of every step's row, as a float64 tensor."""
    import torch

    def values(rows: list[dict], key: str = "loss") -> "torch.Tensor":
        return torch.tensor([r[key] for r in rows if "loss" in r], dtype=torch.float64)

    return values


@pytest.fixture
def interrupted(train, tiny_config, tmp_path):
    """(rows of a run, rows of the same run resumed from its first checkpoint) on `world` processes."""

    def both(world: int, *options: str) -> tuple[list[dict], list[dict]]:
        straight = train(world, tiny_config, tmp_path / "straight", *options)
        shutil.copytree(tmp_path / "straight", tmp_path / "again")
        for checkpoint in complete_checkpoints(tmp_path / "again")[1:]:
            shutil.rmtree(checkpoint)
        return straight, train(world, tiny_config, tmp_path / "again", *options, resume="auto")

    return both
