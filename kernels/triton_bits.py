"""Triton kernels that pack numbers to the bit and back, as comm/codec.py does in torch: eight numbers to `bits` bytes,
the first in the lowest bits.

Written for CUDA, NOT YET RUN ON A GPU; TRITON_INTERPRET=1 runs them on CPUs for the tests.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Numbers or bytes of a program."""


@triton.jit
def _pack_kernel(numbers_ptr, packed_ptr, count, size, BITS: tl.constexpr, SIZE: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    first = byte * 8 // BITS
    value = tl.zeros((SIZE,), tl.int32)
    for other in tl.static_range((2 * BITS + 6) // BITS):  # as many numbers as may have a bit in a byte
        number = first + other
        held = tl.load(numbers_ptr + number, mask=number < count, other=0).to(tl.int32)
        shift = (number * BITS - byte * 8).to(tl.int32)
        value |= (
            tl.where(shift < 0, held >> tl.maximum(-shift, 0), held << tl.minimum(tl.maximum(shift, 0), 8))
            & 255
        )
    tl.store(packed_ptr + byte, value.to(tl.uint8), mask=byte < size)


@triton.jit
def _unpack_kernel(packed_ptr, numbers_ptr, count, size, stride, BITS: tl.constexpr, SIZE: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    number = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    byte = number * BITS // 8
    value = tl.zeros((SIZE,), tl.int32)
    for other in tl.static_range((BITS + 14) // 8):  # as many bytes as may hold a bit of a number
        there = (number < count) & (byte + other < size)
        held = tl.load(packed_ptr + row * stride + byte + other, mask=there, other=0).to(tl.int32)
        value |= held << (8 * other)
    value = (value >> (number * BITS % 8).to(tl.int32)) & ((1 << BITS) - 1)
    tl.store(numbers_ptr + row * count + number, value, mask=number < count)


def pack_bits(numbers: Tensor, bits: int) -> Tensor:
    """As comm/codec.py: contiguous `[n]` to uint8 `[ceil(n / 8) * bits]`."""
    size = triton.cdiv(numbers.numel(), 8) * bits
    packed = torch.empty(size, dtype=torch.uint8, device=numbers.device)
    if size:
        with torch.cuda.device_of(numbers):
            _pack_kernel[(triton.cdiv(size, BLOCK),)](
                numbers, packed, numbers.numel(), size, BITS=bits, SIZE=BLOCK
            )
    return packed


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """As comm/codec.py: uint8 `[..., bytes]`, of which rows may lie apart, to int32 `[..., count]`."""
    rows = packed.unsqueeze(0) if packed.ndim == 1 else packed
    numbers = torch.empty(len(rows), count, dtype=torch.int32, device=packed.device)
    if count:
        grid = (triton.cdiv(count, BLOCK), len(rows))
        with torch.cuda.device_of(packed):
            _unpack_kernel[grid](rows, numbers, count, rows.shape[1], rows.stride(0), BITS=bits, SIZE=BLOCK)
    return numbers.view(*packed.shape[:-1], count)
