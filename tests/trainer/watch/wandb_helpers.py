"""Of the tests of wandb: a logger in a folder, rows, wandb's process, and what the server has."""

import os
import subprocess
import sys
from pathlib import Path

from stepline.trainer.watch.loggers import run_id
from stepline.trainer.watch.wandb_logger import WandbLogger


def make(folder, mode="auto", rows=(), config=None):
    folder.mkdir(exist_ok=True)
    return WandbLogger(
        folder, "project", "name", config or {"lr": 0.1}, mode, logged=lambda first: list(rows)
    )


def row(step, **more):
    return {"step": step, "tokens": 100 * step, "loss": 1 / step, **more}


def core() -> int:
    """The pid of wandb's service, a child of this process; those of earlier tests may still be there as zombies."""
    children = (
        pid for task in Path("/proc/self/task").glob("*/children") for pid in task.read_text().split()
    )
    statuses = {int(pid): Path(f"/proc/{pid}/stat").read_text() for pid in children}
    (pid,) = (
        pid for pid, status in statuses.items() if "(wandb-core) Z" not in status and "(wandb-core)" in status
    )
    return pid


def stored(server, folder):
    return server.runs[run_id(folder)]


def sync(server, *folders, code=0):
    """The real `wandb sync`; returns what it says."""
    command = [sys.executable, "-m", "wandb", "sync", *map(str, folders)]
    done = subprocess.run(
        command,
        env=os.environ | server.environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done.stderr


def offline_folders(folder):
    return sorted((folder / "wandb").glob("offline-run-*"))
