"""Who trains in a run's folder: the rank 0 that holds its lock. Imports no torch."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from stepline.trainer.errors import UserError
from stepline.trainer.files import locked

LOCK = ".training.lock"
"""In a run's folder: held while a process trains there; says which launcher's."""
WAIT_S = 20.0  # the attempt before may be about to end


@contextlib.contextmanager
def only_one(folder: Path, launcher: str) -> Iterator[None]:
    """Keeps two runs out of one folder; raises UserError where the other one does not end soon."""
    deadline = time.monotonic() + WAIT_S
    while True:
        with locked(folder / LOCK, wait=False) as mine:
            if mine is not None:
                _sign(mine, launcher)
                yield
                return
        if time.monotonic() > deadline:
            raise UserError(
                f"another process trains in {folder}; wait for its end or choose another run.folder"
            )
        time.sleep(0.5)


@contextlib.contextmanager
def unless_held(folder: Path, launcher: str | None) -> Iterator[bool]:
    """Whether nobody trains in the folder, which none begins inside; or only a rank 0 that `launcher` has started."""
    with locked(folder / LOCK, wait=False) as mine:
        yield mine is not None or (folder / LOCK).read_text(encoding="utf-8") == launcher


def _sign(lock: int, launcher: str) -> None:
    with contextlib.suppress(OSError):
        os.ftruncate(lock, 0)
        os.pwrite(lock, launcher.encode(), 0)
