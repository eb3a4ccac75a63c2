"""8-bit floating point with a scale for each tensor, or for each row of the first operand of a product and each column
of the second: casts, and products of cast operands.

E4M3 for what goes forward, E5M2 for gradients (arXiv 2209.05433). On CUDA (SM 89 and newer) the product is
`torch._scaled_mm`; elsewhere the same numbers are multiplied in fp32, which is the reference.

With a scale for each row, torch (2.11 to 2.13) takes cuBLAS on Hopper from cuBLAS 12.9 on, and its own CUTLASS kernels
on all other GPUs: those give bf16 alone and want E4M3 as the second operand. What both take is what is taken here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16
"""What CUDA's products want the inner and the outer widths to be multiples of."""
RESULTS = (torch.bfloat16, torch.float16, torch.float32)
ROW_RESULT = torch.bfloat16
"""The only result of products with a scale for each row."""


@dataclass(frozen=True)
class Scaled:
    """`data * scale` is the tensor."""

    data: Tensor
    """`[rows, cols]` in an 8-bit type."""
    scale: Tensor
    """fp32: 0-dim, `[rows, 1]` or `[1, cols]`."""

    @property
    def mT(self) -> "Scaled":
        """Transposed."""
        return Scaled(self.data.mT, self.scale.mT if self.scale.ndim else self.scale)

    def float(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """As numbers of `dtype`."""
        return self.data.to(dtype) * self.scale.to(dtype)


def scale_for(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale, fp32 of amax's shape, that takes `amax` to the largest number of `dtype`; 1 where amax is 0."""
    # CUDA divides by a number through its reciprocal, CPUs do not: this way both give the same bits
    scale = amax.float() * (1 / torch.finfo(dtype).max)
    return torch.where(
        scale > 0, scale.clamp_min(torch.finfo(torch.float32).tiny), 1.0
    )  # of which 1 / scale is finite


def cast(x: Tensor, dtype: torch.dtype, amax: Tensor | None = None, dim: int | None = None) -> Scaled:
    """Rounds `x` to the nearest numbers of `dtype`, ties to even; what lies beyond `amax` is clipped.

    amax: 0-dim, the largest magnitude; of `x` by default. dim: values along it share a scale, -1 gives each row its
    own, -2 each column; None: all of `x` do.
    """
    scale = scale_for(largest(x, dim) if amax is None else amax, dtype)
    return Scaled(quantise(x, scale, dtype), scale)


def largest(x: Tensor, dim: int | None = None) -> Tensor:
    """The largest magnitude of `x`, 0-dim, or those along `dim`, which stays with the size 1."""
    return x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)


def quantise(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x times 1 / scale in `dtype`, rounded to the nearest, ties to even, and clipped to its largest number.

    scale: fp32 of any shape that x's is a broadcast of.
    """
    bound, wide = torch.finfo(dtype).max, torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) * (1 / scale.to(wide))).clamp(-bound, bound).to(dtype)


def scaled_mm(a: Scaled, b: Scaled, dtype: torch.dtype, fast: bool = False) -> Tensor:
    """a b, `[m, k] x [k, n]`, summed in fp32 and rounded to `dtype` once.

    Scales are one number each, or `[m, 1]` and `[1, n]`: what is summed over, k, shares a scale. fast: on a GPU the
    tensor cores' own sums, of fewer bits than fp32, are not moved to fp32 on the way. Raises ValueError for what CUDA
    refuses.
    """
    check_product(a, b, dtype)
    if has_fp8(a.data.device):
        data = b.data.mT.contiguous().mT  # column-major
        left, right = a.scale, b.scale
        if left.ndim:  # strides of 1 along their last dimension, also where its size is 1
            left, right = left.flatten()[:, None], right.flatten()[None]
        return torch._scaled_mm(a.data.contiguous(), data, left, right, out_dtype=dtype, use_fast_accum=fast)
    wide = torch.promote_types(dtype, torch.float32)
    return as_type((a.data.to(wide) @ b.data.to(wide)) * (a.scale * b.scale).to(wide), dtype)


def as_type(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), and no operation where that is x: as the result of an autograd function it would have no gradient in
    what torch 2.11 compiles."""
    return x if x.dtype == dtype else x.to(dtype)


def check_product(a: Scaled, b: Scaled, dtype: torch.dtype) -> None:
    """Raises ValueError for what CUDA refuses, on every device: types, widths that are not of 16, other scales than
    fp32 of the whole operands or of rows. Layouts are `scaled_mm`'s own: the first operand row-major, the second
    column-major."""
    types = a.data.dtype, b.data.dtype
    if not {*types} <= {E4M3, E5M2}:
        raise ValueError(f"FP8 products take E4M3 and E5M2 operands, not {types[0]} and {types[1]}")
    if types == (E5M2, E5M2):
        raise ValueError("a product of two E5M2 operands does not exist; one must be E4M3")
    if dtype not in RESULTS:
        raise ValueError(f"FP8 products give bf16, fp16 or fp32, not {dtype}")
    if a.data.ndim != 2 or b.data.ndim != 2 or a.data.shape[1] != b.data.shape[0]:
        raise ValueError(f"{tuple(a.data.shape)} and {tuple(b.data.shape)} are not [m, k] and [k, n]")
    k, n = b.data.shape
    if k % MULTIPLE or n % MULTIPLE:
        raise ValueError(f"FP8 products take widths that are multiples of {MULTIPLE}, not {k} x {n}")
    for scale in (a.scale, b.scale):
        if scale.dtype != torch.float32:
            raise ValueError(f"scales are one fp32 number or one for each row, not {scale.dtype}")
    if a.scale.ndim or b.scale.ndim:
        check_row_scales(a, b, dtype)


def check_row_scales(a: Scaled, b: Scaled, dtype: torch.dtype) -> None:
    """Of `check_product` what scales for each row of `a` `[m, k]` and each column of `b` `[k, n]` add."""
    m, n, given = len(a.data), b.data.shape[1], (tuple(a.scale.shape), tuple(b.scale.shape))
    if given != ((m, 1), (1, n)):
        raise ValueError(
            f"scales are one fp32 number for each operand, or [{m}, 1] and [1, {n}], not {given[0]} and {given[1]}"
        )
    if b.data.dtype != E4M3:
        raise ValueError(f"with scales of rows the second operand is E4M3, not {b.data.dtype}")
    if dtype != ROW_RESULT:
        raise ValueError(f"FP8 products with scales of rows give bf16, not {dtype}; ask for it and cast")


@torch.compiler.assume_constant_result  # the GPU's properties are no part of a graph
def has_fp8(device: torch.device) -> bool:
    """Whether the device multiplies 8-bit numbers itself."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
