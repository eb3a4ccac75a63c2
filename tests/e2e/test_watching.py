"""Whole runs that are watched, while wandb, the disk or the machine fails: the numbers stay the same, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ..trainer.watch.wandb_server import WandbServer
from .test_launch import NARROW, STEPLINE, rows

pytest.importorskip("wandb")

STEPS = 240
OPTIONS = [
    *NARROW,
    f"budget.tokens={1024 * STEPS}",
    "logging.every=1",
    "logging.eval_every=80",
    "logging.eval_windows=8",
    "checkpoint.every=80",
]
NUMBERS = ("step", "tokens", "loss", "lr", "grad_norm", "val_loss", "val_bits_per_byte")


def numbers(run: Path) -> list[tuple]:
    return [tuple(row.get(key) for key in NUMBERS) for row in rows(run)]


def beat(run: Path) -> dict:
    try:
        return json.loads((run / "heartbeat.json").read_text())
    except FileNotFoundError:
        return {"step": -1, "status": None}


class Launch:
    """`stepline train` in a process of its own."""

    def __init__(self, data: Path, run: Path, **env: str) -> None:
        self.run = run
        command = [*STEPLINE, "train", "quickstart", f"run.folder={run}", f"data.path={data}", *OPTIONS]
        self.said = run.with_suffix(".said")
        with self.said.open("ab") as said:
            self.process = subprocess.Popen(
                command, env=os.environ | env, stdin=subprocess.DEVNULL, stdout=said, stderr=said
            )

    def reach(self, step: int) -> None:
        """Waits until the run has logged the step."""
        deadline = time.monotonic() + 60
        path = self.run / "metrics.jsonl"
        while not path.exists() or path.read_bytes().count(b"\n") < step:
            assert self.process.poll() is None, self.said.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def wait_for(self, sentence: str) -> None:
        """Waits until the run says so."""
        deadline = time.monotonic() + 60
        while sentence not in self.said.read_text():
            assert self.process.poll() is None, self.said.read_text()
            assert time.monotonic() < deadline, self.said.read_text()
            time.sleep(0.01)

    def end(self, code: int = 0) -> str:
        """Waits for the end; returns what the run has said."""
        assert self.process.wait(90) == code, self.said.read_text()
        return self.said.read_text()

    def kill_wandb(self) -> None:
        found = subprocess.run(
            ["pgrep", "-P", str(self.process.pid), "-f", "wandb-core"], capture_output=True
        )
        for pid in found.stdout.split():
            os.kill(int(pid), signal.SIGKILL)


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory) -> Path:
    """A run that nothing happens to, with wandb offline; what heartbeat.json said on the way lies beside it."""
    launch = Launch(data, tmp_path_factory.mktemp("straight") / "run", WANDB_MODE="offline")
    seen = []
    while launch.process.poll() is None:
        seen.append(beat(launch.run))
        time.sleep(0.02)
    launch.end()
    (launch.run / "seen.json").write_text(json.dumps(seen))
    return launch.run


def test_heartbeat_of_a_run(straight):
    seen = [says for says in json.loads((straight / "seen.json").read_text()) if says["status"]]
    order = list(dict.fromkeys(says["status"] for says in seen))
    assert order[:2] == ["starting", "training"]
    assert "validating" in order
    steps = [says["step"] for says in seen]
    assert steps == sorted(steps)
    last = beat(straight)
    assert (last["status"], last["step"], last["exit_code"], last["attempt"]) == ("done", STEPS, 0, 1)
    assert last["loss"] == [row for row in rows(straight) if "loss" in row][-1]["loss"]
    assert (straight / "checkpoints" / last["last_checkpoint"] / "COMPLETE").exists()
    assert time.time() - last["time"] < 300


def test_the_offline_run_is_accepted_by_wandb_sync(straight, sh):
    (folder,) = (straight / "wandb").glob("offline-run-*")
    with WandbServer() as server:
        said = sh(sys.executable, "-m", "wandb", "sync", folder, **server.environment()).stderr
        assert "Finished syncing" in said
        (run,) = server.runs.values()
    assert run.name == (straight / "run_id").read_text().strip()
    assert [(r["step"], r.get("loss"), r.get("val_loss")) for r in run.history] == [
        (r["step"], r.get("loss"), r.get("val_loss")) for r in rows(straight)
    ]
    values = run.values()
    assert values["budget"]["batch_tokens"] == 1024
    plan = json.loads((straight / "plan.json").read_text())
    assert values["plan"]["steps"] == plan["steps"] == STEPS
    outcome = json.loads((straight / "outcome.json").read_text())
    assert (run.summary["status"], run.summary["val_loss"]) == ("done", outcome["val_loss"])
    assert run.exit_code == 0


def test_wandb_dies_and_the_run_is_killed_and_resumed(straight, data, tmp_path):
    """The server has every step once, with the numbers of the run left alone; so has metrics.jsonl."""
    with WandbServer() as server:
        environment = server.environment() | {"WANDB_MODE": "online"}
        first = Launch(data, tmp_path / "run", **environment)
        first.reach(40)
        first.kill_wandb()
        first.reach(120)
        first.process.kill()
        first.end(-signal.SIGKILL)
        assert beat(first.run)["status"] in ("training", "saving", "validating")
        second = Launch(data, tmp_path / "run", **environment)
        said = second.end()
        (run,) = server.runs.values()
    assert said.count("wandb is lost (") == 1
    assert numbers(second.run) == numbers(straight)
    assert [(r["step"], r.get("loss")) for r in run.history] == [
        (r["step"], r.get("loss")) for r in rows(straight)
    ]
    assert (beat(second.run)["attempt"], beat(second.run)["status"]) == (2, "done")


def test_a_disk_that_is_full_and_then_read_only(straight, data, sh, tmp_path, mount):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount("-t", "tmpfs", "-o", "size=24m", "none", disk)
    run = disk / "run"
    mounted = [disk]
    try:
        launch = Launch(data, run, WANDB_MODE="offline")
        launch.reach(20)
        subprocess.run(["dd", "if=/dev/zero", f"of={disk / 'other'}", "bs=4096"], capture_output=True)
        launch.wait_for("metrics.jsonl cannot be written (No space left on device)")
        (disk / "other").unlink()
        launch.wait_for("metrics.jsonl is written again")
        mount("--bind", run, run)
        mounted.append(run)
        mount("-o", "remount,bind,ro", run)
        launch.wait_for("metrics.jsonl cannot be written (Read-only file system)")
        subprocess.run(["umount", run], check=True)
        mounted.pop()
        said = launch.end()
        assert numbers(run) == numbers(straight)
        assert beat(run)["status"] == "done"
        with WandbServer() as server:
            for folder in sorted((run / "wandb").glob("offline-run-*")):
                sh(sys.executable, "-m", "wandb", "sync", folder, **server.environment())
            (stored,) = server.runs.values()
        assert set(stored.steps) == set(range(1, STEPS + 1))
    finally:
        launch.process.kill()
        launch.process.wait()
        for path in reversed(mounted):
            subprocess.run(["umount", "--lazy", path], check=True)
    assert said.count("metrics.jsonl cannot be written (No space left on device)") == 1
    assert said.count("metrics.jsonl cannot be written (Read-only file system)") == 1
    assert said.count("metrics.jsonl is written again") == 2


def test_a_server_that_cannot_be_reached(straight, data, tmp_path):
    launch = Launch(
        data,
        tmp_path / "run",
        WANDB_MODE="online",
        WANDB_API_KEY="a" * 40,
        WANDB_BASE_URL="http://127.0.0.1:1",
    )
    said = launch.end()
    assert said.count("wandb is not reachable (") == 1
    assert numbers(launch.run) == numbers(straight)
    assert len(list((launch.run / "wandb").glob("offline-run-*"))) == 1
