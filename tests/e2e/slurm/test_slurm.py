"""Runs as real SLURM jobs on two nodes: ended by a signal, a time limit, a preemption or a death, and continued."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

STEPLINE = [sys.executable, "-m", "stepline.trainer"]
SMALL = [
    "logging.eval_every=0",
    "logging.eval_windows=16",
    "logging.wandb=offline",
]
NO_CHECKPOINTS = "checkpoint.every=100000"
"""But the last one: what goes on then does so from what it saved when it was told to stop."""
COMPARED = ("step", "tokens", "loss", "lr", "grad_norm", "val_loss")


def rows(folder: Path) -> list[list]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [[json.loads(line).get(key) for key in COMPARED] for line in lines]


def reach(folder: Path, step: int, seconds: float = 120) -> None:
    """Waits until metrics.jsonl has the step."""
    deadline = time.monotonic() + seconds
    while not (folder / "metrics.jsonl").exists() or not any(r[0] >= step for r in rows(folder)):
        assert time.monotonic() < deadline, [p.read_text() for p in folder.glob("logs/slurm/*.log")]
        time.sleep(0.1)


def log(folder: Path, job: str, attempt: int | None = None) -> str:
    """The job's log, or that of one attempt."""
    name = f"{job}.log" if attempt is None else f"{job}-attempt-{attempt}.log"
    return (folder / "logs" / "slurm" / name).read_text()


def options(folder: Path, data: Path, steps: int) -> list[str]:
    return [f"data.path={data}", *SMALL, f"budget.steps={steps}", f"run.folder={folder}"]


@pytest.fixture
def submit(sh, cluster, data):
    """`stepline submit` of a small run on both nodes; returns the job's id."""

    def run(folder: Path, steps: int, *more: str, data: Path = data) -> str:
        layout = ["--nodes", "2", "--ranks-per-node", "1", "--json"]
        command = [*STEPLINE, "submit", "tiny", *options(folder, data, steps), *layout, *more]
        told = json.loads(sh(*command, **cluster.environment).stdout)
        assert told["path"] == str(folder / "logs" / "slurm" / "train.sbatch")
        return told["job"]

    return run


@pytest.fixture(scope="module")
def undisturbed(sh, data, tmp_path_factory):
    """The rows of the same run of two ranks below torchrun, by its number of steps."""
    made: dict[int, list] = {}

    def run(steps: int) -> list:
        if steps not in made:
            folder = tmp_path_factory.mktemp("undisturbed") / "run"
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            train = ["-m", "stepline.trainer", "train", "tiny", *options(folder, data, steps)]
            sh(sys.executable, *launch, *train, NO_CHECKPOINTS)
            made[steps] = rows(folder)
            assert [row[0] for row in made[steps] if row[2] is not None] == list(range(1, steps + 1))
        return made[steps]

    return run


def check_one_wandb_run(folder: Path, attempts: int) -> None:
    """Each attempt has written to the same run of wandb."""
    found = [path.name for path in (folder / "wandb").glob("offline-run-*")]
    assert len(found) == attempts
    assert {name.rpartition("-")[2] for name in found} == {(folder / "run_id").read_text().strip()}


def test_a_signal_saves_requeues_and_continues(submit, cluster, undisturbed, tmp_path):
    """SIGUSR1, as SLURM sends it before the time limit, to a run whose path holds blanks."""
    folder = tmp_path / "a run, 100 %j"
    job = submit(folder, 200, NO_CHECKPOINTS)
    reach(folder, 40)
    cluster.call("scancel", "--signal=USR1", job)
    assert cluster.end(job) == ("COMPLETED", 1)
    assert rows(folder) == undisturbed(200)
    check_one_wandb_run(folder, attempts=2)
    assert "SLURM_JOB_NODELIST=n[1-2]" in log(folder, job, attempt=1)
    assert "is saved; the same command continues the run" in log(folder, job, attempt=1)
    assert "continuing" in log(folder, job, attempt=2)
    said = log(folder, job)
    assert "SIGUSR1: step " in said
    assert said.count(f"job {job} is requeued") == 1
    assert said.rstrip().endswith("done")


def test_a_time_limit_saves_requeues_and_continues(submit, cluster, undisturbed, tmp_path):
    """A limit of two minutes, of which SLURM's signal leaves one; as many attempts as the run needs."""
    folder = tmp_path / "run"
    job = submit(folder, 1800, NO_CHECKPOINTS, "--time", "2", "--lead", "60")
    state, restarts = cluster.end(job)
    assert state == "COMPLETED", log(folder, job)
    assert restarts >= 1
    assert rows(folder) == undisturbed(1800)
    check_one_wandb_run(folder, attempts=restarts + 1)
    assert log(folder, job).count("SIGUSR1: step ") == restarts


def test_a_preemption_saves_and_continues(submit, cluster, undisturbed, tmp_path):
    """A job of a higher partition takes the nodes as soon as the run has saved, and the run goes on afterwards."""
    folder = tmp_path / "run"
    job = submit(folder, 200, NO_CHECKPOINTS)
    reach(folder, 40)
    urgent = tmp_path / "urgent.sbatch"
    urgent.write_text("#!/bin/bash\n#SBATCH --partition=high --nodes=2 --time=1\nsleep 1\n")
    other = cluster.call("sbatch", "--parsable", f"--output={tmp_path}/urgent.log", str(urgent)).strip()
    assert cluster.end(other)[0] == "COMPLETED"
    assert cluster.end(job) == ("COMPLETED", 1)
    assert rows(folder) == undisturbed(200)
    check_one_wandb_run(folder, attempts=2)
    assert "SIGTERM: step " in log(folder, job)


