"""Orthonormal DCT-II of chunks, as two products: how DeMo sees a parameter's momentum (arXiv 2411.19870)."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from stepline.comm.chunking import Chunking


def dct_basis(size: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """D `[size, size]` with D^T D = 1: column k is cos(pi (2 n + 1) k / (2 size)) times sqrt(2 / size), for k = 0
    times sqrt(1 / size). `x @ D` is the DCT-II of the rows of x, `y @ D.T` its inverse.

    Computed in float64 and rounded once.
    """
    n = torch.arange(size, dtype=torch.float64)
    basis = torch.cos(math.pi * (2 * n[:, None] + 1) * n[None, :] / (2 * size)) * math.sqrt(2 / size)
    basis[:, 0] = math.sqrt(1 / size)
    return basis.to(device=device, dtype=dtype)


def split(x: Tensor, chunking: Chunking) -> Tensor:
    """`[count, height, width]` of a tensor of `chunking.shape`, padded by zeros."""
    leading, down, across = chunking.blocks
    if not chunking.count:
        return x.new_zeros(0, chunking.height, chunking.width)
    rows, cols = down * chunking.height, across * chunking.width
    x = x.reshape(leading, -1, chunking.shape[-1])
    if (rows, cols) != x.shape[1:]:
        x = functional.pad(x, (0, cols - x.shape[2], 0, rows - x.shape[1]))
    x = x.view(leading, down, chunking.height, across, chunking.width).transpose(2, 3)
    return x.reshape(chunking.count, chunking.height, chunking.width)


def join(chunks: Tensor, chunking: Chunking) -> Tensor:
    """The tensor of `chunking.shape` whose chunks these are; what was padded is cut off."""
    leading, down, across = chunking.blocks
    if not chunking.count:
        return chunks.new_zeros(chunking.shape)
    x = chunks.view(leading, down, across, chunking.height, chunking.width).transpose(2, 3)
    x = x.reshape(leading, down * chunking.height, across * chunking.width)
    rows = chunking.shape[-2] if len(chunking.shape) > 1 else 1
    return x[:, :rows, : chunking.shape[-1]].reshape(chunking.shape)


def dct(chunks: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """Two-dimensional DCT-II `Dh^T X Dw` of `[count, height, width]`; `down` is Dh, `across` Dw."""
    return down.T @ (chunks @ across)


def inverse_dct(spectrum: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """`Dh Y Dw^T`, the inverse of `dct`."""
    return down @ (spectrum @ across.T)


def inverse_dct_of(indices: Tensor, values: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """`inverse_dct` of spectra that are zero but for a few values: `[chunks, kept]` each, indices into height * width.

    The sum of `kept` outer products of basis vectors, one product of `[height, kept] x [kept, width]` a chunk.
    """
    width = len(across)
    left = down.T[indices // width] * values.unsqueeze(-1)
    return left.mT @ across.T[indices % width]
