"""What one replica tells the others in a step: chunks of many parameters as batches, and vectors, in one packet."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stepline.comm.codec import ChunkCodec
from stepline.comm.dct import Chunking

BATCH_ELEMENTS = 1 << 26  # transformed at once: bounds the memory beside the parameters

Chosen = tuple[Tensor | None, Tensor]
"""Indices (None where all replicas know them) and values, each `[chunks, kept]`."""


@dataclass(frozen=True)
class Part:
    """The chunks of one parameter in a batch."""

    name: str
    chunking: Chunking
    start: int

    @property
    def span(self) -> slice:
        """Its chunks among those of the batch."""
        return slice(self.start, self.start + self.chunking.count)


@dataclass(frozen=True)
class Batch:
    """Chunks of one shape from several parameters, so that few large products transform them all."""

    parts: tuple[Part, ...]
    height: int
    width: int
    kept: int
    """Values of each chunk that travel."""
    transformed: bool
    """Whether they are coefficients of the chunk's DCT."""
    published: bool
    """Whether their mean is that of the paper, over those who sent an index; otherwise over all replicas."""

    @property
    def elements(self) -> int:
        """Of a chunk."""
        return self.height * self.width

    @property
    def chunks(self) -> int:
        """Of all parts."""
        return self.parts[-1].span.stop

    def split(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """`[chunks, height, width]` of the parts' tensors."""
        return torch.cat([part.chunking.split(tensors[part.name]) for part in self.parts])

    def join(self, chunks: Tensor) -> dict[str, Tensor]:
        """The parts' tensors of `[chunks, height, width]`."""
        return {part.name: part.chunking.join(chunks[part.span]) for part in self.parts}


def make_batches(
    chunkings: Mapping[str, Chunking],
    density: float,
    kept: int | None = None,
    *,
    transformed: bool,
    published: bool,
) -> list[Batch]:
    """Puts chunks of one shape together, in the order of the names. kept: instead of the density."""
    by_shape: dict[tuple[int, int], list[tuple[str, Chunking]]] = {}
    for name, chunking in chunkings.items():
        if chunking.count:
            by_shape.setdefault((chunking.height, chunking.width), []).append((name, chunking))
    batches = []
    for (height, width), members in by_shape.items():
        size = height * width
        k = min(size, kept or max(1, round(density * size)))
        parts: list[Part] = []
        for name, chunking in members:
            start = parts[-1].span.stop if parts else 0
            if parts and (start + chunking.count) * size > BATCH_ELEMENTS:
                batches.append(Batch(tuple(parts), height, width, k, transformed, published))
                parts, start = [], 0
            parts.append(Part(name, chunking, start))
        batches.append(Batch(tuple(parts), height, width, k, transformed, published))
    return batches


def largest(chunks: Tensor, kept: int) -> Chosen:
    """The `kept` largest magnitudes of each row of `[chunks, elements]`.

    In two searches of fewer values: those of the largest in each group of a row's elements, then those in the `kept`
    groups found, as no other group can hold one of the `kept` largest.
    """
    groups = _groups(chunks.shape[1], kept)
    if groups is None:
        indices = chunks.abs().topk(kept, dim=1, sorted=False).indices
    else:
        grouped = chunks.unflatten(1, (-1, groups))  # a group is a column
        peaks = torch.maximum(grouped.amax(dim=1), -grouped.amin(dim=1))
        found = peaks.topk(kept, dim=1, sorted=False).indices
        held = grouped.gather(2, found.unsqueeze(1).expand(-1, grouped.shape[1], -1)).flatten(1)
        places = held.abs().topk(kept, dim=1, sorted=False).indices
        indices = places // kept * groups + found.gather(1, places % kept)
    return indices, chunks.gather(1, indices)


def _groups(elements: int, kept: int) -> int | None:
    """How many groups of 2, 4, 8 ... elements make the two searches shortest: elements / size + size * kept values.
    None where they are not half as long as a plain one."""
    sizes = [2**i for i in range(1, 8) if elements % 2**i == 0 and elements // 2**i >= kept]
    searched = {size: elements // size + size * kept for size in sizes}
    best = min(searched, key=searched.get, default=None)
    return None if best is None or 2 * searched[best] > elements else elements // best


def scattered(chosen: Chosen, elements: int) -> Tensor:
    """`[chunks, elements]` with the chosen values in their places, zeros elsewhere."""
    indices, values = chosen
    return values.new_zeros(len(values), elements).scatter_(1, indices, values)


class PacketFormat:
    """The bytes of a packet, which may be cut into one share for each owner: equal parts of every batch's chunks.

    Every replica has the same parameters, hence the same format. dense: values that travel as they are.
    """

    def __init__(
        self, batches: Sequence[Batch], dense: int, codec: str, dtype: torch.dtype, shares: int = 1
    ) -> None:
        self.batches, self.dense, self.codec, self.dtype, self.shares = batches, dense, codec, dtype, shares
        self.dense_dtype = dtype if codec == "fp32" else torch.bfloat16

    def span(self, total: int, share: int) -> slice:
        """The share's part of `total` things."""
        return slice(total * share // self.shares, total * (share + 1) // self.shares)

    def codecs(self, share: int) -> list[ChunkCodec]:
        """One for each batch."""
        return [
            ChunkCodec(
                _length(self.span(b.chunks, share)), b.height * b.width, b.kept, self.codec, self.dtype
            )
            for b in self.batches
        ]

    def num_bytes(self, share: int) -> int:
        """Of one share's packet."""
        dense = _length(self.span(self.dense, share)) * self.dense_dtype.itemsize
        return sum(codec.num_bytes for codec in self.codecs(share)) + dense

    def write(self, share: int, chosen: Sequence[Chosen], dense: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The packet of one share (uint8) and the values that its receivers decode, a tensor for each batch.

        chosen, dense: of this share alone.
        """
        packets, sent = [], []
        for codec, (indices, values) in zip(self.codecs(share), chosen, strict=True):
            packet, decoded = codec.encode(indices, values)
            packets.append(packet)
            sent.append(decoded)
        packets.append(dense.to(self.dense_dtype).view(torch.uint8))
        return torch.cat(packets), sent

    def read(self, share: int, packet: Tensor) -> tuple[list[Chosen], Tensor]:
        """What `write` put into a packet."""
        codecs = self.codecs(share)
        sizes = [codec.num_bytes for codec in codecs]
        *parts, dense = packet[: self.num_bytes(share)].split([*sizes, self.num_bytes(share) - sum(sizes)])
        chosen = [codec.decode(part) for codec, part in zip(codecs, parts, strict=True)]
        return chosen, dense.clone().view(self.dense_dtype).to(self.dtype)


def contributors_mean(contributions: Sequence[Chosen], elements: int) -> Tensor:
    """`[chunks, elements]`: at each index the mean over those who sent it (arXiv 2411.19870), in their order."""
    total = contributions[0][1].new_zeros(len(contributions[0][1]), elements)
    count = torch.zeros_like(total, dtype=torch.int16)
    for indices, values in contributions:
        count.scatter_add_(1, indices, torch.ones_like(values, dtype=torch.int16))
    for indices, values in contributions:
        total.scatter_add_(1, indices, values / count.gather(1, indices))
    return total


def replicas_mean(contributions: Sequence[Chosen], elements: int) -> Tensor:
    """`[chunks, elements]`: the sum over the contributions, in their order, over their number."""
    total = contributions[0][1].new_zeros(len(contributions[0][1]), elements)
    for indices, values in contributions:
        total.scatter_add_(1, indices, values)
    return total / len(contributions)


def _length(span: slice) -> int:
    return span.stop - span.start
