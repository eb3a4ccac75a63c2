"""How DeMo cuts tensors into chunks, which chunks are encoded together, and how large their packets are.

Of shapes alone, for the synchroniser and for the planner that counts by them. Imports no torch.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

BATCH_ELEMENTS = 1 << 26
"""Transformed at once: bounds the memory beside the parameters."""
SPARSE_INVERSE = 3
"""How many times fewer values than height + width make outer products cheaper than two dense ones (measured)."""
PUBLISHED_KEPT = 32
"""Values of each chunk that the published algorithm sends."""

Name = TypeVar("Name")


def largest_divisor(size: int, limit: int) -> int:
    """The largest divisor of `size` that is at most `limit`: the published chunk length."""
    return next(d for d in range(min(size, limit), 0, -1) if size % d == 0)


def even_length(size: int, limit: int) -> int:
    """The chunk length of at most `limit` that cuts `size` into the fewest chunks of one length, the last one
    padded: 257 at 64 gives 5 chunks of 52, where the largest divisor would be 1."""
    return -(-size // -(-size // limit))


@dataclass(frozen=True)
class Chunking:
    """How a tensor is cut into chunks `[height, width]`; dimensions before the last two are cut one by one."""

    shape: tuple[int, ...]
    """Of the tensor; a vector `[n]` is one row."""
    height: int
    width: int

    @classmethod
    def of(cls, shape: tuple[int, ...], limit: int, *, divisors: bool = False) -> "Chunking":
        """Chunks of at most `limit` x `limit`, padded, or of the published divisors."""
        length = largest_divisor if divisors else even_length
        rows, cols = shape[-2] if len(shape) > 1 else 1, shape[-1]
        return cls(tuple(shape), length(max(rows, 1), limit), length(max(cols, 1), limit))

    @classmethod
    def flat(cls, shape: tuple[int, ...], limit: int) -> "Chunking":
        """Chunks of at most `limit` values, for what is not transformed: of whole rows, or within one. Of a chunk, as
        many values travel whatever they are, and of a piece of a row fewer may have a gradient than travel."""
        rows, cols = math.prod(shape[:-1]), shape[-1]
        if cols > limit:
            return cls((rows, cols), 1, even_length(cols, limit))
        together = even_length(max(rows, 1), limit // max(cols, 1))
        return cls((rows * cols,), 1, together * max(cols, 1))

    @property
    def blocks(self) -> tuple[int, int, int]:
        """(leading, down, across)."""
        rows = self.shape[-2] if len(self.shape) > 1 else 1
        leading = math.prod(self.shape[:-2])
        return leading, -(-rows // self.height), -(-self.shape[-1] // self.width)

    @property
    def count(self) -> int:
        """Chunks of the tensor."""
        return math.prod(self.blocks)


def batched(chunkings: Iterable[tuple[Name, Chunking]]) -> list[list[tuple[Name, Chunking]]]:
    """Those with chunks of one shape together, in their order, up to BATCH_ELEMENTS; none that holds nothing."""
    by_shape: dict[tuple[int, int], list[list[tuple[Name, Chunking]]]] = {}
    for name, chunking in chunkings:
        if not chunking.count:
            continue
        batches = by_shape.setdefault((chunking.height, chunking.width), [[]])
        count = chunking.count + sum(member.count for _, member in batches[-1])
        if batches[-1] and count * chunking.height * chunking.width > BATCH_ELEMENTS:
            batches.append([])
        batches[-1].append((name, chunking))
    return [batch for batches in by_shape.values() for batch in batches]


def kept_of(elements: int, density: float, kept: int | None) -> int:
    """Values of a chunk that travel; kept: instead of the density."""
    return min(elements, kept or max(1, round(density * elements)))


def index_bits(elements: int) -> int:
    """Of an index into a chunk."""
    return max(1, (elements - 1).bit_length())


def packed_bytes(count: int, bits: int) -> int:
    """Of `count` numbers of `bits` bits, eight to `bits` bytes."""
    return -(-count // 8) * bits


def packet_bytes(chunks: int, kept: int, bits: int, codec: str, item: int) -> tuple[int, int, int]:
    """Bytes of indices of `bits` bits, of values and of scales (codec.py); item: of a value as it is."""
    count = chunks * kept
    values = {"fp32": count * item, "int8": count, "sign": packed_bytes(count, 1)}[codec]
    return packed_bytes(count, bits), values, 0 if codec == "fp32" else 2 * chunks
