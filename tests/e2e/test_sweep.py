"""A sweep that is stopped, goes on and keeps what diverged; the same as an array of a stand-in for SLURM."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
STEPLINE = [sys.executable, "-m", "stepline.trainer"]
NARROW = [
    "model.vocab_size=512",
    "model.hidden_size=64",
    "model.ffn_size=128",
    "data.seq_len=64",
    "optimizer.name=adamw",
    "optimizer.momentum=0.95",
    "optimizer.weight_decay=auto",
    "schedule.warmup_steps=auto",
    "logging.every=1",
    "run.device=cpu",
]
GRID = ["--sizes", "0.5,1", "--tokens", "20480", "--lr", "3e-3,10", "--batch-tokens", "1024"]
SBATCH = """#!/bin/bash
# Does the elements of an array in turn, as SLURM does, and answers like `sbatch --parsable`.
script="${@: -1}"
list=$(sed -n 's/^#SBATCH --array=\\([^%]*\\).*/\\1/p' "$script")
for part in ${list//,/ }; do
    for index in $(seq "${part%-*}" "${part#*-}"); do
        SLURM_ARRAY_TASK_ID=$index bash "$script" > "$(dirname "$script")/slurm/$index.log" 2>&1
    done
done
echo 77
"""


@pytest.fixture(scope="module")
def held_out(sh, corpus, tmp_path_factory) -> Path:
    """The small corpus with a split to tune on."""
    folder = tmp_path_factory.mktemp("data") / "tuned"
    options = ["--vocab-size", "512", "--val-share", "0.1", "--tune-share", "0.02"]
    sh(*STEPLINE, "prepare", corpus, "--output", folder, *options)
    return folder


def rows(sweep: Path) -> list[dict]:
    with (sweep / "runs.csv").open() as file:
        return list(csv.DictReader(file))


def processes_of(folder: Path) -> list[str]:
    found = subprocess.run(["pgrep", "-f", f"train {folder}"], capture_output=True, text=True, check=False)
    return found.stdout.split()


def test_sweep_is_stopped_and_goes_on(sh, held_out, tmp_path):
    folder = tmp_path / "sweep"
    command = [*STEPLINE, "sweep", "quickstart", f"data.path={held_out}", *NARROW, *GRID, "--output", folder]
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env=os.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (folder / "runs.csv").exists() or len(rows(folder)) < 1 or not processes_of(folder):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 75
    assert f"stopped by SIGTERM, 3 runs are missing; go on with: stepline sweep --output {folder}" in said
    assert "4 runs to do: 81,920 training tokens" in said
    assert processes_of(folder) == []
    assert len(rows(folder)) == 1
    before = rows(folder)[0]

    refused = sh(*command, "--seeds", "2", code=2)
    assert refused.stderr.startswith("error: ")
    assert refused.stderr.count("\n") == 1
    told = json.loads(sh(*command, "--jobs", "2", "--json").stdout)
    assert told == {
        "csv": str(folder / "runs.csv"), "runs": 4, "done": 4, "diverged": 2, "failed": [], "stopped": None,
    }  # fmt: skip
    table = rows(folder)
    assert len(table) == len({row["name"] for row in table}) == 4
    assert before in table
    sizes = (2 * (4 * 48**2 + 3 * 48 * 96), 2 * (4 * 64**2 + 3 * 64 * 128))
    assert {(row["params"], row["lr"]) for row in table} == set(product(map(str, sizes), ("0.003", "10.0")))
    for row in table:
        run = folder / "runs" / row["name"]
        assert (row["tokens"], row["batch_tokens"], row["sync"]) == ("20480", "1024", "all_reduce")
        assert (row["diverged"], row["loss"] == "") == (("1", True) if row["lr"] == "10.0" else ("0", False))
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [s["step"] for s in steps if "loss" in s] == list(range(1, 21))
        if row["loss"]:
            assert float(row["loss"]) == steps[-1]["val_loss"]
        assert "eval_split: tune" in (run / "config.yaml").read_text()
        assert not (run / "checkpoints").exists()
    assert "Example" in sh(*STEPLINE, "sweep", "--help").stdout
    again = sh(*STEPLINE, "sweep", "--output", folder)
    assert "4 of 4 runs are done" in again.stdout


def test_sweep_as_an_array(sh, held_out, tmp_path):
    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text(SBATCH)
    sbatch.chmod(0o755)
    folder = tmp_path / "sweep"
    grid = [*GRID[:2], "--tokens", "4096", "--lr", "3e-3", "--batch-tokens", "1024"]
    command = [*STEPLINE, "sweep", "quickstart", f"data.path={held_out}", *NARROW, *grid, "--output", folder]
    out = sh(*command, "--slurm", "--jobs", "2", PATH=f"{sbatch.parent}:{os.environ['PATH']}")
    assert (
        f"submitted as job 77, 2 elements; afterwards: stepline sweep --output {folder} --collect"
        in out.stdout
    )
    assert (
        "runs.csv: 2 of 2 runs, 0 of them diverged"
        in sh(*STEPLINE, "sweep", "--output", folder, "--collect").stdout
    )
    assert len({row["loss"] for row in rows(folder)}) == 2
    for index in (0, 1):
        assert f"[{index + 1}/2]" in (folder / "slurm" / f"{index}.log").read_text()
