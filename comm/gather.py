"""Any value of every rank, on all ranks."""

from typing import Any

import torch.distributed as dist


def gathered(value: Any, group: dist.ProcessGroup | None = None) -> list:
    """Every rank's value, by rank; pickled, so for the host's own words and numbers. A collective."""
    found: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found
