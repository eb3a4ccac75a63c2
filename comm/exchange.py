"""How packets reach all replicas: gathered by all, or reduced by the owner of each share first."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from stepline.comm.packets import PacketFormat, contributors_mean, largest, replicas_mean, scattered
from stepline.comm.replicas import gather_single


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
    work = gather_single(buffer.view(-1), packet, group=group, async_op=True)
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


class PacketExchange:
    """Sends packets of one format and says what their mean is, alike on all replicas.

    With owners (a format of R shares) each replica adds up its share of all packets, keeps the largest values of the
    sum, and sends them to all: a rank then receives about two packets, whatever R is. What it cuts off it owes, and
    adds to the next sum.
    """

    def __init__(self, form: PacketFormat, group: dist.ProcessGroup | None, sample: Tensor) -> None:
        self.form, self.group = form, group
        self.replicas = 1 if group is None else dist.get_world_size(group)
        self.replica = 0 if group is None else dist.get_rank(group)
        self.owners = form.shares > 1
        codecs = form.codecs(self.replica) if self.owners else []
        self.owed = [sample.new_zeros(codec.chunks, codec.elements) for codec in codecs]

    @property
    def num_bytes(self) -> tuple[int, int]:
        """(sent, received) by this rank in a step."""
        sizes = [self.form.num_bytes(share) for share in range(self.form.shares)]
        others = self.replicas - 1
        if not self.owners:
            return others * sizes[0], others * sizes[0]
        gathered = others * max(sizes)
        return sum(sizes) - sizes[self.replica] + gathered, others * sizes[self.replica] + gathered

    def send(self, packets: list[Tensor]) -> Flight:
        """Starts to send one packet for each share."""
        if self.owners:
            return to_owners(packets, self.form.num_bytes(self.replica), self.group)
        return all_gather(packets[0], self.group)

    def receive(self, flight: Flight) -> tuple[Iterator[Tensor], Tensor]:
        """(mean of each batch's chunks `[chunks, elements]`, mean of the dense values); waits for the packets."""
        if not self.owners:
            return self._mean(0, flight.land())
        return self._reduce(*self._mean(self.replica, flight.land()))

    def _mean(self, share: int, packets: list[Tensor]) -> tuple[Iterator[Tensor], Tensor]:
        read = [self.form.read(share, packet) for packet in packets]
        dense = read[0][1].clone()
        for _, other in read[1:]:
            dense += other

        def means() -> Iterator[Tensor]:
            for i, batch in enumerate(self.form.batches):
                contributions = [chosen[i] for chosen, _ in read]
                if batch.published:
                    yield contributors_mean(contributions, batch.elements)
                else:
                    yield replicas_mean(contributions, batch.elements)

        return means(), dense / len(read)

    def _reduce(self, means: Iterator[Tensor], dense: Tensor) -> tuple[Iterator[Tensor], Tensor]:
        """The owner's part."""
        form, chosen = self.form, []
        for owed, mean, batch in zip(self.owed, means, form.batches, strict=True):
            owed.add_(mean)
            chosen.append(largest(owed, batch.kept))
        packet, sent = form.write(self.replica, chosen, dense)
        for owed, (indices, _), values in zip(self.owed, chosen, sent, strict=True):
            owed.scatter_add_(1, indices, -values)
        padded = packet.new_zeros(max(form.num_bytes(share) for share in range(self.replicas)))
        padded[: len(packet)] = packet
        packets = all_gather(padded, self.group).land()
        read = [form.read(share, packet) for share, packet in enumerate(packets)]

        def whole() -> Iterator[Tensor]:
            for i, batch in enumerate(form.batches):
                yield torch.cat([scattered(part[i], batch.elements) for part, _ in read])

        return whole(), torch.cat([part for _, part in read])

    def state_dict(self) -> dict[str, Tensor]:
        """What this owner owes, under names of this layout of ranks alone."""
        if not self.owners:
            return {}
        layout = f"{self.replicas}x{dist.get_world_size() // self.replicas}.rank{dist.get_rank()}"
        return {f"owed.{layout}.{i}": owed for i, owed in enumerate(self.owed) if owed.numel()}
