"""Triton kernels of DeMo's chunks (arXiv 2411.19870): every value is read once and written once.

    encode   chunk -> DCT -> the largest -> quantised; what their receivers decode leaves the chunk in place
    decode   values of all replicas -> their mean -> inverse DCT -> applied to the parameter in place

They say what comm/chunks.py and comm/codec.py say in torch, up to the order of fp32 sums, and cut chunks straight out
of the parameter's tensor. Written for CUDA, NOT YET RUN ON A GPU; TRITON_INTERPRET=1 runs them on CPUs for the tests.

Equal magnitudes: the lower index is taken, so that exactly `kept` are.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepline.kernels.triton_bits import pack_bits, unpack_bits

__all__ = ["decode", "encode", "pack_bits", "supports", "unpack_bits"]

LARGEST_SIDE = 64
"""Of a chunk that is transformed."""
LARGEST_ROW = 4096
"""Of one that is not."""
VALUES_PER_WARP = 512
PROGRAMS_PER_PROCESSOR = 16
"""Of decode, each with a place of its own in memory where it adds up; together they should fit the L2 cache."""
VARYING = ["first", "stride", "count", "replicas", "down", "across"]
"""Arguments of which no value has a kernel compiled for itself: each takes seconds."""


@triton.jit
def _places(
    chunk, rows, cols, down, across, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """Of chunk number `chunk` (comm/chunking.py), each `[HIGH, WIDE]`: offsets into the tensor, what of it is
    there, what belongs to the chunk, and the index in it."""
    i = tl.arange(0, HIGH)[:, None]
    j = tl.arange(0, WIDE)[None, :]
    row = chunk // across % down * HEIGHT + i
    col = chunk % across * WIDTH + j
    inside = (i < HEIGHT) & (j < WIDTH)
    offsets = (chunk // (across * down) * rows + row) * cols + col
    return offsets, inside & (row < rows) & (col < cols), inside, i * WIDTH + j


@triton.jit
def _basis(pointer, SIZE: tl.constexpr, PADDED: tl.constexpr):
    n = tl.arange(0, PADDED)[:, None]
    k = tl.arange(0, PADDED)[None, :]
    return tl.load(pointer + n * SIZE + k, mask=(n < SIZE) & (k < SIZE), other=0.0)


@triton.jit
def _dct(x, down, across):
    return tl.dot(tl.trans(down), tl.dot(x, across, input_precision="ieee"), input_precision="ieee")


@triton.jit
def _inverse_dct(y, down, across):
    return tl.dot(down, tl.dot(y, tl.trans(across), input_precision="ieee"), input_precision="ieee")


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _chosen(y, inside, KEPT: tl.constexpr):
    """(whether a value is among the KEPT largest magnitudes, the number of chosen ones before it), exactly.

    Magnitudes are ordered as their bit patterns are: the threshold is found bit by bit, until KEPT reach it.
    """
    size = tl.where(inside, _bits(y) & 0x7FFFFFFF, -1)
    least = tl.full((), 0, tl.int32)
    held = tl.sum(inside.to(tl.int32))
    bit = tl.full((), 1 << 30, tl.int32)
    while (bit > 0) & (held != KEPT):
        trial = least | bit
        reach = tl.sum((size >= trial).to(tl.int32))
        least = tl.where(reach >= KEPT, trial, least)
        held = tl.where(reach >= KEPT, reach, held)
        bit = bit >> 1
    above = (size > least).to(tl.int32)
    equal = (size == least).to(tl.int32)
    missing = KEPT - tl.sum(above)
    both = above | (equal << 16)  # two counts below 2^16 in one prefix sum, in the order of the indices
    in_row = tl.cumsum(both, axis=1)
    of_row = tl.sum(both, axis=1)
    before = in_row - both + (tl.cumsum(of_row, axis=0) - of_row)[:, None]
    equals = before >> 16
    taken = (above == 1) | ((equal == 1) & (equals < missing))
    return taken, (before & 0xFFFF) + tl.minimum(equals, missing)


@triton.jit
def _to_bf16(x):
    """(its bits, itself as fp32) of the bf16 next to a number that is not negative, ties to even."""
    bits = _bits(x)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return bits, (bits << 16).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=VARYING)
def _encode_kernel(
    x_ptr, down_ptr, across_ptr, indices_ptr, numbers_ptr, scale_ptr, first, rows, cols, down, across, alpha,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr, KEPT: tl.constexpr,
    CODEC: tl.constexpr, TRANSFORMED: tl.constexpr,
):  # fmt: skip
    """One chunk: `x -= alpha * what is sent`, and what is sent, in the order of the indices, from chunk `first` on."""
    chunk = tl.program_id(0).to(tl.int64)
    offsets, there, inside, index = _places(chunk, rows, cols, down, across, HEIGHT, WIDTH, HIGH, WIDE)
    x = tl.load(x_ptr + offsets, mask=there, other=0.0)
    if TRANSFORMED:
        basis_down, basis_across = _basis(down_ptr, HEIGHT, HIGH), _basis(across_ptr, WIDTH, WIDE)
        y = _dct(x, basis_down, basis_across)
    else:
        y = x
    taken, place = _chosen(y, inside, KEPT)
    chunk += first
    out = chunk * KEPT + place
    tl.store(indices_ptr + out, index, mask=taken)
    if CODEC == "fp32":
        tl.store(numbers_ptr + out, y, mask=taken)
        sent = y
    elif CODEC == "int8":
        largest = tl.max(tl.max(tl.where(taken, tl.abs(y), 0.0), axis=1), axis=0)
        bits, scale = _to_bf16(tl.div_rn(largest, 127.0))
        steps = tl.div_rn(y, tl.where(scale > 0, scale, 1.0))
        steps = (steps + 12582912.0) - 12582912.0  # 1.5 * 2^23: rounds to whole numbers, ties to even
        steps = tl.where(scale > 0, tl.minimum(tl.maximum(steps, -127.0), 127.0), 0.0)
        tl.store(numbers_ptr + out, steps.to(tl.int8), mask=taken)
        tl.store(scale_ptr + chunk, bits.to(tl.int16))
        sent = steps * scale
    else:
        total = tl.sum(tl.sum(tl.where(taken, tl.abs(y), 0.0), axis=1), axis=0)
        bits, scale = _to_bf16(tl.div_rn(total, 1.0 * KEPT))
        tl.store(numbers_ptr + out, (y < 0).to(tl.uint8), mask=taken)
        tl.store(scale_ptr + chunk, bits.to(tl.int16))
        sent = tl.where(y < 0, -scale, scale)
    sent = tl.where(taken, sent, 0.0)
    if TRANSFORMED:
        sent = _inverse_dct(sent, basis_down, basis_across)
    tl.store(x_ptr + offsets, x - alpha * sent, mask=there)


@triton.jit(do_not_specialize=VARYING)
def _decode_kernel(
    out_ptr, down_ptr, across_ptr, indices_ptr, values_ptr, sums_ptr, first, stride, count, replicas, rows, cols,
    down, across, decay, gain, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr,
    KEPT: tl.constexpr, KEPT_2: tl.constexpr, TRANSFORMED: tl.constexpr, PUBLISHED: tl.constexpr, SIGN: tl.constexpr,
    STORE: tl.constexpr,
):  # fmt: skip
    """`out <- decay out + gain f(mean)` (STORE: the mean) of the chunks `first` to `first + count` of `[replicas,
    stride, KEPT]` indices and values; f: the sign where SIGN.

    A program adds up in memory of its own, replica by replica, so that every order of sums is fixed.
    """
    size: tl.constexpr = HEIGHT * WIDTH
    program, stride = tl.program_id(0).to(tl.int64), stride.to(tl.int64)
    sums = sums_ptr + program * (2 * size if PUBLISHED else size)
    counts = sums + size
    k = tl.arange(0, KEPT_2)
    if TRANSFORMED:
        basis_down, basis_across = _basis(down_ptr, HEIGHT, HIGH), _basis(across_ptr, WIDTH, WIDE)
    for step in range(0, count - tl.program_id(0), tl.num_programs(0)):
        chunk = program + step
        offsets, there, inside, index = _places(chunk, rows, cols, down, across, HEIGHT, WIDTH, HIGH, WIDE)
        tl.store(sums + index, tl.zeros((HIGH, WIDE), tl.float32), mask=inside)
        if PUBLISHED:
            tl.store(counts + index, tl.zeros((HIGH, WIDE), tl.float32), mask=inside)
        tl.debug_barrier()
        if PUBLISHED:
            for replica in range(replicas):
                here = ((first + chunk) + replica * stride) * KEPT + k
                places = tl.load(indices_ptr + here, mask=k < KEPT, other=0)
                seen = tl.load(counts + places, mask=k < KEPT, other=0.0)
                tl.store(counts + places, seen + 1.0, mask=k < KEPT)
                tl.debug_barrier()
        for replica in range(replicas):
            here = ((first + chunk) + replica * stride) * KEPT + k
            places = tl.load(indices_ptr + here, mask=k < KEPT, other=0)
            values = tl.load(values_ptr + here, mask=k < KEPT, other=0.0)
            if PUBLISHED:
                values = tl.div_rn(values, tl.load(counts + places, mask=k < KEPT, other=1.0))
            before = tl.load(sums + places, mask=k < KEPT, other=0.0)
            tl.store(sums + places, before + values, mask=k < KEPT)
            tl.debug_barrier()
        update = tl.load(sums + index, mask=inside, other=0.0)
        tl.debug_barrier()  # before the next chunk's zeros
        if not PUBLISHED:
            update = tl.div_rn(update, 1.0 * replicas)
        if TRANSFORMED:
            update = _inverse_dct(update, basis_down, basis_across)
        if SIGN:
            update = tl.where(update > 0, 1.0, tl.where(update < 0, -1.0, 0.0))
        if not STORE:
            old = tl.load(out_ptr + offsets, mask=there, other=0.0)
            update = tl.fma(gain, update, decay * old)  # rounded as torch does: what was saved lands the same
        tl.store(out_ptr + offsets, update, mask=there)


def supports(height: int, width: int, transformed: bool, dtype: torch.dtype) -> bool:
    """Whether chunks `[height, width]` of `dtype` can take this path."""
    fits = max(height, width) <= LARGEST_SIDE if transformed else height == 1 and width <= LARGEST_ROW
    return fits and dtype == torch.float32


def encode(
    x: Tensor, chunk: tuple[int, int], span: slice, sent: tuple[Tensor, Tensor, Tensor | None], codec: str,
    bases: tuple[Tensor, Tensor] | None, alpha: float = 1.0,
) -> None:  # fmt: skip
    """Takes the largest values of each chunk out of `x` and writes them into `sent`.

    x: `[leading, rows, cols]`, contiguous, cut into chunks of (height, width) as comm/dct.py does; changed in place.
    span: its chunks among those of `sent`, indices (int32) and numbers (fp32; int8 steps; uint8, 1 where negative)
    `[chunks, kept]`, and with a codec other than fp32 scales (bf16 `[chunks]`). bases: DCT matrices of height and
    width, None: as it is.
    """
    (height, width), (indices, numbers, scale) = chunk, sent
    _, rows, cols = x.shape
    high, wide, warps = _padded(height, width, bases is not None)
    down, across = bases or (x, x)
    scales = numbers if scale is None else scale.view(torch.int16)
    with torch.cuda.device_of(x):
        _encode_kernel[(span.stop - span.start,)](
            x, down, across, indices, numbers, scales, span.start, rows, cols, triton.cdiv(rows, height),
            triton.cdiv(cols, width), alpha, HEIGHT=height, WIDTH=width, HIGH=high, WIDE=wide,
            KEPT=indices.shape[1], CODEC=codec, TRANSFORMED=bases is not None, num_warps=warps,
        )  # fmt: skip


def decode(
    out: Tensor, chunk: tuple[int, int], span: slice, arrived: tuple[Tensor, Tensor],
    bases: tuple[Tensor, Tensor] | None, *, published: bool, decay: float = 0.0, gain: float = 1.0, sign: bool = False,
    store: bool = False,
) -> None:  # fmt: skip
    """`out <- decay out + gain f(mean of what arrived)`, f the sign or nothing; `store`: out <- the mean alone.

    out: `[leading, rows, cols]`, contiguous; span: its chunks among those of `arrived`, indices (int32) and values
    `[replicas, chunks, kept]`. published: an index's mean is over those who sent it, otherwise over all replicas.
    """
    (height, width), (indices, values) = chunk, arrived
    _, rows, cols = out.shape
    high, wide, warps = _padded(height, width, bases is not None)
    count = span.stop - span.start
    programs = min(count, _programs(out.device))
    sums = out.new_empty(programs, 2 if published else 1, height * width)
    down, across = bases or (out, out)
    with torch.cuda.device_of(out):
        _decode_kernel[(programs,)](
            out, down, across, indices, values, sums, span.start, indices.shape[1], count, len(indices), rows, cols,
            triton.cdiv(rows, height), triton.cdiv(cols, width), decay, gain, HEIGHT=height, WIDTH=width, HIGH=high,
            WIDE=wide, KEPT=indices.shape[2], KEPT_2=triton.next_power_of_2(indices.shape[2]),
            TRANSFORMED=bases is not None, PUBLISHED=published, SIGN=sign, STORE=store, num_warps=warps,
        )  # fmt: skip


def _padded(height: int, width: int, transformed: bool) -> tuple[int, int, int]:
    """(height, width) as powers of two, of at least 16 where they are multiplied, and warps of a program."""
    least = 16 if transformed else 1
    high, wide = max(least, triton.next_power_of_2(height)), max(least, triton.next_power_of_2(width))
    return high, wide, max(1, high * wide // VALUES_PER_WARP)


def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 3  # of the tests
    return torch.cuda.get_device_properties(device).multi_processor_count * PROGRAMS_PER_PROCESSOR
