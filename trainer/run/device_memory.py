"""How much memory this rank's device has: what the planner fits the layout into."""

import os

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