@pytest.mark.parametrize("whole_node", [False, True])
def test_what_dies_is_tried_again_from_the_last_checkpoint(
    submit, cluster, undisturbed, tmp_path, whole_node
):
    """A rank, or all processes of the node that hosts the rendezvous store: the attempt ends, and the job is requeued
    where it has completed a checkpoint."""
    folder = tmp_path / "run"
    job = submit(folder, 200, "checkpoint.every=20")
    reach(folder, 60)
    found = subprocess.run(["pgrep", "-f", f"train .*{folder}"], capture_output=True, text=True, check=True)
    about = {
        int(pid): [Path(f"/proc/{pid}/{name}") for name in ("environ", "cmdline", "stat")]
        for pid in found.stdout.split()
    }
    about = {pid: [path.read_bytes() for path in paths] for pid, paths in about.items()}
    ranks = {pid: int(stat.split()[3]) for pid, (env, _, stat) in about.items() if b"\0RANK=" in b"\0" + env}
    (host,) = {parent for parent in ranks.values() if b"is_host=1" in about[parent][1]}
    dying = [host, *(pid for pid, parent in ranks.items() if parent == host)] if whole_node else [min(ranks)]
    for pid in dying:
        os.kill(pid, signal.SIGKILL)
    assert cluster.end(job) == ("COMPLETED", 1)
    assert rows(folder) == undisturbed(200)
    assert "it goes on from its last checkpoint" in log(folder, job)


def test_a_mistake_ends_the_job(submit, cluster, data, tmp_path):
    """One that is made after the submission: the data is gone when the job starts. It is not tried again."""
    folder, copy = tmp_path / "run", tmp_path / "data"
    shutil.copytree(data, copy)
    job = submit(folder, 10, "--sbatch", "--hold", data=copy)
    shutil.rmtree(copy)
    cluster.call("scontrol", "release", job)
    assert cluster.end(job) == ("FAILED", 0)
    assert f"{copy} is no prepared data folder" in log(folder, job, attempt=1)
    assert f"{copy} is no prepared data folder" in log(folder, job)
    assert "requeued" not in log(folder, job)


def test_a_cancelled_job_saves_and_stays_cancelled(submit, cluster, tmp_path):
    folder = tmp_path / "run"
    job = submit(folder, 1000, NO_CHECKPOINTS)
    reach(folder, 5)
    cluster.call("scancel", job)
    assert cluster.end(job) == ("CANCELLED", 0)
    assert json.loads((folder / "outcome.json").read_text())["status"] == "continue"
    assert list(folder.glob("checkpoints/step-*/COMPLETE"))


def test_a_mistake_of_the_command_submits_nothing(sh, cluster, data, tmp_path):
    submit = [
        *STEPLINE,
        "submit",
        "tiny",
        *options(tmp_path / "run", data, 10),
        "--ranks-per-node",
        "1",
    ]
    for more, sentence in (
        (["--time", "1"], "error: --time 1 leaves no time before the run saves"),
        (["--nodes", "3"], "error: sbatch refused"),
        (["--sbatch", "--partition=none"], "error: sbatch refused"),
    ):
        said = sh(*submit, *more, code=2, **cluster.environment).stderr
        assert said.startswith(sentence)
        assert said.count("\n") == 1
    assert cluster.call("squeue", "--noheader") == ""


def test_srun_without_torchrun(sh, cluster, data, undisturbed, tmp_path):
    """Each task is a rank; the exit codes pass through srun."""
    folder = tmp_path / "run"
    srun = ["srun", "--nodes=2", "--ntasks=2", *STEPLINE, "train", "tiny"]
    command = [*srun, *options(folder, data, 200), NO_CHECKPOINTS]
    process = subprocess.Popen(
        command, env=os.environ | cluster.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    reach(folder, 40)
    job = cluster.call("squeue", "--noheader", "--format=%i").strip()
    cluster.call("scancel", "--signal=USR1", job)
    assert process.wait(60) == 75
    sh(*command, **cluster.environment)
    assert rows(folder) == undisturbed(200)
    said = sh(*srun, f"data.path={tmp_path}", code=2, **cluster.environment).stderr
    assert said.count("error: /") == 2, "one rank of each node says it"


def test_a_sweep_as_an_array(sh, cluster, data, tmp_path):
    folder = tmp_path / "a sweep"
    grid = ["--sizes", "0.5", "--tokens", "8192", "--lr", "1e-3,3e-3", "--batch-tokens", "1024"]
    config = ["tiny", f"data.path={data}", "run.device=cpu", "optimizer.name=adamw", "budget.steps=null"]
    sweep = [*STEPLINE, "sweep", *config, *grid]
    told = json.loads(sh(*sweep, "--output", folder, "--slurm", "--json", **cluster.environment).stdout)
    assert told["elements"] == 2
    deadline = time.monotonic() + 120
    while cluster.call("squeue", "--noheader"):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    collected = sh(*STEPLINE, "sweep", "--output", folder, "--collect", "--json")
    assert json.loads(collected.stdout)["done"] == 2, [p.read_text() for p in folder.glob("slurm/*.log")]
    assert sorted(p.name for p in folder.glob("slurm/*.log")) == [f"{told['job']}-{i}.log" for i in (0, 1)]
