"""Triton kernels of S-STE: threshold and cast of weights, estimator and cast of gradients, packed or not.

Bit for bit what kernels/sparse24.py and kernels/fp8.py say. They read their operand once and write 8 bits for each
value: threshold and amax, then threshold and cast; the estimator's largest value is known beforehand (at most 2 amax),
so it needs one pass. Written for CUDA; TRITON_INTERPRET=1 runs them on CPUs for the tests.

GPUs round to a narrower type, ties to even, and saturate in one instruction. The interpreter does neither right: there
(`EMULATED`) numbers are rounded in fp32 first, after which its conversion is exact. Products and sums of the estimator
are not fused (enable_fp_fusion), as the reference's are not.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Values of a program of the thresholds."""
TILE_GROUPS, TILE_COLS = 32, 32
"""Groups of tokens and columns of a program of the estimator."""
KINDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16} | {
    torch.float8_e4m3fn: tl.float8e4nv,
    torch.float8_e5m2: tl.float8e5,
}
EMULATED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _rounded(x, KIND: tl.constexpr):
    """fp32 numbers that `KIND` has, next to `x`, ties to even; overflow is not looked at. In the interpreter alone."""
    exact = KIND.fp_mantissa_width
    bits = x.to(tl.int32, bitcast=True)
    exponent = tl.maximum(bits & 0x7F800000, (128 - KIND.exponent_bias) << 23)
    # 2^(e + 23 - exact): whoever adds it loses what lies below the last bit
    large = (exponent + ((23 - exact) << 23)).to(tl.float32, bitcast=True)
    size = ((tl.abs(x) + large) - large).to(tl.int32, bitcast=True)
    done = (size | (bits & -2147483648)).to(tl.float32, bitcast=True)
    return tl.where(x == x, done, x)


@triton.jit
def _narrow(x, KIND: tl.constexpr):
    """fp32 numbers that `KIND` has, next to `x`."""
    if tl.float32 == KIND:
        return x
    elif EMULATED:
        return _rounded(x, KIND)
    else:
        return x.to(KIND).to(tl.float32)


@triton.jit
def _to_8_bits(x, scale, KIND: tl.constexpr):
    """x / scale in an 8-bit type, clipped; NaN stays."""
    q = x * tl.div_rn(1.0, scale)
    if EMULATED:
        largest = 448.0 if tl.float8e4nv == KIND else 57344.0
        q = tl.where(q > largest, largest, tl.where(q < -largest, -largest, q))
        q = _rounded(q, KIND)
    return q.to(KIND)


@triton.jit
def _soft(x, t, KIND: tl.constexpr):
    size = _narrow(tl.abs(x) - t, KIND)
    return tl.where(size > 0, tl.where(x < 0, -size, size), 0.0)


