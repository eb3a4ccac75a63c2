"""Runs as real SLURM jobs on two nodes: ended by a signal, a time limit or a preemption, and continued."""

import json
import sys
import time
from pathlib import Path

import pytest

STEPLINE = [sys.executable, "-m", "stepline.trainer"]
SMALL = [
    "model.hidden_size=64",
    "model.num_layers=2",
    "model.num_heads=4",
    "model.ffn_size=128",
    "data.seq_len=64",
    "budget.batch_tokens=1024",
    "budget.tokens=null",
    "parallel.micro_batch=4",
    "logging.every=1",
    "logging.eval_every=0",
    "logging.eval_windows=16",
    "logging.wandb=offline",
    "checkpoint.every=100000",
]
COMPARED = ("step", "tokens", "loss", "lr", "grad_norm", "val_loss")


def rows(folder: Path) -> list[list]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [[json.loads(line).get(key) for key in COMPARED] for line in lines]


def reach(folder: Path, step: int, seconds: float = 120) -> None:
    """Waits until metrics.jsonl has the step."""
    deadline = time.monotonic() + seconds
    while not (folder / "metrics.jsonl").exists() or not any(r[0] >= step for r in rows(folder)):
        assert time.monotonic() < deadline, folder
        time.sleep(0.1)


@pytest.fixture
def submit(sh, cluster, data):
    """`stepline submit` of a small run on both nodes; returns the job's id."""

    def run(folder: Path, steps: int, *options: str, code: int = 0) -> str:
        arguments = [f"data.path={data}", *SMALL, f"budget.steps={steps}", f"run.folder={folder}"]
        layout = ["--nodes", "2", "--ranks-per-node", "1", *options]
        done = sh(
            *STEPLINE, "submit", "quickstart", *arguments, *layout, "--json", code=code, **cluster.environment
        )
        return json.loads(done.stdout)["job"] if code == 0 else done.stderr

    return run


@pytest.fixture(scope="module")
def undisturbed(sh, data, tmp_path_factory):
    """The same run of two ranks below torchrun, by its number of steps."""
    made: dict[int, Path] = {}

    def run(steps: int) -> Path:
        if steps not in made:
            folder = tmp_path_factory.mktemp("undisturbed") / "run"
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            options = [f"data.path={data}", *SMALL, f"budget.steps={steps}", f"run.folder={folder}"]
            sh(sys.executable, *launch, "-m", "stepline.trainer", "train", "quickstart", *options)
            made[steps] = folder
        return made[steps]

    return run


def test_a_signal_saves_requeues_and_continues(submit, cluster, undisturbed, tmp_path):
    """SIGUSR1, as SLURM sends it before the time limit, to a run whose path holds a blank."""
    folder = tmp_path / "a run"
    job = submit(folder, 200)
    reach(folder, 40)
    run_id = (folder / "run_id").read_text()
    cluster.call("scancel", "--signal=USR1", job)
    deadline = time.monotonic() + 60
    while cluster.job(job)["Restarts"] == "0":
        assert time.monotonic() < deadline, (folder / "logs" / "slurm" / f"{job}.log").read_text()
        time.sleep(0.2)
    # A requeued job waits two minutes unless it is told not to.
    cluster.call("scontrol", "update", f"JobId={job}", "StartTime=now")
    assert cluster.wait(job)["JobState"] == "COMPLETED"
    assert cluster.job(job)["Restarts"] == "1"
    assert rows(folder) == rows(undisturbed(200))
    assert (folder / "run_id").read_text() == run_id
    logs = sorted(p.name for p in (folder / "logs" / "slurm").glob("*-attempt-*.log"))
    assert logs == [f"{job}-attempt-1.log", f"{job}-attempt-2.log"]
    assert "SLURM_JOB_NODELIST=n[1-2]" in (folder / "logs" / "slurm" / logs[0]).read_text()
    said = (folder / "logs" / "slurm" / f"{job}.log").read_text()
    assert f"job {job} is requeued" in said
    assert "SIGUSR1" in said


def test_a_time_limit_saves_requeues_and_continues(submit, cluster, undisturbed, tmp_path):
    """A limit of two minutes, of which SLURM's signal leaves one; as many attempts as the run needs."""
    folder = tmp_path / "run"
    job = submit(folder, 1500, "--time", "2", "--lead", "60")
    deadline = time.monotonic() + 400
    while (state := cluster.job(job))["JobState"] != "COMPLETED":
        assert time.monotonic() < deadline, state
        if state["JobState"] == "PENDING" and state["Restarts"] != "0":
            cluster.call("scontrol", "update", f"JobId={job}", "StartTime=now")
        time.sleep(1)
    assert int(state["Restarts"]) >= 1
    assert rows(folder) == rows(undisturbed(1500))


def test_a_preemption_saves_and_continues(sh, submit, cluster, undisturbed, tmp_path):
    """A job of a higher partition takes the nodes; SLURM requeues the run, which then goes on."""
    folder = tmp_path / "run"
    job = submit(folder, 200)
    reach(folder, 40)
    other = tmp_path / "other.sbatch"
    other.write_text("#!/bin/bash\n#SBATCH --partition=high --nodes=2 --time=1\nsleep 5\n")
    urgent = cluster.call("sbatch", "--parsable", f"--output={tmp_path}/other.log", str(other)).strip()
    assert cluster.wait(urgent)["JobState"] == "COMPLETED"
    cluster.call("scontrol", "update", f"JobId={job}", "StartTime=now")
    assert cluster.wait(job)["JobState"] == "COMPLETED"
    assert cluster.job(job)["Restarts"] == "1"
    assert rows(folder) == rows(undisturbed(200))
    assert len(list(folder.glob("logs/attempt-*"))) == 2


def test_a_mistake_ends_before_the_job(submit, tmp_path):
    said = submit(tmp_path / "run", 10, "--time", "1", code=2)
    assert said.startswith("error: --time 1 leaves no time before the run saves")
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()
