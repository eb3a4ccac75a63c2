"""How packets reach all replicas: gathered by all, or reduced by the owner of each share first."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from stepline.comm.chunks import Chunks
from stepline.comm.packets import Chosen, PacketFormat
from stepline.comm.replicas import gather_single


@dataclass
class Flight:
    """Packets under way; every replica waits for them at the same place, whether or not they have come."""

    buffer: Tensor
    """uint8 `[replicas, bytes]`."""
    work: dist.Work | None
    reduced: bool = False
    """Whether owners have added up what is in it."""

    def land(self) -> Tensor:
        """The packets by replica, uint8 `[replicas, bytes]`."""
        if self.work is not None:
            self.work.wait()
            self.work = None
        return self.buffer


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

    cut: a word for which values this rank's chunks are made of, without which what is owed means nothing.
    """

    def __init__(
        self,
        form: PacketFormat,
        group: dist.ProcessGroup | None,
        sample: Tensor,
        chunks: Chunks,
        cut: str = "",
    ) -> None:
        self.form, self.group, self.chunks, self.cut = form, group, chunks, cut
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

    def pass_on(self, flight: Flight) -> Flight:
        """The owner's part: waits for the first message, adds it up and starts to send the largest of the sums.

        Without owners, or where it is done already, nothing; alike on all replicas.
        """
        if not self.owners or flight.reduced:
            return flight
        form, sent = self.form, []
        arrived, dense = form.read(self.replica, flight.land())
        for owed, batch, own in zip(self.owed, form.batches, arrived, strict=True):
            self.chunks.add_mean(owed, batch, own)
            sent.append(self.chunks.take(owed, batch))
        packet = form.write(self.replica, sent, _mean(dense))
        padded = packet.new_zeros(max(form.num_bytes(share) for share in range(self.replicas)))
        padded[: len(packet)] = packet
        onward = all_gather(padded, self.group)
        onward.reduced = True
        return onward

    def receive(self, flight: Flight) -> tuple[list[Chosen], Tensor]:
        """Waits for the packets: indices and values `[senders, chunks, kept]` of each batch, of which the mean is to be
        taken (one sender where owners have), and the mean of the dense values."""
        packets = self.pass_on(flight).land()
        if not self.owners:
            arrived, dense = self.form.read(0, packets)
            return arrived, _mean(dense)
        return self.form.read_all(packets)

    def state_dict(self) -> dict[str, Tensor]:
        """What this owner owes, under names of this layout of ranks and parameters alone."""
        if not self.owners:
            return {}
        layout = f"{self.replicas}x{dist.get_world_size() // self.replicas}.rank{dist.get_rank()}.{self.cut}"
        return {f"owed.{layout}.{i}": owed for i, owed in enumerate(self.owed) if owed.numel()}


def _mean(dense: Tensor) -> Tensor:
    """Over the replicas of `[replicas, n]`, added in their order."""
    total = dense[0].clone()
    for other in dense[1:]:
        total += other
    return total / len(dense)
