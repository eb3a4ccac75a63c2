"""What of a chunk travels: the indices of its largest values packed to the bit, and the values in one of three forms.

    fp32   indices + values as they are (8 bytes each in a float64 run)
    int8   indices + signed bytes + one bf16 scale for each chunk
    sign   indices + one bit + one bf16 scale, the mean magnitude, for each chunk

The scale is bf16, not fp16: the momentum holds the learning rate inside, and 1e-7 is no fp16.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


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
    """The `count` numbers of `pack_bits`, int64."""
    rows = packed.view(-1, bits).to(torch.int32)
    eights = torch.zeros(len(rows), 8, dtype=torch.int32, device=packed.device)
    for byte, parts in enumerate(_overlaps(bits)):
        for number, shift in parts:
            column = rows[:, byte]
            eights[:, number] |= column >> shift if shift >= 0 else column << -shift
    return (eights & ((1 << bits) - 1)).view(-1)[:count].long()


def _overlaps(bits: int) -> list[list[tuple[int, int]]]:
    """For each of the `bits` bytes that hold eight numbers: (number, by how much it is shifted left) of each in it."""
    return [
        [(i, bits * i - 8 * byte) for i in range(8) if bits * i < 8 * byte + 8 and bits * (i + 1) > 8 * byte]
        for byte in range(bits)
    ]


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of `pack_bits`."""
    return -(-count // 8) * bits


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

    @property
    def bits(self) -> int:
        """Bits of an index."""
        return max(1, (self.elements - 1).bit_length()) if self.indexed else 0

    @property
    def _sizes(self) -> tuple[int, int, int]:
        """Bytes of indices, values, scales."""
        count = self.chunks * self.kept
        values = {
            "fp32": count * self.dtype.itemsize,
            "int8": count,
            "sign": packed_bytes(count, 1),
        }[self.codec]
        return packed_bytes(count, self.bits), values, 0 if self.codec == "fp32" else 2 * self.chunks

    @property
    def num_bytes(self) -> int:
        """Bytes of one packet."""
        return sum(self._sizes)

    def encode(self, indices: Tensor | None, values: Tensor) -> tuple[Tensor, Tensor]:
        """The packet (uint8 `[num_bytes]`), and the values that its receivers decode.

        indices: int64 `[chunks, kept]`, None where not indexed; values: `[chunks, kept]`.
        """
        parts = [pack_bits(indices.reshape(-1), self.bits)] if self.indexed else []
        if self.codec == "fp32":
            parts.append(values.reshape(-1).contiguous().view(torch.uint8))
            return torch.cat(parts), values
        if self.codec == "int8":
            scale = values.abs().amax(dim=1).div(127).bfloat16()
            wide = scale.to(values.dtype).unsqueeze(1)
            steps = torch.where(wide > 0, values / wide, 0).round_().clamp_(-127, 127)
            parts.append(steps.to(torch.int8).reshape(-1).view(torch.uint8))
            sent = steps * wide
        else:
            scale = values.abs().mean(dim=1).bfloat16()
            negative = values < 0
            parts.append(pack_bits(negative.reshape(-1).to(torch.int32), 1))
            wide = scale.to(values.dtype).unsqueeze(1)
            sent = torch.where(negative, -wide, wide)
        parts.append(scale.view(torch.uint8))
        return torch.cat(parts), sent

    def decode(self, packet: Tensor) -> tuple[Tensor | None, Tensor]:
        """(indices, values), each `[chunks, kept]`, of a packet."""
        indices, values, scales = packet.split(list(self._sizes))
        shape, count = (self.chunks, self.kept), self.chunks * self.kept
        found = unpack_bits(indices, self.bits, count).view(shape) if self.indexed else None
        if self.codec == "fp32":
            return found, _view(values, self.dtype).view(shape)
        wide = _view(scales, torch.bfloat16).to(self.dtype).unsqueeze(1)
        if self.codec == "int8":
            return found, values.view(torch.int8).view(shape).to(self.dtype) * wide
        negative = unpack_bits(values, 1, count).view(shape) > 0
        return found, torch.where(negative, -wide, wide)


def _view(data: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes from anywhere in a packet as numbers; a copy, because a view must be aligned."""
    return data.clone().view(dtype)
