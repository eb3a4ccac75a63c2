"""`stepline train` as a user types it on one CUDA device: bf16, compiled, profiled, saved and gone on with.

NOT YET RUN ON A GPU.
"""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch

from stepline.trainer.run.launch import run_training

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPE = [
    "model.hidden_size=64", "model.num_layers=2", "model.num_heads=4", "model.ffn_size=128", "data.seq_len=64",
    "budget.tokens=12288", "budget.batch_tokens=1024", "parallel.micro_batch=4", "logging.wandb=off",
    "logging.every=1", "checkpoint.every=6",
]  # fmt: skip
"""12 steps, saved after 6 and 12."""


STEPLINE = [sys.executable, "-m", "stepline.trainer"]


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


SPARSE = ["sparse.mode=s-ste", "sparse.grad_weight=mvue"]
KINDS = {
    "sparse": SPARSE,
    "fp8": ["precision.fp8=true"],
    "fp8, scales of rows": ["precision.fp8=true", "precision.fp8_scales=row"],
    "sparse fp8": [*SPARSE, "precision.fp8=true"],
    "experts": ["model.ffn=moe", "model.ffn_size=64", "model.moe.experts=4", "model.moe.capacity=1.5"],
    "reversible": ["model.blocks=revffn"],
    "reversible experts, sparse fp8": [
        SPARSE[0], "precision.fp8=true", "model.blocks=revffn", "model.ffn=moe", "model.ffn_size=64",
        "model.moe.experts=4",
    ],
    "demo": ["parallel.sync=demo"],
    "demo, a step late": ["parallel.sync=demo", "parallel.demo.delay=1"],
    "diloco": ["parallel.sync=diloco", "parallel.diloco.every=4"],
    "random-k": ["parallel.sync=random_k"],
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_learns_and_logs(data, tmp_path, kind):
    """In this process and without compiling, which saves the start of another; every step is logged."""
    options = [
        f"data.path={data}",
        *SHAPE,
        *KINDS[kind],
        f"run.folder={tmp_path / 'run'}",
        "run.compile=false",
    ]
    assert run_training("quickstart", options, "never") == 0
    steps = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.1
    assert all(0 <= row["flip_rate"] < 0.5 for row in steps if "sparse" in kind)
    assert len([row for row in steps if "flip_rate" in row]) == (12 if "sparse" in kind else 0)
    assert all("fp8_flushed" in row for row in steps if "fp8" in kind)


def test_a_run_learns_is_profiled_and_goes_on_with_the_same_bits(sh, data, tmp_path):
    run, again = tmp_path / "run", tmp_path / "again"
    options = [*STEPLINE, "train", "quickstart", f"data.path={data}", *SHAPE, "run.deterministic=true"]
    sh(*options, f"run.folder={run}", "run.profile=true")
    losses = {row["step"]: row["loss"] for row in rows(run) if "loss" in row}
    assert sorted(losses) == list(range(1, 13))
    assert losses[1] == pytest.approx(math.log(2048), rel=0.05)
    assert losses[12] < losses[1] - 0.3
    trace = json.loads((run / "profile" / "rank-0.json").read_text())
    assert any(event.get("cat") == "kernel" for event in trace["traceEvents"])
    assert (run / "profile" / "rank-0-memory.pickle").stat().st_size > 0

    shutil.copytree(run, again)
    (again / "outcome.json").unlink()
    for late in (again / "checkpoints").glob("*12"):
        shutil.rmtree(late)
    sh(*options, f"run.folder={again}")
    assert "step-000006 at step 6" in (again / "logs" / "attempt-2" / "rank-0.log").read_text()
    assert {row["step"]: row["loss"] for row in rows(again) if "loss" in row} == losses
    assert rows(again)[-1]["val_loss"] == rows(run)[-1]["val_loss"]


def test_a_compiled_run_is_evaluated_and_writes(sh, data, tmp_path):
    run = tmp_path / "run"
    sh(*STEPLINE, "train", "quickstart", f"data.path={data}", *SHAPE, f"run.folder={run}", "run.compile=true")
    values = json.loads(sh(*STEPLINE, "eval", run, "--data", data, "--json").stdout)
    assert values["val_loss"] == pytest.approx(rows(run)[-1]["val_loss"], rel=1e-2)
    text = sh(
        *STEPLINE, "generate", run, "--prompt", "def ", "--max-tokens", "8", "--temperature", "0"
    ).stdout
    assert text.startswith("def ")
