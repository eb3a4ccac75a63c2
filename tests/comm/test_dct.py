"""Chunks and their transform, against sums written from the definition and scipy."""

import math

import pytest
import scipy.fft
import torch

from stepline.comm.chunking import Chunking, even_length, largest_divisor
from stepline.comm.dct import dct, dct_basis, inverse_dct, join, split


@pytest.mark.parametrize("size", [1, 2, 7, 29, 52, 64])
def test_basis_is_orthonormal_and_that_of_scipy(size):
    basis = dct_basis(size, torch.float64)
    assert (basis.T @ basis - torch.eye(size, dtype=torch.float64)).abs().max() < 1e-13
    x = torch.randn(5, size, dtype=torch.float64)
    assert (x @ basis - torch.from_numpy(scipy.fft.dct(x.numpy(), norm="ortho"))).abs().max() < 1e-13


def test_two_dimensional_transform_and_its_inverse():
    x = torch.randn(6, 8, 5, dtype=torch.float64)
    down, across = dct_basis(8, torch.float64), dct_basis(5, torch.float64)
    y = dct(x, down, across)
    reference = torch.from_numpy(scipy.fft.dctn(x.numpy(), axes=(1, 2), norm="ortho"))
    assert (y - reference).abs().max() < 1e-13
    assert (inverse_dct(y, down, across) - x).abs().max() < 1e-13


def test_lengths_of_chunks():
    assert [largest_divisor(n, 64) for n in (50257, 257, 128, 96, 1)] == [29, 1, 64, 48, 1]
    assert [even_length(n, 64) for n in (50257, 257, 128, 96, 65, 64, 3, 1)] == [64, 52, 64, 48, 33, 64, 3, 1]
    for n in range(1, 700):
        length = even_length(n, 64)
        assert length <= 64
        assert math.ceil(n / length) == math.ceil(n / 64)  # no more chunks than need be


@pytest.mark.parametrize(
    "shape", [(64,), (257,), (1,), (129, 65), (128, 64), (1, 300), (3, 70, 65), (0, 64), (2, 0, 5), (0,)]
)
@pytest.mark.parametrize("divisors", [False, True])
def test_cutting_and_joining_loses_nothing(shape, divisors):
    chunking = Chunking.of(shape, 64, divisors=divisors)
    x = torch.randn(shape)
    chunks = split(x, chunking)
    assert chunks.shape == (chunking.count, chunking.height, chunking.width)
    assert torch.equal(join(chunks, chunking), x)
    assert chunks.square().sum() == pytest.approx(x.square().sum().item(), rel=1e-5)  # padded by zeros
    flat = Chunking.flat(shape, 64)
    assert torch.equal(join(split(x, flat), flat).view_as(x), x)


@pytest.mark.parametrize(("shape", "cut"), [
    ((32000, 100), ((3200000,), 1000)), ((5000, 72), ((360000,), 1008)), ((331, 36), ((11916,), 1008)),
    ((9, 1025), ((9, 1025), 513)), ((9, 1024), ((9216,), 1024)), ((3, 7), ((21,), 21)), ((2000,), ((1, 2000), 1000)),
])  # fmt: skip
def test_flat_chunks_are_whole_rows_or_within_one(shape, cut):
    flat = Chunking.flat(shape, 1024)
    assert (flat.shape, flat.height, flat.width) == (cut[0], 1, cut[1])
    chunks = split(torch.arange(math.prod(shape)).float().view(shape), flat).flatten(1)
    rows = [set((chunk[chunk > 0] // shape[-1]).tolist()) for chunk in chunks]
    assert all(len(row) == 1 for row in rows) or flat.width % shape[-1] == 0


def test_chunks_are_neighbouring_blocks():
    x = torch.arange(48.0).view(6, 8)
    chunks = split(x, Chunking.of((6, 8), 4))
    assert torch.equal(chunks[1], x[:3, 4:])
    assert torch.equal(chunks[2], x[3:, :4])
