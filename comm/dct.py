"""Orthonormal DCT-II of chunks, as two products: how DeMo sees a parameter's momentum (arXiv 2411.19870)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


def dct_basis(size: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """D `[size, size]` with D^T D = 1: column k is cos(pi (2 n + 1) k / (2 size)) times sqrt(2 / size), for k = 0
    times sqrt(1 / size). `x @ D` is the DCT-II of the rows of x, `y @ D.T` its inverse.

    Computed in float64 and rounded once.
    """
    n = torch.arange(size, dtype=torch.float64)
    basis = torch.cos(math.pi * (2 * n[:, None] + 1) * n[None, :] / (2 * size)) * math.sqrt(2 / size)
    basis[:, 0] = math.sqrt(1 / size)
    return basis.to(device=device, dtype=dtype)


def largest_divisor(size: int, limit: int) -> int:
    """The largest divisor of `size` that is at most `limit`: the published chunk length."""
    return next(d for d in range(min(size, limit), 0, -1) if size % d == 0)


def even_length(size: int, limit: int) -> int:
    """The chunk length of at most `limit` that cuts `size` into the fewest chunks of one length, the last one
    padded: 257 at 64 gives 5 chunks of 52, where the largest divisor would be 1."""
    return -(-size // -(-size // limit))


@dataclass(frozen=True)
class Chunking:
    """How a tensor is cut into chunks `[height, width]`; dimensions before the last two are cut one by one."""

    shape: tuple[int, ...]
    """Of the tensor; a vector `[n]` is one row."""
    height: int
    width: int

    @classmethod
    def of(cls, shape: tuple[int, ...], limit: int, *, divisors: bool = False) -> "Chunking":
        """Chunks of at most `limit` x `limit`, padded, or of the published divisors."""
        length = largest_divisor if divisors else even_length
        rows, cols = shape[-2] if len(shape) > 1 else 1, shape[-1]
        return cls(tuple(shape), length(max(rows, 1), limit), length(max(cols, 1), limit))

    @classmethod
    def flat(cls, shape: tuple[int, ...], limit: int) -> "Chunking":
        """Chunks of at most `limit` values of the flattened tensor, for what is not transformed."""
        numel = math.prod(shape)
        return cls((numel,), 1, even_length(max(numel, 1), limit))

    @property
    def _blocks(self) -> tuple[int, int, int]:
        """(leading, down, across)."""
        rows = self.shape[-2] if len(self.shape) > 1 else 1
        leading = math.prod(self.shape[:-2])
        return leading, -(-rows // self.height), -(-self.shape[-1] // self.width)

    @property
    def count(self) -> int:
        """Chunks of the tensor."""
        return math.prod(self._blocks)

    def split(self, x: Tensor) -> Tensor:
        """`[count, height, width]` of a tensor of `shape`, padded by zeros."""
        leading, down, across = self._blocks
        if not self.count:
            return x.new_zeros(0, self.height, self.width)
        rows, cols = down * self.height, across * self.width
        x = x.reshape(leading, -1, self.shape[-1])
        if (rows, cols) != x.shape[1:]:
            x = functional.pad(x, (0, cols - x.shape[2], 0, rows - x.shape[1]))
        x = x.view(leading, down, self.height, across, self.width).transpose(2, 3)
        return x.reshape(self.count, self.height, self.width)

    def join(self, chunks: Tensor) -> Tensor:
        """The tensor of `shape` whose chunks these are; what was padded is cut off."""
        leading, down, across = self._blocks
        if not self.count:
            return chunks.new_zeros(self.shape)
        x = chunks.view(leading, down, across, self.height, self.width).transpose(2, 3)
        x = x.reshape(leading, down * self.height, across * self.width)
        rows = self.shape[-2] if len(self.shape) > 1 else 1
        return x[:, :rows, : self.shape[-1]].reshape(self.shape)


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
