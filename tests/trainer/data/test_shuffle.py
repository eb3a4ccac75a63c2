import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepline.trainer.data.shuffle import KeyedPermutation, keyed_uniform, stream_key


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 5000), st.binary(max_size=20))
def test_permutation_is_a_bijection(n: int, key: bytes) -> None:
    np.testing.assert_array_equal(np.sort(KeyedPermutation(n, key)(np.arange(n))), np.arange(n))


@settings(max_examples=50, deadline=None)
@given(st.integers(1 << 39, 1 << 40), st.integers(0, 2**32))
def test_huge_permutation_stays_in_range_without_collision(n: int, seed: int) -> None:
    indices = np.unique(np.random.default_rng(seed).integers(0, n, 1000))
    images = KeyedPermutation(n, stream_key(seed))(indices)
    assert images.min() >= 0
    assert images.max() < n
    assert len(np.unique(images)) == len(indices)


@pytest.mark.parametrize("n", [7, 64, 1000, 4097])
def test_images_are_spread_evenly(n: int) -> None:
    """Over many keys, the image of 0 and of n - 1 is uniform (chi-squared, 8 bins, 99.99 % at 27.9)."""
    keys = [stream_key(k) for k in range(4000)]
    bins = min(8, n)
    edges = np.linspace(0, n, bins + 1)
    expected = np.diff(np.ceil(edges)) / n * len(keys)
    for index in (0, n - 1):
        images = np.array([KeyedPermutation(n, key)(np.array([index]))[0] for key in keys])
        counts = np.histogram(images, np.ceil(edges) - 0.5)[0]
        assert ((counts - expected) ** 2 / expected).sum() < 30


def test_neighbours_are_not_correlated() -> None:
    images = KeyedPermutation(100_000, b"key")(np.arange(100_000)).astype(float)
    for lag in (1, 2, 64, 317):
        assert abs(np.corrcoef(images[:-lag], images[lag:])[0, 1]) < 0.015
    assert abs(np.corrcoef(images, np.arange(100_000))[0, 1]) < 0.015


def test_keys_differ_and_results_are_fixed() -> None:
    """The order is part of what a checkpoint means: it may never change silently."""
    a, b = (KeyedPermutation(1000, stream_key(0, 0, epoch))(np.arange(1000)) for epoch in (0, 1))
    assert (a == b).sum() < 10
    assert KeyedPermutation(1000, stream_key(1, 2, 3))(np.arange(6)).tolist() == [217, 568, 98, 184, 823, 577]
    assert len({stream_key(1, 23), stream_key(12, 3), stream_key(1, 2, 3)}) == 3


def test_uniform_numbers() -> None:
    u = keyed_uniform(np.arange(100_000), stream_key(5))
    assert u.min() >= 0
    assert u.max() < 1
    counts = np.histogram(u, 50, (0, 1))[0]
    assert ((counts - 2000) ** 2 / 2000).sum() < 110  # chi-squared, 49 degrees: 99.99 % at 95
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.015
    np.testing.assert_array_equal(keyed_uniform(np.array([7, 3]), stream_key(5)), u[[7, 3]])


@pytest.mark.parametrize("n", [0, -1, (1 << 62) + 1])
def test_size_out_of_range(n: int) -> None:
    with pytest.raises(ValueError, match="not between 1 and"):
        KeyedPermutation(n, b"")
