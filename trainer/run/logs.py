"""The log of each rank of an attempt, in a folder that all nodes see."""

import contextlib
import faulthandler
import logging
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TextIO

import torch.distributed as dist

from stepline.comm.gather import gathered
from stepline.trainer.errors import UserError
from stepline.trainer.run.manifest import incomplete_checkpoints, remove
from stepline.trainer.run.outcome import forget_outcome
from stepline.trainer.run.start import Job
from stepline.trainer.run.together import together_on_disk

SLOW_FOLDER_S = 15.0  # until a network file system shows a new folder on another node

log = logging.getLogger("stepline")


def start_logs(job: Job) -> tuple[int, TextIO]:
    """Opens logs/attempt-K/rank-R.log on every rank; rank 0 also speaks on standard error. Returns K and the file.

    A crash of the interpreter, or SIGUSR2 at any time, writes the stacks of all threads to that file. Raises
    UserError on all ranks where one of them cannot write there, or does not see the folder that rank 0 made.
    """
    attempt = [together_on_disk(lambda: _begin_attempt(job.folder) if job.world.rank == 0 else 0, job.folder)]
    dist.broadcast_object_list(attempt, src=0)
    folder = job.folder / "logs" / f"attempt-{attempt[0]}"
    _check_folder_shared(job, folder)
    path = folder / f"rank-{job.world.rank}.log"
    in_file = together_on_disk(lambda: logging.FileHandler(path, encoding="utf-8"), folder)
    handlers: list[logging.Handler] = [in_file]
    handlers[0].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    if job.world.rank == 0:
        handlers.append(Terminal())
        handlers[1].setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = handlers
    log.setLevel(logging.INFO)
    log.propagate = False
    logging.raiseExceptions = False  # a full disk must not fill the terminal
    faulthandler.enable(in_file.stream)
    faulthandler.register(signal.SIGUSR2, in_file.stream)
    return attempt[0], in_file.stream


def _begin_attempt(folder: Path) -> int:
    """The number of a new attempt, whose folder for logs it makes; what the ones before have left half is removed."""
    forget_outcome(folder)
    for left in incomplete_checkpoints(folder):
        remove(left)
    named = (p.name.removeprefix("attempt-") for p in (folder / "logs").glob("attempt-*"))
    attempt = max((int(number) for number in named if number.isdigit()), default=0) + 1
    (folder / "logs" / f"attempt-{attempt}").mkdir(parents=True)
    return attempt


class Terminal(logging.StreamHandler):
    """Standard error as it is when a line is written: the progress bar takes its place while it is shown."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, _: TextIO) -> None:
        pass


def wait_for(path: Path) -> None:
    """Until this node sees it, which may be a while after another has made it."""
    deadline = time.monotonic() + SLOW_FOLDER_S
    while not _sees(path) and time.monotonic() < deadline:
        time.sleep(0.2)


def _sees(path: Path) -> bool:
    with contextlib.suppress(OSError):  # as of a stale mount
        return path.exists()
    return False


def _check_folder_shared(job: Job, folder: Path) -> None:
    wait_for(folder)
    blind = gathered(None if _sees(folder) else socket.gethostname())
    hosts = sorted({host for host in blind if host is not None})
    if hosts:
        raise UserError(
            f"{', '.join(hosts)} does not see {job.folder} as rank 0 does; put run.folder on a file system that all "
            "nodes share"
        )
