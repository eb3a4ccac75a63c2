"""What the sparse layers need as torch operators, which torch.compile keeps whole: the plain references everywhere, the
Triton kernels where a GPU has FP8."""

import torch
from torch import Tensor

from stepline.kernels.fp8 import has_fp8, quantise
from stepline.kernels.sparse24 import GROUP, mvue24, philox_uniform, soft_threshold


def _source(x: Tensor, compute: torch.dtype, soft: bool) -> Tensor:
    x = x.to(compute)
    return soft_threshold(x) if soft else x


@torch.library.custom_op("stepline::weight_amax", mutates_args=())
def weight_amax(x: Tensor, compute: torch.dtype, soft: bool) -> Tensor:
    """The largest magnitude, 0-dim fp32, of S(x) where `soft`, else of x; `[..., n]`, rounded to `compute` first."""
    return _source(x, compute, soft).abs().amax().float()


@torch.library.custom_op("stepline::weight_cast", mutates_args=())
def weight_cast(x: Tensor, scale: Tensor, dtype: torch.dtype, compute: torch.dtype, soft: bool) -> Tensor:
    """S(x) / scale (or x / scale) in the 8-bit `dtype`; `[..., n]`, rounded to `compute` first. scale: 0-dim fp32."""
    return quantise(_source(x, compute, soft), scale, dtype)


@torch.library.custom_op("stepline::estimate_cast", mutates_args=())
def estimate_cast(g: Tensor, seed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """MVUE(g^T) / scale in the 8-bit `dtype`: `[tokens, cols]` to `[cols, tokens]`, 2:4 along tokens.

    seed: 0-dim int64, of philox_uniform. scale: 0-dim fp32; twice the largest magnitude of g is clipped nowhere. Tokens
    are a multiple of 4.
    """
    return quantise(estimate(g, seed), scale, dtype)


def estimate(g: Tensor, seed: Tensor) -> Tensor:
    """MVUE(g^T), `[tokens, cols]` to `[cols, tokens]` in at least fp32; arguments as above."""
    columns = g.mT.to(torch.promote_types(g.dtype, torch.float32)).contiguous()
    uniform = philox_uniform(seed, (columns.shape[0], columns.shape[1] // GROUP))
    return mvue24(columns, uniform.to(columns.dtype))


@weight_amax.register_fake
def _(x: Tensor, compute: torch.dtype, soft: bool) -> Tensor:
    return x.new_empty((), dtype=torch.float32)


@weight_cast.register_fake
def _(x: Tensor, scale: Tensor, dtype: torch.dtype, compute: torch.dtype, soft: bool) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


@estimate_cast.register_fake
def _(g: Tensor, seed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(g.shape[::-1], dtype=dtype, device=g.device)


def _by_triton(x: Tensor) -> bool:
    return has_fp8(x.device) and x.dtype != torch.float64 and bool(x.numel())


@weight_amax.register_kernel("cuda")
def _(x: Tensor, compute: torch.dtype, soft: bool) -> Tensor:
    if not _by_triton(x):
        return _source(x, compute, soft).abs().amax().float()
    from stepline.kernels import triton_ops

    return triton_ops.amax(x.contiguous(), compute, soft)


@weight_cast.register_kernel("cuda")
def _(x: Tensor, scale: Tensor, dtype: torch.dtype, compute: torch.dtype, soft: bool) -> Tensor:
    if not _by_triton(x):
        return quantise(_source(x, compute, soft), scale, dtype)
    from stepline.kernels import triton_ops

    return triton_ops.cast(x.contiguous(), scale, dtype, compute, soft)


@estimate_cast.register_kernel("cuda")
def _(g: Tensor, seed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    if not _by_triton(g):
        return quantise(estimate(g, seed), scale, dtype)
    from stepline.kernels import triton_ops

    return triton_ops.estimate(g.contiguous(), seed, scale, dtype)
