"""Exported folders, loaded by transformers: stock architectures, and those that bring their code along."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from stepline.trainer.config_io import read_run_config
from stepline.trainer.errors import UserError
from stepline.trainer.hf.export import export_run
from stepline.trainer.hf.importing import import_model
from stepline.trainer.run.generate import generate_text
from stepline.trainer.run.infer import load_run, run_tokenizer

MOE = {"ffn": "moe", "moe": {"experts": 6, "top_k": 2}}
STOCK = {
    "LlamaForCausalLM": {},
    "LlamaForCausalLM, tied, scaled": {
        "tied_embeddings": True,
        "rope_scaling": {"original_context": 24, "factor": 4},
    },
    "Qwen3ForCausalLM": {"qk_norm": True, "head_dim": 24, "norm_eps": 1e-6},
    "Qwen3MoeForCausalLM": {"qk_norm": True, **MOE},
    "Qwen3MoeForCausalLM, scores as they are": {
        "qk_norm": True, "ffn": "moe", "moe": {"experts": 6, "top_k": 2, "renormalise": False}
    },
    "MixtralForCausalLM": MOE,
}  # fmt: skip
CUSTOM = {
    "bias": MOE | {"qk_norm": True, "tied_embeddings": True},
    "sigmoid, shared": {"ffn": "moe", "moe": {"experts": 6, "score": "sigmoid", "shared_size": 16}},
    "reversible": {"blocks": "revffn", "qk_norm": True, "rope_scaling": {"type": "linear", "factor": 3}},
    "reversible, coupling revffn, fp32 streams": {
        "blocks": "revffn",
        "coupling": "revffn",
        "revffn": {"streams": "fp32"},
    },
    "canon": {"qk_norm": True, "canon": "AC", "tied_embeddings": True},
    "canon, reversible mixture with adapters": {
        "canon": "C",
        "blocks": "revffn",
        "revffn": {"adapters": True},
        **MOE,
    },
    "reversible mixture with adapters": {"blocks": "revffn", "revffn": {"adapters": True}, **MOE},
}


def load(folder, **options):
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **options
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()


def same_weights(a, b):
    """Whether two runs hold the same parameters, bit by bit."""
    ours, theirs = load_run(a)[0].state_dict(), load_run(b)[0].state_dict()
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], value) for name, value in theirs.items())


@torch.no_grad()
@pytest.mark.parametrize("kind", STOCK)
def test_stock_architectures(make_run, tokens, tmp_path, kind):
    """Logits, and export → import → export bit by bit."""
    run, model = make_run(**STOCK[kind])
    done = export_run(run, tmp_path / "hf", shard_bytes=40_000)
    assert done.architecture == kind.split(",")[0]
    assert done.shards > 2
    assert not done.remote_code
    assert not done.notes
    logits, expected = load(tmp_path / "hf")(tokens).logits, model(tokens)
    assert expected.std() > 0.5
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)

    import_model(tmp_path / "hf", tmp_path / "back")
    assert same_weights(run, tmp_path / "back")
    export_run(tmp_path / "back", tmp_path / "again", shard_bytes=40_000)
    for file in (tmp_path / "hf").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


@torch.no_grad()
@pytest.mark.parametrize("kind", CUSTOM)
def test_models_with_code_of_their_own(make_run, tokens, tmp_path, kind):
    """Logits, greedy generation with a cache and without, padding on the left, and back bit by bit."""
    run, model = make_run(balanced=True, **CUSTOM[kind])
    done = export_run(run, tmp_path / "hf", shard_bytes=60_000)
    assert done.remote_code
    theirs = load(tmp_path / "hf", trust_remote_code=True)
    expected = model(tokens)
    assert expected.std() > 0.3
    torch.testing.assert_close(theirs(tokens).logits, expected, rtol=0, atol=1e-4)

    prompt, greedy = tokens[:, :10], {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    mask = torch.ones_like(prompt)
    cached = theirs.generate(prompt, attention_mask=mask, **greedy)
    assert torch.equal(cached, theirs.generate(prompt, attention_mask=mask, use_cache=False, **greedy))
    assert torch.equal(cached[:, -1], model(cached[:, :-1])[:, -1].argmax(-1))
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), prompt), 1)
    mask = torch.cat((torch.zeros(2, 3, dtype=torch.long), mask), 1)
    assert torch.equal(theirs.generate(padded, attention_mask=mask, pad_token_id=0, **greedy)[:, 3:], cached)

    beams = {**greedy, "num_beams": 3}
    mask = torch.ones_like(prompt)
    found = [theirs.generate(prompt, attention_mask=mask, use_cache=use, **beams) for use in (True, False)]
    assert torch.equal(*found)

    import_model(tmp_path / "hf", tmp_path / "back")
    assert same_weights(run, tmp_path / "back")


@torch.no_grad()
def test_padding_is_not_read_whatever_its_positions(make_run, tokens, tmp_path):
    """On the left with positions of the caller's own, which count the padding."""
    run, model = make_run(canon="AC")
    export_run(run, tmp_path / "hf")
    theirs, batch = load(tmp_path / "hf", trust_remote_code=True), len(tokens)
    padded = torch.cat((torch.zeros(batch, 3, dtype=torch.long), tokens), 1)
    mask = (torch.arange(padded.shape[1]) >= 3).long().expand(batch, -1)
    positions = torch.arange(padded.shape[1]).expand(batch, -1)
    logits = theirs(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(logits, model(tokens), rtol=0, atol=1e-4)


def test_a_folder_with_code_needs_no_stepline(make_run, tokens, tmp_path):
    """In a process that cannot import it; the model card's example runs there as it stands."""
    run, model = make_run(blocks="revffn")
    export_run(run, tmp_path / "hf")
    torch.save(tokens, tmp_path / "hf" / "tokens.pt")
    card = (tmp_path / "hf" / "README.md").read_text()
    example = card.split("```python\n")[1].split("```")[0]
    code = (
        "import sys; sys.modules['stepline'] = None\n"
        + example
        + "torch.save(model(torch.load('tokens.pt')).logits.detach(), 'logits.pt')\n"
        "assert not [n for n in sys.modules if n.startswith('stepline.')]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "hf", timeout=120, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Once" in done.stdout
    torch.testing.assert_close(torch.load(tmp_path / "hf" / "logits.pt"), model(tokens), rtol=0, atol=1e-4)


def test_bf16_is_rounded_to_nearest_but_for_the_balance(make_run, tmp_path):
    run, model = make_run(balanced=True, **CUSTOM["bias"])
    export_run(run, tmp_path / "hf", "bf16")
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    for name, value in model.state_dict().items():
        expected = value if name.endswith("balance_bias") else value.bfloat16()
        assert torch.equal(stored[f"model.{name}"], expected)
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    assert theirs.dtype == torch.bfloat16
    assert theirs.model.layers[0].ffn.router.balance_bias.dtype == torch.float32
    assert theirs(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_card_and_generation_config(make_run, tmp_path):
    run, _ = make_run()
    rows = [{"step": 7, "val_loss": 2.5, "val_bits_per_byte": 1.25}, {"step": 9, "val_loss": 1.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = {"params": 1e6, "tokens": 2e7, "lr": 1e-3, "weight_decay": 0.1, "batch_tokens": 4096, "steps": 9}
    (run / "plan.json").write_text(json.dumps(plan))
    export_run(run, tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    for part in ("library_name: transformers", "N 1e+06, D 2e+07", "lr 0.001", "abc123", "2.5000", "1.2500"):
        assert part in card
    assert "1.0000" not in card  # of a later step than the checkpoint's
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 2, "eos_token_id": 2}
    (run / "metrics.jsonl").write_text('{"step": 7, "val_loss": null, "val_loss_is_finite": false}\n')
    export_run(run, tmp_path / "again")
    assert "not finite, at step 7" in (tmp_path / "again" / "README.md").read_text()
    assert not (tmp_path / "hf.partial").exists()


@pytest.mark.parametrize("confined", [True, False])
def test_the_card_begins_a_text_as_training_did(make_run, tmp_path, confined):
    """Its example gives the continuation of `stepline generate`."""
    run, _ = make_run()
    raw = yaml.safe_load((run / "config.yaml").read_text())
    raw["data"]["confine_attention"] = confined
    (run / "config.yaml").write_text(yaml.safe_dump(raw))
    export_run(run, tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace('"."', repr(str(tmp_path / "hf")))
    code = code.replace("max_new_tokens=40", "max_new_tokens=12, do_sample=False")
    said = []
    exec(code.replace("print(tokenizer.decode(model", "said.append((model"), {"said": said})
    theirs = run_tokenizer(read_run_config(run)).decode(said[0].tolist())
    ours = "".join(generate_text(run, "Once", max_tokens=12, temperature=0))
    assert ours.replace("\ufffd", "") == theirs.replace("\ufffd", "")


def test_a_folder_with_files_is_left_alone(make_run, tmp_path):
    run, _ = make_run()
    with pytest.raises(UserError, match="not empty"):
        export_run(run, tmp_path)
    with pytest.raises(UserError, match="neither a run"):
        export_run(tmp_path / "nothing", tmp_path / "hf")
