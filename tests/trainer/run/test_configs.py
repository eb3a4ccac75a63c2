"""Every shipped config trains in a narrow form: the same options, a few layers of small width, at most 16 experts."""

import pytest

from stepline.trainer.config_io import find_config, load_config, shipped_configs
from stepline.trainer.run.launch import run_training
from stepline.trainer.watch.metrics import read_metrics


def run(config: str, overrides: list[str]) -> int:
    return run_training(config, overrides, "never")


@pytest.mark.parametrize("name", sorted(p.stem for p in shipped_configs().glob("*.yaml")))
def test_config_trains_for_20_steps_in_a_narrow_form(pool, tiny_data, tmp_path, name):
    full, _ = load_config(str(find_config(name)))
    group = full.model.num_heads // full.model.kv_heads
    experts = min(full.model.moe.experts, 16)
    narrow = [
        f"model.moe.experts={experts}",
        f"model.moe.top_k={min(full.model.moe.top_k, experts // 2)}",
        "model.hidden_size=64",
        "model.num_layers=2",
        "model.num_heads=4",
        f"model.num_kv_heads={max(1, 4 // group)}",
        "model.ffn_size=96",
        "model.vocab_size=331",
        f"data.path={tiny_data}",
        "data.seq_len=32",
        "budget.tokens=null",
        "budget.steps=20",
        "budget.batch_tokens=256",
        "parallel.micro_batch=4",
        "optimizer.lr=0.01",
        "logging.wandb=off",
        "logging.every=1",
        f"run.folder={tmp_path / 'run'}",
    ]
    assert pool.run(2, run, name, narrow, init=False) == [0, 0]
    rows = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
    assert len(rows) == 20
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
