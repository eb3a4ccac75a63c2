"""What one replica tells the others in a step: chunks of many parameters as batches, and vectors, in one packet."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stepline.comm.chunking import Chunking, batched, kept_of
from stepline.comm.codec import ChunkCodec, Packing, as_numbers
from stepline.comm.dct import join, split

Chosen = tuple[Tensor, Tensor]
"""Indices and values, each `[chunks, kept]`; of several replicas `[replicas, chunks, kept]`."""
Quantised = tuple[Tensor, Tensor, Tensor | None]
"""Indices, numbers `[chunks, kept]` and scales `[chunks]` of what is sent (codec.quantise)."""


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
        return torch.cat([split(tensors[part.name], part.chunking) for part in self.parts])

    def join(self, chunks: Tensor) -> dict[str, Tensor]:
        """The parts' tensors of `[chunks, height, width]`."""
        return {part.name: join(chunks[part.span], part.chunking) for part in self.parts}


def make_batches(
    chunkings: Mapping[str, Chunking],
    density: float,
    kept: int | None = None,
    *,
    transformed: bool,
    published: bool,
) -> list[Batch]:
    """Puts chunks of one shape together, in the order of the names. kept: instead of the density."""
    batches = []
    for members in batched(chunkings.items()):
        parts, start = [], 0
        for name, chunking in members:
            parts.append(Part(name, chunking, start))
            start += chunking.count
        height, width = members[0][1].height, members[0][1].width
        kept_here = kept_of(height * width, density, kept)
        batches.append(Batch(tuple(parts), height, width, kept_here, transformed, published))
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
        self, batches: Sequence[Batch], dense: int, codec: str, dtype: torch.dtype, shares: int = 1,
        packing: Packing | None = None,
    ) -> None:  # fmt: skip
        self.batches, self.dense, self.codec, self.dtype, self.shares = batches, dense, codec, dtype, shares
        self.packing = packing or Packing()
        self.dense_dtype = dtype if codec == "fp32" else torch.bfloat16

    def span(self, total: int, share: int) -> slice:
        """The share's part of `total` things."""
        return slice(total * share // self.shares, total * (share + 1) // self.shares)

    def codecs(self, share: int) -> list[ChunkCodec]:
        """One for each batch."""
        lengths = [_length(self.span(batch.chunks, share)) for batch in self.batches]
        return [
            ChunkCodec(n, b.elements, b.kept, self.codec, self.dtype, packing=self.packing)
            for n, b in zip(lengths, self.batches, strict=True)
        ]

    def num_bytes(self, share: int) -> int:
        """Of one share's packet."""
        return self._num_bytes[share]

    @functools.cached_property
    def _num_bytes(self) -> list[int]:
        dense = [_length(self.span(self.dense, s)) * self.dense_dtype.itemsize for s in range(self.shares)]
        return [sum(codec.num_bytes for codec in self.codecs(s)) + dense[s] for s in range(self.shares)]

    def write(self, share: int, sent: Sequence[Quantised], dense: Tensor) -> Tensor:
        """The packet of one share (uint8). sent, for each batch, and dense: of this share alone."""
        parts = [codec.pack(*own) for codec, own in zip(self.codecs(share), sent, strict=True)]
        return torch.cat([*parts, dense.to(self.dense_dtype).view(torch.uint8)])

    def read(self, share: int, packet: Tensor) -> tuple[list[Chosen], Tensor]:
        """What receivers make of packets of one share `[..., bytes]`: for each batch `[..., chunks, kept]`, dense."""
        codecs = self.codecs(share)
        sizes = [codec.num_bytes for codec in codecs]
        packet = packet[..., : self.num_bytes(share)]
        *parts, dense = packet.split([*sizes, self.num_bytes(share) - sum(sizes)], dim=-1)
        chosen = [codec.decode(part) for codec, part in zip(codecs, parts, strict=True)]
        return chosen, as_numbers(dense, self.dense_dtype).to(self.dtype)

    def write_all(self, sent: Sequence[Quantised], dense: Tensor) -> list[Tensor]:
        """The packets of all shares, of whole batches. Shares of one size are packed together, so that the number of
        tensors that is made does not grow with the shares."""
        packets: list[Tensor] = [dense] * self.shares
        for shares in self._alike:
            parts = [tuple(None if t is None else self._cut(t, shares) for t in whole) for whole in sent]
            codecs = self.codecs(shares[0])
            packed = [codec.pack(*own) for codec, own in zip(codecs, parts, strict=True)]
            own = self._cut(dense.to(self.dense_dtype), shares).view(torch.uint8)
            for share, packet in zip(shares, torch.cat([*packed, own], -1)):
                packets[share] = packet
        return packets

    def read_all(self, packets: Tensor) -> tuple[list[Chosen], Tensor]:
        """The inverse, of `[shares, bytes]`: for each batch `[1, chunks, kept]`, and dense."""
        shares_of, found = [], []
        for shares in self._alike:
            # indexed by a list the host would wait for the device
            alike = torch.stack([packets[share] for share in shares])
            chosen, dense = self.read(shares[0], alike)
            shares_of += shares
            found += zip(*(own for pair in chosen for own in pair), dense, strict=True)
        order = sorted(range(self.shares), key=shares_of.__getitem__)
        *batches, dense = (torch.cat(own) for own in zip(*(found[i] for i in order), strict=True))
        return [(i.unsqueeze(0), v.unsqueeze(0)) for i, v in zip(batches[::2], batches[1::2])], dense

    def _cut(self, whole: Tensor, shares: Sequence[int]) -> Tensor:
        """`[shares, length, ...]` of a whole `[n, ...]`: the parts of shares that have equally many."""
        if self.shares == 1:
            return whole.unsqueeze(0)
        return torch.stack([whole[self.span(len(whole), share)] for share in shares])

    @functools.cached_property
    def _alike(self) -> list[list[int]]:
        """The shares, those of one size together."""
        found: dict[tuple[int, ...], list[int]] = {}
        for share in range(self.shares):
            totals = (*(batch.chunks for batch in self.batches), self.dense)
            found.setdefault(tuple(_length(self.span(n, share)) for n in totals), []).append(share)
        return list(found.values())


def contributors_mean(arrived: Chosen, elements: int) -> Tensor:
    """`[chunks, elements]`: at each index the mean over who sent it (arXiv 2411.19870), in their order."""
    indices, values = arrived[0].long(), arrived[1]
    total = values.new_zeros(values.shape[1], elements)
    count = torch.zeros_like(total, dtype=torch.int16)
    for places in indices:
        count.scatter_add_(1, places, torch.ones_like(places, dtype=torch.int16))
    for places, own in zip(indices, values, strict=True):
        total.scatter_add_(1, places, own / count.gather(1, places))
    return total


def replicas_mean(arrived: Chosen, elements: int) -> Tensor:
    """`[chunks, elements]`: the sum over the replicas, in their order, over their number."""
    indices, values = arrived[0].long(), arrived[1]
    total = values.new_zeros(values.shape[1], elements)
    for places, own in zip(indices, values, strict=True):
        total.scatter_add_(1, places, own)
    return total / len(values) if len(values) > 1 else total


def _length(span: slice) -> int:
    return span.stop - span.start
