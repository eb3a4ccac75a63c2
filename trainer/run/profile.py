"""torch profiler trace and CUDA memory snapshot of a few steps."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from stepline.trainer.config import Config


class _Idle:
    """Stands in for the profiler when nothing is profiled."""

    def step(self) -> None:
        """Does nothing."""


@contextlib.contextmanager
def profiler(config: Config, folder: Path, rank: int, device: torch.device) -> Iterator:
    """With run.profile: traces steps 5 to 8 into `profile/rank-R.json` (Chrome trace format) and, on CUDA,
    writes `profile/rank-R-memory.pickle` (for pytorch.org/memory_viz)."""
    if not config.run.profile:
        yield _Idle()
        return
    target = folder / "profile"
    target.mkdir(parents=True, exist_ok=True)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.memory._record_memory_history()
    with torch.profiler.profile(
        activities=activities,
        schedule=torch.profiler.schedule(wait=3, warmup=1, active=4, repeat=1),
        on_trace_ready=lambda p: p.export_chrome_trace(str(target / f"rank-{rank}.json")),
        profile_memory=True,
    ) as profile:
        yield profile
    if device.type == "cuda":
        torch.cuda.memory._dump_snapshot(str(target / f"rank-{rank}-memory.pickle"))
        torch.cuda.memory._record_memory_history(enabled=None)
