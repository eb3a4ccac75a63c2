"""What devices this machine has, and how much memory this rank's: what the planner fits the layout into."""

import os
import re
from pathlib import Path

import torch

from stepline.trainer.run.limits import memory_limit


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
