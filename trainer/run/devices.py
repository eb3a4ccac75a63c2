"""Which device is this rank's, and how much memory it has: what the planner fits the layout into."""

import os
import re
from pathlib import Path

import torch

from stepline.comm import slurm
from stepline.comm.mesh import World
from stepline.trainer.errors import UserError
from stepline.trainer.run.limits import memory_limit

UNUSED_GPU = (
    "this machine has a GPU that torch cannot use: this run uses the CPU (`stepline doctor` says why)"
)


def device_memory(device: torch.device, local_ranks: int) -> int | None:
    """Bytes of a GPU, or a rank's share of the machine's RAM (the container's or job's, where that is less).

    All of it and not what is free: ranks ask at different moments, and all must get the same answer. None when
    the machine does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):  # not on every system
        return None
    return min(ram, memory_limit() or ram) // local_ranks


def hardware_present() -> bool:
    """Whether this machine has an NVIDIA GPU, usable or not."""
    return Path("/dev/nvidia0").exists() or Path("/proc/driver/nvidia/version").exists()


def hides_gpus(visible: str | None) -> bool:
    """Whether a value of CUDA_VISIBLE_DEVICES names no GPU."""
    return visible is not None and not re.match(r"\s*\w", visible)


def pick_device(asked: str, world: World, option: str = "run.device=") -> tuple[torch.device, list[str]]:
    """The device of this rank, and what was done instead of what one would expect; raises UserError.

    option: by which it was asked for.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked != "cpu" and 0 < gpus < world.local_size and slurm.gave_gpus_to_tasks(gpus, world.local_size):
        return torch.device("cuda", 0), []
    if asked == "cuda" and gpus == 0:
        raise UserError(
            f"{option}cuda needs a GPU, and this machine has no usable one; use {option}cpu or auto"
        )
    if asked == "cuda" and gpus < world.local_size:
        raise UserError(
            f"{option}cuda needs a GPU for each rank, and this machine has {gpus} GPUs for {world.local_size} ranks; "
            f"start {gpus} ranks"
        )
    if asked == "cpu" or gpus == 0:
        unused = (
            asked == "auto" and hardware_present() and not hides_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"))
        )
        return torch.device("cpu"), [UNUSED_GPU] if unused else []
    if gpus < world.local_size:
        note = f"{gpus} GPUs cannot serve {world.local_size} ranks: this run uses the CPU"
        return torch.device("cpu"), [note]
    return torch.device("cuda", world.local_rank), []