@triton.jit
def _groups(pointer, offsets, mask, KIND: tl.constexpr, SIZE: tl.constexpr, SOFT: tl.constexpr):
    """The four members `[SIZE / 4]` of each group of S(x) (or of x), x read and rounded to the type of computing."""
    x = _narrow(tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32), KIND)
    even, odd = tl.split(tl.reshape(x, (SIZE // 4, 2, 2)))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    if SOFT:
        p, q, r, s = tl.abs(a), tl.abs(b), tl.abs(c), tl.abs(d)
        low = tl.maximum(tl.minimum(p, q), tl.minimum(r, s))
        high = tl.minimum(tl.maximum(p, q), tl.maximum(r, s))
        t = tl.minimum(low, high)
        a, b, c, d = _soft(a, t, KIND), _soft(b, t, KIND), _soft(c, t, KIND), _soft(d, t, KIND)
    return a, b, c, d


@triton.jit
def _packed(a, b, c, d):
    """(first value, second value, 4 bits of metadata) of groups of at most two values: those that are not zero in their
    order, filled up with the first zeros."""
    k0, k1, k2, k3 = (
        (a != 0).to(tl.int32),
        (b != 0).to(tl.int32),
        (c != 0).to(tl.int32),
        (d != 0).to(tl.int32),
    )
    missing = 2 - (k0 + k1 + k2 + k3)
    # a zero is taken while some are missing
    z0 = tl.where((k0 == 0) & (missing > 0), 1, 0)
    missing -= z0
    z1 = tl.where((k1 == 0) & (missing > 0), 1, 0)
    missing -= z1
    z2 = tl.where((k2 == 0) & (missing > 0), 1, 0)
    t0, t1, t2 = k0 + z0, k1 + z1, k2 + z2
    first = tl.where(t0 > 0, 0, tl.where(t1 > 0, 1, 2))
    second = tl.where(t0 + t1 + t2 < 2, 3, tl.where(t2 > 0, 2, 1))
    value = tl.where(first == 0, a, tl.where(first == 1, b, c))
    other = tl.where(second == 1, b, tl.where(second == 2, c, d))
    return value, other, first | (second << 2)


@triton.jit
def _amax_kernel(x_ptr, out_ptr, count, KIND: tl.constexpr, SOFT: tl.constexpr, SIZE: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)
    offsets = pid * SIZE + tl.arange(0, SIZE)
    a, b, c, d = _groups(x_ptr, offsets, offsets < count, KIND, SIZE, SOFT)
    most = tl.maximum(tl.maximum(tl.abs(a), tl.abs(b)), tl.maximum(tl.abs(c), tl.abs(d)))
    tl.store(out_ptr + pid, tl.max(most, axis=0))


@triton.jit
def _cast_kernel(
    x_ptr, scale_ptr, out_ptr, bits_ptr, count, KIND: tl.constexpr, SOFT: tl.constexpr, PACK: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    offsets = pid * SIZE + tl.arange(0, SIZE)
    a, b, c, d = _groups(x_ptr, offsets, offsets < count, KIND, SIZE, SOFT)
    scale = tl.load(scale_ptr)
    out: tl.constexpr = out_ptr.dtype.element_ty
    a, b = _to_8_bits(a, scale, out), _to_8_bits(b, scale, out)
    c, d = _to_8_bits(c, scale, out), _to_8_bits(d, scale, out)
    if PACK:
        value, other, bits = _packed(a.to(tl.float32), b.to(tl.float32), c.to(tl.float32), d.to(tl.float32))
        both = pid * (SIZE // 2) + tl.arange(0, SIZE // 2)
        pairs = tl.reshape(tl.join(value, other), (SIZE // 2,))
        tl.store(out_ptr + both, pairs.to(out), mask=both < count // 2)
        low, high = tl.split(tl.reshape(bits, (SIZE // 8, 2)))
        byte = pid * (SIZE // 8) + tl.arange(0, SIZE // 8)
        tl.store(bits_ptr + byte, (low | (high << 4)).to(tl.uint8), mask=byte < count // 8)
    else:
        x = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (SIZE,))
        tl.store(out_ptr + offsets, x, mask=offsets < count)


@triton.jit
def _kept(x, size, p, begin, end, u):
    """The value of a magnitude's sign where it is drawn."""
    drawn = ((begin <= u) & (u < end)) | ((begin <= u + 1) & (u + 1 < end))
    return tl.where(drawn & (x != 0), tl.where(x < 0, -size, size), 0.0)


@triton.jit
def _word(x):
    return x.to(tl.uint8, bitcast=True).to(tl.int32)


@triton.jit
def _estimate_kernel(
    g_ptr, scale_ptr, seed_ptr, out_ptr, bits_ptr, tokens, cols, KIND: tl.constexpr, PACK: tl.constexpr,
    GROUPS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """`[tokens, cols]` to `[cols, tokens]`, 2:4 along tokens; four values of a token's group are one word."""
    tiny: tl.constexpr = 1.1754943508222875e-38
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)[:, None]
    col = tl.program_id(1).to(tl.int64) * COLS + tl.arange(0, COLS)[None, :]
    count = tokens // 4
    there = (group < count) & (col < cols)
    start = g_ptr + group * 4 * cols + col
    a = tl.load(start, mask=there, other=0.0).to(tl.float32)
    b = tl.load(start + cols, mask=there, other=0.0).to(tl.float32)
    c = tl.load(start + 2 * cols, mask=there, other=0.0).to(tl.float32)
    d = tl.load(start + 3 * cols, mask=there, other=0.0).to(tl.float32)

    # sparse24.keep_probabilities
    p, q, r, s = tl.abs(a), tl.abs(b), tl.abs(c), tl.abs(d)
    total, most = (p + q) + (r + s), tl.maximum(tl.maximum(p, q), tl.maximum(r, s))
    half = total * 0.5  # a division would be an approximate one on the GPU
    dominated = most > half
    other_p, other_q = tl.where(p == most, 0.0, p), tl.where(q == most, 0.0, q)
    other_r, other_s = tl.where(r == most, 0.0, r), tl.where(s == most, 0.0, s)
    rest = (other_p + other_q) + (other_r + other_s)
    sum_ = tl.where(dominated, rest, total)
    rate = tl.div_rn(tl.where(dominated, 1.0, 2.0), tl.maximum(sum_, tiny))
    size = tl.where(dominated, rest, half)
    sure_a, sure_b, sure_c, sure_d = (
        dominated & (p == most), dominated & (q == most), dominated & (r == most), dominated & (s == most),
    )  # fmt: skip
    size_a, size_b = tl.where(sure_a, p, size), tl.where(sure_b, q, size)
    size_c, size_d = tl.where(sure_c, r, size), tl.where(sure_d, s, size)
    p, q = tl.where(sure_a, 1.0, p * rate), tl.where(sure_b, 1.0, q * rate)
    r, s = tl.where(sure_c, 1.0, r * rate), tl.where(sure_d, 1.0, s * rate)

    # sparse24.mvue24
    e0 = p
    e1 = e0 + q
    e2 = e1 + r
    u = tl.rand(tl.load(seed_ptr), (col * count + group).to(tl.int32))
    scale = tl.load(scale_ptr)
    a = _to_8_bits(_kept(a, size_a, p, tl.zeros_like(p), e0, u), scale, KIND)
    b = _to_8_bits(_kept(b, size_b, q, e0, e1, u), scale, KIND)
    c = _to_8_bits(_kept(c, size_c, r, e1, e2, u), scale, KIND)
    d = _to_8_bits(_kept(d, size_d, s, e2, tl.full(e2.shape, 2.0, tl.float32), u), scale, KIND)

    turned = tl.trans(there)
    place = tl.trans(col * count + group)
    if PACK:
        value, other, bits = _packed(a.to(tl.float32), b.to(tl.float32), c.to(tl.float32), d.to(tl.float32))
        pair = tl.trans(_word(value.to(KIND)) | (_word(other.to(KIND)) << 8))
        tl.store(out_ptr + place, pair.to(tl.int16), mask=turned)
        low, high = tl.split(tl.reshape(tl.trans(bits), (COLS, GROUPS // 2, 2)))
        twice = tl.program_id(0).to(tl.int64) * (GROUPS // 2) + tl.arange(0, GROUPS // 2)[None, :]
        column = tl.program_id(1).to(tl.int64) * COLS + tl.arange(0, COLS)[:, None]
        there = (twice < count // 2) & (column < cols)
        tl.store(bits_ptr + column * (count // 2) + twice, (low | (high << 4)).to(tl.uint8), mask=there)
    else:
        four = _word(a) | (_word(b) << 8) | (_word(c) << 16) | (_word(d) << 24)
        tl.store(out_ptr + place, tl.trans(four), mask=turned)


def amax(x: Tensor, compute: torch.dtype, soft: bool) -> Tensor:
    """The largest magnitude, 0-dim fp32, of S(x) (or of x), `x` contiguous `[..., n]` rounded to `compute`."""
    programs = triton.cdiv(x.numel(), BLOCK)
    most = torch.empty(programs, device=x.device, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _amax_kernel[(programs,)](x, most, x.numel(), KIND=KINDS[compute], SOFT=soft, SIZE=BLOCK)
    return most.amax()


def cast(x: Tensor, scale: Tensor, dtype: torch.dtype, compute: torch.dtype, soft: bool) -> Tensor:
    """S(x) / scale (or x / scale) in 8 bits, `x` contiguous `[..., n]` rounded to `compute`; scale: 0-dim fp32."""
    out = torch.empty_like(x, dtype=dtype)
    _run_cast(x, scale, out, out, compute, soft, False)
    return out


def cast_packed(x: Tensor, scale: Tensor, dtype: torch.dtype, compute: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `cast` with the threshold: values `[..., n / 2]` and 2-bit metadata `[..., n / 8]` (sparse24.pack_bits)."""
    values = torch.empty(*x.shape[:-1], x.shape[-1] // 2, device=x.device, dtype=dtype)
    bits = torch.empty(*x.shape[:-1], x.shape[-1] // 8, device=x.device, dtype=torch.uint8)
    _run_cast(x, scale, values, bits, compute, True, True)
    return values, bits


def _run_cast(x: Tensor, scale: Tensor, out: Tensor, bits: Tensor, compute, soft: bool, pack: bool) -> None:
    grid = (triton.cdiv(x.numel(), BLOCK),)
    with torch.cuda.device_of(x):
        _cast_kernel[grid](
            x, scale, out, bits, x.numel(), KIND=KINDS[compute], SOFT=soft, PACK=pack, SIZE=BLOCK,
            enable_fp_fusion=False,
        )  # fmt: skip


def estimate(g: Tensor, seed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """MVUE(g^T) / scale in 8 bits, `[cols, tokens]`, of contiguous `[tokens, cols]`; tokens a multiple of 4.

    seed: 0-dim int64, the key of sparse24.philox_uniform. scale: 0-dim fp32.
    """
    tokens, cols = g.shape
    out = torch.empty(cols, tokens, device=g.device, dtype=dtype)
    _run_estimate(g, seed, scale, dtype, out.view(torch.int32), out, False)
    return out


def estimate_packed(g: Tensor, seed: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `estimate`: values `[cols, tokens / 2]` and 2-bit metadata `[cols, tokens / 8]`; tokens a multiple of 8."""
    tokens, cols = g.shape
    values = torch.empty(cols, tokens // 2, device=g.device, dtype=dtype)
    bits = torch.empty(cols, tokens // 8, device=g.device, dtype=torch.uint8)
    _run_estimate(g, seed, scale, dtype, values.view(torch.int16), bits, True)
    return values, bits


def _run_estimate(g: Tensor, seed, scale, dtype, words: Tensor, bits: Tensor, pack: bool) -> None:
    tokens, cols = g.shape
    grid = (triton.cdiv(tokens // 4, TILE_GROUPS), triton.cdiv(cols, TILE_COLS))
    with torch.cuda.device_of(g):
        _estimate_kernel[grid](
            g, scale, seed, words, bits, tokens, cols, KIND=KINDS[dtype], PACK=pack, GROUPS=TILE_GROUPS, COLS=TILE_COLS,
            enable_fp_fusion=False,
        )  # fmt: skip
