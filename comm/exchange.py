"""How packets reach all replicas: gathered by all, or reduced by the owner of each share first."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Flight:
    """Packets under way; every replica waits for them at the same place, whether or not they have come."""

    buffer: Tensor
    """uint8 `[replicas, bytes]`."""
    work: dist.Work | None

    def land(self) -> list[Tensor]:
        """The packets by replica."""
        if self.work is not None:
            self.work.wait()
            self.work = None
        return list(self.buffer)


def all_gather(packet: Tensor, group: dist.ProcessGroup | None) -> Flight:
    """Starts to send `packet` (uint8, of one size) to all replicas; each receives (R - 1) packets."""
    replicas = 1 if group is None else dist.get_world_size(group)
    if replicas == 1:
        return Flight(packet.unsqueeze(0), None)
    buffer = packet.new_empty(replicas, packet.numel())
    work = dist.all_gather_into_tensor(buffer.view(-1), packet, group=group, async_op=True)
    return Flight(buffer, work)


def to_owners(packets: Sequence[Tensor], own_size: int, group: dist.ProcessGroup) -> Flight:
    """Starts to send packet i to replica i; each receives R packets of `own_size` bytes, its own share of each."""
    sizes = [packet.numel() for packet in packets]
    buffer = packets[0].new_empty(len(packets), own_size)
    work = dist.all_to_all_single(
        buffer.view(-1),
        torch.cat(list(packets)),
        [own_size] * len(packets),
        sizes,
        group=group,
        async_op=True,
    )
    return Flight(buffer, work)
