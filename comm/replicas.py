"""Whether the replicas still are copies of each other, and how small values are shared among them."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from stepline.comm.fsdp import local

gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""torch 2.13 gave it another name."""
SLAB = 1 << 24
PERIOD = 65521  # a prime: weights of positions repeat after it


def fingerprint(tensor: Tensor) -> Tensor:
    """A 0-dim int64 that changes, all but surely, with any bit or any exchange of two values."""
    bits = tensor.detach().contiguous().view(-1)
    bits = bits.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, bits.numel(), SLAB):
        slab = bits[start : start + SLAB].long()
        places = torch.arange(start, start + slab.numel(), device=bits.device)
        total += (slab * (places % PERIOD * 2 + 1)).sum()  # wraps around
    return total


def gather_replicas(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """`[replicas, *value.shape]`, the same on all of them. A collective of `group`; None: there is one replica."""
    if group is None or dist.get_world_size(group) == 1:
        return value.unsqueeze(0)
    out = value.new_empty(dist.get_world_size(group) * value.numel())
    gather_single(out, value.reshape(-1), group=group)
    return out.view(-1, *value.shape)


def first_difference(named: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> str | None:
    """The first name whose values differ between replicas on any rank, the same answer on all ranks.

    named: plain tensors or DTensors, of which each rank compares its part. A collective of all ranks.
    """
    names = list(named)
    mine = torch.stack([fingerprint(local(named[name])) for name in names])
    differs = (gather_replicas(mine, group) != mine).any(dim=0)
    first = torch.where(differs, torch.arange(len(names), device=mine.device), len(names)).min()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(first, dist.ReduceOp.MIN)
    return None if int(first) == len(names) else names[int(first)]
