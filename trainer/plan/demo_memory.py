"""What an update by DeMo holds for a moment, from the batches that comm/demo.py makes. Imports no torch."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from stepline.comm.chunking import (
    PUBLISHED_KEPT,
    SPARSE_INVERSE,
    Chunking,
    batched,
    index_bits,
    kept_of,
    packet_bytes,
)
from stepline.trainer.config_sync import DeMoConfig
from stepline.trainer.plan.tensors import Shape

INDEX = 8
"""Bytes of an index as torch has it."""


Cut = list[tuple[Shape, Chunking]]


def chunkings(shapes: Iterable[tuple[Shape, bool]], demo: DeMoConfig) -> tuple[Cut, Cut]:
    """How comm/demo.py cuts a rank's tensors, each (shape, whether it is embedding or head): what is transformed, and
    what is cut flat. Vectors are neither, but as published."""
    limit, transformed, flat = demo.side, [], []
    for shape, end in shapes:
        if demo.faithful or (len(shape) > 1 and not end):
            transformed.append((shape, Chunking.of(shape, limit, divisors=demo.faithful)))
        elif len(shape) > 1:
            flat.append((shape, Chunking.flat(shape, limit * limit)))
    return transformed, flat


def fixed_kept(demo: DeMoConfig) -> int | None:
    """Values of each chunk that travel; None where the density says."""
    return demo.kept or (PUBLISHED_KEPT if demo.faithful else None)


@dataclass(frozen=True)
class Batch:
    """Chunks of one shape that are encoded together; item: bytes of a value."""

    chunks: int
    height: int
    width: int
    kept: int
    transformed: bool
    published: bool
    item: int

    @property
    def elements(self) -> int:
        """Of all chunks."""
        return self.chunks * self.height * self.width

    @property
    def bits(self) -> int:
        """Of an index."""
        return index_bits(self.height * self.width)

    @property
    def values(self) -> int:
        """That travel."""
        return self.chunks * self.kept

    def encoding(self, number: int) -> int:
        """Bytes while it is encoded by torch (`Chunks.encode`); number: bytes of a value as it travels."""
        whole, values = self.elements * self.item, self.values
        sent = values * (INDEX + self.item + (number + self.item if number < self.item else 0))
        if not self.transformed:  # the chunks, and what was sent in its places among zeros
            return 2 * whole + sent
        if self.kept < (self.height + self.width) / SPARSE_INVERSE:
            # rows and columns of the basis for each value, the rows before they are scaled too; or their product, and
            # that as parameters, beside the spectrum
            rows, columns = values * self.height * self.item, values * self.width * self.item
            own = max(2 * rows + values * INDEX, rows + columns + values * INDEX + whole, 2 * whole)
        else:
            own = 3 * whole  # as spectrum, half of the inverse and the whole; or that as parameters
        searched = whole + values * (self.item + INDEX)  # magnitudes; the largest and where they are
        return max(3 * whole, whole + searched, whole + sent + own)

    def applying(self, signed: int) -> int:
        """Bytes while torch decodes and applies it; signed: of the largest parameter, of which a sign is taken."""
        whole, values = self.elements * self.item, self.values
        # published: int16 counts, and each replica's values over them; otherwise the sum, and that over the replicas
        mean = whole + (self.elements * 2 + values * (2 + self.item) if self.published else whole)
        if not self.transformed:
            return max(mean, whole + signed)
        return max(mean, 3 * whole + signed)


def batches(shapes: Iterable[tuple[Shape, bool]], demo: DeMoConfig, item: int) -> list[Batch]:
    """Of a rank's tensors, as `chunkings` takes them; item: bytes of a value."""
    transformed, flat = chunkings(shapes, demo)
    published = demo.faithful or demo.accumulate == "gradients"
    found = []
    for cut, kind in ((transformed, (True, published)), (flat, (False, False))):
        for members in batched(cut):
            height, width = members[0][1].height, members[0][1].width
            chunks = sum(chunking.count for _, chunking in members)
            kept = kept_of(height * width, demo.density, fixed_kept(demo))
            found.append(Batch(chunks, height, width, kept, *kind, item))
    return found


def packet(found: list[Batch], codec: str) -> int:
    """Bytes of a packet's chunks."""
    return sum(sum(packet_bytes(b.chunks, b.kept, b.bits, codec, b.item)) for b in found)


def owners_share(found: list[Batch], owners: int) -> list[Batch]:
    """The largest share of the chunks."""
    return [replace(batch, chunks=-(-batch.chunks // owners)) for batch in found]


def messages(found: list[Batch], codec: str, replicas: int, owners: bool) -> int:
    """Bytes of what arrives from all replicas: their packets, or of owners one message of all shares."""
    return replicas * packet(owners_share(found, replicas) if owners else found, codec)


def exchanged(found: list[Batch], codec: str, replicas: int, owners: bool, fused: bool, applied: int) -> int:
    """Most bytes of an update: while a batch is encoded, while packets are written or read, and while it is applied.

    owners: whether they reduce, so that all shares together are read once. fused: by CUDA's kernels, which address the
    chunks in the parameters. applied: beside what has arrived.
    """
    index = 4 if fused else INDEX
    number = {"fp32": found[0].item, "int8": 1, "sign": 1}[codec]
    own, peak = packet(found, codec), 0
    sent = arrived = 0
    for batch in found:
        peak = max(peak, sent + (0 if fused else batch.encoding(number)))
        sent += batch.values * (index + number)
    peak = max(peak, sent + 2 * own)  # its parts, and the packet
    come = messages(found, codec, replicas, owners)
    # to owners packets leave in one piece, and what comes back is there beside what came to this one
    flying = 2 * (own + come) if owners else own + come
    copies = 1 if owners else replicas
    for batch in found:
        values = copies * batch.values
        # 32-bit numbers of the bytes, of the indices, and these without what is beside them, beside 64-bit ones
        unpacking = 0 if fused else values * (batch.bits // 2 + 4 + 4)
        peak = max(peak, flying + arrived + values * index + unpacking)
        arrived += values * (index + batch.item)
    if owners:  # the sums of its share, and of all shares values by share and together
        share = owners_share(found, replicas)
        summed = max(2 * batch.elements * batch.item for batch in share)
        peak = max(peak, flying + arrived + max(summed, arrived))
    return max(peak, flying + arrived + applied)
