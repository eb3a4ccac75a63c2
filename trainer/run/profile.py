"""torch profiler trace and CUDA memory snapshot of a few steps."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import torch

from stepline.trainer.config import Config
from stepline.trainer.errors import reason_of

log = logging.getLogger("stepline")

MEMORY_EVENTS = 200_000
"""Of the snapshot, the newest; each holds a stack of some kB on the host."""


class _Idle:
    """Stands in for the profiler when nothing is profiled."""

    def step(self) -> None:
        """Does nothing."""


@contextlib.contextmanager
def profiler(config: Config, folder: Path, rank: int, device: torch.device) -> Iterator:
    """With run.profile: traces steps 5 to 8 into `profile/rank-R.json` (Chrome trace format) and, on CUDA,
    writes `profile/rank-R-memory.pickle` (for pytorch.org/memory_viz). What cannot be written is missing."""
    target = folder / "profile"
    if not config.run.profile or not _made(target):
        yield _Idle()
        return
    cuda = device.type == "cuda"

    def write(profile: torch.profiler.profile) -> None:
        try:
            profile.export_chrome_trace(str(target / f"rank-{rank}.json"))
            if cuda:
                torch.cuda.memory._dump_snapshot(str(target / f"rank-{rank}-memory.pickle"))
        except (OSError, RuntimeError) as error:  # torch's own, of a file that it cannot open
            _missing(target, error)
        if cuda:
            torch.cuda.memory._record_memory_history(enabled=None)

    activities = [torch.profiler.ProfilerActivity.CPU]
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.memory._record_memory_history(stacks="python", max_entries=MEMORY_EVENTS)
    try:
        with torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(wait=3, warmup=1, active=4, repeat=1),
            on_trace_ready=write,
            profile_memory=True,
        ) as profile:
            yield profile
    finally:
        if cuda:  # a run that ends before
            torch.cuda.memory._record_memory_history(enabled=None)


def _made(target: Path) -> bool:
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _missing(target, error)
        return False
    return True


def _missing(target: Path, error: Exception) -> None:
    log.warning(
        "the profile in %s cannot be written (%s); training goes on without it", target, reason_of(error)
    )
