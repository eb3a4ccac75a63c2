"""What of a chunk travels: the indices of its largest values packed to the bit, and the values in one of three forms.

    fp32   indices + values as they are (8 bytes each in a float64 run)
    int8   indices + signed bytes + one bf16 scale for each chunk
    sign   indices + one bit + one bf16 scale, the mean magnitude, for each chunk

The scale is bf16, not fp16: the momentum holds the learning rate inside, and 1e-7 is no fp16.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stepline.comm.chunking import index_bits, packet_bytes


def pack_bits(numbers: Tensor, bits: int) -> Tensor:
    """Non-negative integers `[n]` below 2^bits as ceil(n / 8) * bits bytes: eight numbers to `bits` bytes,
    the first in the lowest bits. bits: 1 to 24."""
    whole = torch.zeros(-(-numbers.numel() // 8) * 8, dtype=torch.int32, device=numbers.device)
    whole[: numbers.numel()] = numbers
    eights = whole.view(-1, 8)
    packed = torch.zeros(len(eights), bits, dtype=torch.uint8, device=numbers.device)
    for byte, parts in enumerate(_overlaps(bits)):
        for number, shift in parts:
            column = eights[:, number]
            column = column << shift if shift >= 0 else column >> -shift
            packed[:, byte] |= (column & 255).to(torch.uint8)
    return packed.view(-1)


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The `count` numbers of each row of `pack_bits`, int64 `[..., count]` of `[..., bytes]`."""
    lead = packed.shape[:-1]
    rows = packed.reshape(-1, bits).to(torch.int32)
    eights = torch.zeros(len(rows), 8, dtype=torch.int32, device=packed.device)
    for byte, parts in enumerate(_overlaps(bits)):
        for number, shift in parts:
            column = rows[:, byte]
            eights[:, number] |= column >> shift if shift >= 0 else column << -shift
    return (eights & ((1 << bits) - 1)).view(*lead, -1)[..., :count].long()


def _overlaps(bits: int) -> list[list[tuple[int, int]]]:
    """For each of the `bits` bytes that hold eight numbers: (number, by how much it is shifted left) of each in it."""
    return [
        [(i, bits * i - 8 * byte) for i in range(8) if bits * i < 8 * byte + 8 and bits * (i + 1) > 8 * byte]
        for byte in range(bits)
    ]


@dataclass(frozen=True)
class Packing:
    """How numbers are packed to the bit and unpacked."""

    pack: Callable[[Tensor, int], Tensor] = pack_bits
    unpack: Callable[[Tensor, int, int], Tensor] = unpack_bits


@dataclass(frozen=True)
class ChunkCodec:
    """The packet of `chunks` chunks of `elements` values each, of which `kept` travel; its size depends on nothing
    else, so that all replicas know it."""

    chunks: int
    elements: int
    kept: int
    codec: str
    dtype: torch.dtype
    """Of the values before they are encoded."""
    indexed: bool = True
    """False where all replicas know the indices."""
    packing: Packing = Packing()

    @property
    def bits(self) -> int:
        """Bits of an index."""
        return index_bits(self.elements) if self.indexed else 0

    @property
    def _sizes(self) -> tuple[int, int, int]:
        """Bytes of indices, values, scales."""
        return packet_bytes(self.chunks, self.kept, self.bits, self.codec, self.dtype.itemsize)

    @property
    def num_bytes(self) -> int:
        """Bytes of one packet."""
        return sum(self._sizes)

    def encode(self, indices: Tensor | None, values: Tensor) -> tuple[Tensor, Tensor]:
        """The packet (uint8 `[num_bytes]`), and the values that its receivers decode.

        indices: int64 `[chunks, kept]`, None where not indexed; values: `[chunks, kept]`.
        """
        numbers, scale = quantise(values, self.codec)
        return self.pack(indices, numbers, scale), dequantise(numbers, scale, values.dtype)

    def decode(self, packet: Tensor) -> tuple[Tensor | None, Tensor]:
        """(indices, values), each `[..., chunks, kept]`, of packets `[..., num_bytes]`."""
        indices, numbers, scale = self.unpack(packet)
        return indices, dequantise(numbers, scale, self.dtype)

    def pack(self, indices: Tensor | None, numbers: Tensor, scale: Tensor | None) -> Tensor:
        """The packets `[..., num_bytes]` of what `quantise` made, `[..., chunks, kept]` and scales `[..., chunks]`."""
        parts = [self._bits(indices, self.bits)] if self.indexed else []
        if self.codec == "sign":
            parts.append(self._bits(numbers, 1))
        else:
            parts.append(numbers.flatten(-2).contiguous().view(torch.uint8))
        return torch.cat(parts if scale is None else [*parts, scale.contiguous().view(torch.uint8)], -1)

    def _bits(self, numbers: Tensor, bits: int) -> Tensor:
        """`[..., chunks, kept]` to `[..., bytes]`: of each packet by itself, which begins with a byte."""
        flat = numbers.flatten(-2)
        missing = -flat.shape[-1] % 8
        if missing and flat.ndim > 1:
            flat = torch.nn.functional.pad(flat, (0, missing))
        num_bytes = -(-flat.shape[-1] // 8) * bits
        return self.packing.pack(flat.reshape(-1), bits).view(*flat.shape[:-1], num_bytes)

    def unpack(self, packet: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """(indices, numbers, scale) of packets `[..., num_bytes]`."""
        indices, numbers, scale = packet.split(list(self._sizes), dim=-1)
        shape, count = (*packet.shape[:-1], self.chunks, self.kept), self.chunks * self.kept
        found = self.packing.unpack(indices, self.bits, count).view(shape) if self.indexed else None
        if self.codec == "fp32":
            return found, as_numbers(numbers, self.dtype).view(shape), None
        if self.codec == "int8":
            numbers = as_numbers(numbers, torch.int8)
        else:
            numbers = self.packing.unpack(numbers, 1, count).to(torch.uint8)
        return found, numbers.view(shape), as_numbers(scale, torch.bfloat16)


def quantise(values: Tensor, codec: str) -> tuple[Tensor, Tensor | None]:
    """(numbers, scales) that travel for values `[chunks, kept]`: themselves, int8 steps, or uint8, 1 where negative."""
    if codec == "fp32":
        return values, None
    if codec == "int8":
        scale = values.abs().amax(dim=1).div(127).bfloat16()
        wide = scale.to(values.dtype).unsqueeze(1)
        steps = torch.where(wide > 0, values / wide, 0).round_().clamp_(-127, 127)
        return steps.to(torch.int8), scale
    return (values < 0).to(torch.uint8), values.abs().mean(dim=1).bfloat16()


def dequantise(numbers: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What receivers make of `quantise`'s numbers `[..., chunks, kept]`."""
    if scale is None:
        return numbers
    wide = scale.to(dtype).unsqueeze(-1)
    return numbers.to(dtype) * wide if numbers.dtype == torch.int8 else torch.where(numbers > 0, -wide, wide)


def as_numbers(data: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes `[..., n]` from anywhere in packets as numbers; a copy, because a view must be aligned."""
    flat = data.clone(memory_format=torch.contiguous_format).view(-1)
    return flat.view(dtype).view(*data.shape[:-1], -1)
