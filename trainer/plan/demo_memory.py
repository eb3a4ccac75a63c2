"""What an update by DeMo holds for a moment, from the batches that comm/demo.py makes. Imports no torch."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from stepline.trainer.plan.tensors import Shape

BATCH_ELEMENTS = 2**26
"""Of comm/packets.py, which imports torch."""
PUBLISHED_KEPT = 32
"""Of run/synchronize.py."""
SPARSE_INVERSE = 3
"""Of comm/chunks.py."""
INDEX = 8


def even_length(size: int, limit: int) -> int:
    """Of comm/dct.py."""
    return -(-size // -(-size // limit))


def largest_divisor(size: int, limit: int) -> int:
    """Of comm/dct.py."""
    return next(d for d in range(min(size, limit), 0, -1) if size % d == 0)


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


def batches(
    shapes: Iterable[Shape], limit: int, density: float, kept: int | None, item: int,
    *, transformed: bool, published: bool, divisors: bool = False,
) -> list[Batch]:  # fmt: skip
    """Of a rank's tensors of these shapes (`make_batches`); what is not transformed is cut flat, `limit` values."""
    length, by_shape = largest_divisor if divisors else even_length, {}
    for shape in shapes:
        if not (numel := math.prod(shape)):
            continue
        rows, cols = (math.prod(shape[-2:-1]), shape[-1]) if transformed else (1, numel)
        height, width = length(rows, limit), length(cols, limit if transformed else limit * limit)
        count = (numel // (rows * cols)) * -(-rows // height) * -(-cols // width)
        by_shape.setdefault((height, width), []).append(count)
    found = []
    for (height, width), counts in by_shape.items():
        size, together = height * width, [0]
        for count in counts:
            if together[-1] and (together[-1] + count) * size > BATCH_ELEMENTS:
                together.append(0)
            together[-1] += count
        k = min(size, kept or max(1, round(density * size)))
        found += [Batch(chunks, height, width, k, transformed, published, item) for chunks in together]
    return found


def packet(found: list[Batch], codec: str) -> int:
    """Bytes of a packet's chunks (comm/codec.py)."""
    size = 0
    for batch in found:
        bits = max(1, (batch.height * batch.width - 1).bit_length())
        size += batch.values * bits // 8 + _numbers(codec, batch.values, batch.item)
        size += 0 if codec == "fp32" else 2 * batch.chunks
    return size


def _numbers(codec: str, values: int, item: int) -> int:
    return {"fp32": values * item, "int8": values, "sign": values // 8}[codec]


def exchanged(found: list[Batch], codec: str, replicas: int, fused: bool, applied: int) -> int:
    """Most bytes of an update: while a batch is encoded, while packets are written or read, and while it is applied.

    fused: by CUDA's kernels, which address the chunks in the parameters. applied: beside what has arrived.
    """
    index = 4 if fused else INDEX
    number = {"fp32": found[0].item, "int8": 1, "sign": 1}[codec]
    own, peak = packet(found, codec), 0
    sent = arrived = 0
    for batch in found:
        peak = max(peak, sent + (0 if fused else batch.encoding(number)))
        sent += batch.values * (index + number)
    peak = max(peak, sent + 2 * own)  # its parts, and the packet
    flying = (1 + replicas) * own
    for batch in found:
        values = replicas * batch.values
        # 32-bit numbers of the bytes, of the indices, and these without what is beside them, beside 64-bit ones
        bits = max(1, (batch.height * batch.width - 1).bit_length())
        unpacking = 0 if fused else values * (bits // 2 + 4 + 4)
        peak = max(peak, flying + arrived + values * index + unpacking)
        arrived += values * (index + batch.item)
    return max(peak, flying + arrived + applied)
