"""8-bit floating point with a scale for each tensor: casts, and products of cast operands.

E4M3 for what goes forward, E5M2 for gradients (arXiv 2209.05433). On CUDA (SM 89 and newer) the product is
`torch._scaled_mm`; elsewhere the same numbers are multiplied in fp32, which is the reference.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16
"""What CUDA's products want the inner and the outer widths to be multiples of."""
RESULTS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Scaled:
    """`data * scale` is the tensor."""

    data: Tensor
    """`[rows, cols]` in an 8-bit type."""
    scale: Tensor
    """0-dim fp32."""

    @property
    def mT(self) -> "Scaled":
        """Transposed."""
        return Scaled(self.data.mT, self.scale)

    def float(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """As numbers of `dtype`."""
        return self.data.to(dtype) * self.scale.to(dtype)


def scale_for(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale, 0-dim fp32, that takes `amax` to the largest number of `dtype`; 1 where amax is 0."""
    scale = amax.float() / torch.finfo(dtype).max
    return torch.where(
        scale > 0, scale.clamp_min(torch.finfo(torch.float32).tiny), 1.0
    )  # of which 1 / scale is finite


def cast(x: Tensor, dtype: torch.dtype, amax: Tensor | None = None) -> Scaled:
    """Rounds `x` to the nearest numbers of `dtype`, ties to even; what lies beyond `amax` is clipped.

    amax: 0-dim, the largest magnitude; of `x` by default.
    """
    scale = scale_for(x.abs().amax() if amax is None else amax, dtype)
    return Scaled(quantise(x, scale, dtype), scale)


def quantise(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x times 1 / scale in `dtype`, rounded to the nearest, ties to even, and clipped to its largest number."""
    largest, wide = torch.finfo(dtype).max, torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) * (1 / scale.to(wide))).clamp(-largest, largest).to(dtype)


def scaled_mm(a: Scaled, b: Scaled, dtype: torch.dtype) -> Tensor:
    """a b, `[m, k] x [k, n]`, summed in fp32 and rounded to `dtype` once."""
    check_product(a, b, dtype)
    if has_fp8(a.data.device):
        data = b.data.mT.contiguous().mT  # column-major
        return torch._scaled_mm(a.data.contiguous(), data, a.scale, b.scale, out_dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    return ((a.data.to(wide) @ b.data.to(wide)) * (a.scale * b.scale).to(wide)).to(dtype)


def check_product(a: Scaled, b: Scaled, dtype: torch.dtype) -> None:
    """Raises ValueError for what CUDA refuses, on every device: types, widths that are not of 16, other scales than one
    fp32 number. Layouts are `scaled_mm`'s own: the first operand row-major, the second column-major."""
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
        if scale.ndim or scale.dtype != torch.float32:
            raise ValueError(f"scales are one fp32 number, not {scale.dtype} {tuple(scale.shape)}")


@torch.compiler.assume_constant_result  # the GPU's properties are no part of a graph
def has_fp8(device: torch.device) -> bool:
    """Whether the device multiplies 8-bit numbers itself."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
