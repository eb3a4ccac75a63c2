"""S-STE's threshold and scale, and the estimator, against what they are defined by."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepline.kernels.sparse24 import (
    keep_probabilities,
    mvue24,
    pack24,
    pack_bits,
    scale_of,
    scale_sums,
    soft_threshold,
    unpack24,
    unpack_bits,
)

finite = st.floats(-1e3, 1e3, width=32)
four = st.lists(st.one_of(finite, st.sampled_from([0.0, 1.0, -1.0, 2.0])), min_size=4, max_size=4)


def naive(group: list[float]) -> list[float]:
    t = sorted(abs(a) for a in group)[1]
    return [math.copysign(abs(a) - t, a) if abs(a) > t else 0.0 for a in group]


@given(four)
@settings(max_examples=300, deadline=None)
def test_soft_threshold_of_a_group(group):
    x = torch.tensor(group, dtype=torch.float64)
    s = soft_threshold(x)
    assert s.tolist() == pytest.approx(naive(group))
    assert int((s != 0).sum()) <= 2
    assert not s[s == 0].signbit().any()  # some compressors take -0.0 for a value
    assert torch.allclose(soft_threshold(3 * x), 3 * s)


def test_it_is_lipschitz_where_a_hard_threshold_jumps():
    torch.manual_seed(0)
    a = torch.randn(50_000, 4, dtype=torch.float64)
    a[::2, 1] = a[::2, 0].abs() * (1 + 1e-9)  # near-ties
    b = a + 1e-6 * torch.randn_like(a)
    moved = (soft_threshold(a) - soft_threshold(b)).norm(dim=1) / (a - b).norm(dim=1)
    assert moved.max() <= math.sqrt(3) + 1e-6
    hard = torch.where(soft_threshold(a) != 0, a, 0), torch.where(soft_threshold(b) != 0, b, 0)
    assert ((hard[0] - hard[1]).norm(dim=1) / (a - b).norm(dim=1)).max() > 1e3


def test_scale():
    """1.4838 for a normal distribution, 7/4 for a uniform one; the residual is orthogonal to S(W); shards add up."""
    torch.manual_seed(0)
    normal = torch.randn(2000, 2000, dtype=torch.float64)
    assert scale_of(scale_sums(normal)).item() == pytest.approx(1.4838, abs=2e-3)
    assert scale_of(scale_sums(torch.rand(2000, 2000))).item() == pytest.approx(7 / 4, abs=3e-3)
    s, beta = soft_threshold(normal), scale_of(scale_sums(normal))
    assert abs(((normal - beta * s) * s).sum() / s.square().sum()) < 1e-12
    shards = sum(scale_sums(part) for part in normal.split(333))
    assert scale_of(shards).item() == pytest.approx(beta.item(), rel=1e-12)
    assert scale_of(scale_sums(torch.zeros(4, 8))).item() == 1


@pytest.mark.parametrize(
    ("group", "variance"),
    [
        ([1.0, 2.0, 3.0, 4.0], 20.0),
        ([0.1, 0.2, 0.3, 4.0], 0.22),
        ([0.0, 0.0, 0.0, 5.0], 0.0),
        ([0.0, 0.0, 3.0, -3.0], 0.0),
        ([2.0, -2.0, 2.0, 2.0], 16.0),
        ([0.0, 0.0, 0.0, 0.0], 0.0),
        ([-1.0, 0.0, 7.0, 2.0], None),
        ([1e-20, 0.0, 0.0, 1.0], 0.0),
    ],
)
def test_the_estimator_is_unbiased_and_of_the_least_variance(group, variance):
    x = torch.tensor(group, dtype=torch.float64)
    p = keep_probabilities(x).flatten()
    expected = sum(a * a * (1 / q - 1) for a, q in zip(group, p.tolist(), strict=True) if a)
    if variance is not None:
        assert expected == pytest.approx(variance, abs=1e-12)
    draws = 2**20
    u = torch.rand(draws, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = mvue24(x.expand(draws, 4), u)
    assert ((y != 0).sum(-1) <= 2).all()
    assert y.abs().max() <= 2 * x.abs().max() + 1e-12
    error = y.mean(0) - x
    z = error / (y.std(0) / math.sqrt(draws)).clamp_min(1e-12)
    assert z.abs().max() < 5
    assert (y - x).square().sum(-1).mean().item() == pytest.approx(expected, rel=0.01, abs=1e-9)


def test_the_estimators_variance_on_gaussian_groups():
    x = torch.randn(200_000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = keep_probabilities(x).squeeze(1)
    assert torch.allclose(p.sum(1), torch.full((len(p),), 2.0, dtype=torch.float64))
    ratio = (x.square() * (1 / p - 1)).sum() / x.square().sum()
    assert ratio.item() == pytest.approx(0.473, abs=2e-3)


@given(four, st.floats(0, 1, exclude_max=True, width=32), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=300, deadline=None)
def test_what_the_estimator_keeps(group, u, dtype):
    """At most two, which are x / p; a dominating one always, but where u and an end differ by rounding."""
    x = torch.tensor(group, dtype=dtype)
    y, p = mvue24(x, torch.tensor([u], dtype=dtype)), keep_probabilities(x).flatten()
    kept = y != 0
    assert kept.sum() <= 2
    assert torch.allclose(y[kept] * p[kept], x[kept], rtol=1e-5)
    a = x.abs()
    ends = torch.cat([p.cumsum(0) % 1, torch.tensor([0, 1], dtype=dtype)])
    if (ends - u).abs().min() > 1e-5 and a.max() > 1.001 * a.sum() / 2:
        assert y[a.argmax()] == x[a.argmax()]
    if (a > 1e-30).sum() > 1:
        assert torch.allclose(p.sum(), torch.tensor(2.0, dtype=dtype))


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_metadata_of_any_shape(rows, bytes_, seed):
    s = soft_threshold(torch.randn(rows, 8 * bytes_, generator=torch.Generator().manual_seed(seed)))
    values, places = pack24(s)
    bits = pack_bits(places)
    assert bits.shape == (rows, bytes_)
    assert torch.equal(unpack_bits(bits), places)
    assert torch.equal(unpack24(values, unpack_bits(bits)), s)


@given(st.lists(four, min_size=1, max_size=5))
@settings(max_examples=100, deadline=None)
def test_packing_loses_nothing(rows):
    s = soft_threshold(torch.tensor(rows, dtype=torch.float32))
    values, places = pack24(s)
    assert values.numel() * 2 == s.numel()
    assert torch.equal(unpack24(values, places), s)


def test_what_cannot_be_grouped_is_refused():
    with pytest.raises(ValueError, match="the nearest is 8"):
        soft_threshold(torch.zeros(2, 7))
    with pytest.raises(ValueError, match="more than two values"):
        pack24(torch.ones(1, 4))
    with pytest.raises(ValueError, match="multiples of 8 values, not 12"):
        pack_bits(pack24(torch.zeros(1, 12))[1])
