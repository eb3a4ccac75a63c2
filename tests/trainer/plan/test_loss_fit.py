"""The user's own loss law against scipy, and which of its numbers are fitted."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls

from stepline.trainer.plan.laws import EPOCH, Source
from stepline.trainer.plan.loss_fit import fit_loss, non_negative

NINE = [(n, d) for n in (1e8, 4e8, 1.6e9) for d in (2e9, 1e10, 5e10)]


def losses(cells, entropy=1.5, a=300.0, b=1500.0, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    return [
        (n, d, (entropy + a / n**0.3478 + b / d**0.3658) * (1 + noise * rng.standard_normal()))
        for n, d in cells
    ]


@given(st.integers(1, 3), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_non_negative_least_squares_are_scipys(size, seed):
    rng = np.random.default_rng(seed)
    columns, y = rng.standard_normal((8, size)), rng.standard_normal(8)
    assert non_negative(columns, y) == pytest.approx(nnls(columns, y)[0], abs=1e-9)


def test_nine_cells_give_all_three_numbers():
    law = fit_loss(losses(NINE))
    assert (law.entropy, law.params_scale, law.tokens_scale) == pytest.approx((1.5, 300, 1500), rel=1e-6)
    assert (law.params_exponent, law.tokens_exponent) == (EPOCH.params_exponent, EPOCH.tokens_exponent)
    assert "E, A and B" in law.method
    assert law.error_percent == pytest.approx(0, abs=1e-6)


def test_what_is_fitted_is_what_predicts_cells_that_were_left_out():
    """Epoch's scales and another entropy, with noise: E alone; both scales by one factor: E and that factor."""
    only_e = losses(NINE, 2.2, EPOCH.params_scale, EPOCH.tokens_scale, noise=0.003)
    law = fit_loss(only_e)
    assert law.entropy == pytest.approx(2.2, rel=0.01)
    assert law.method.startswith("fitted: E; A and B are Epoch's")
    one_factor = losses(NINE, 1.2, 0.6 * EPOCH.params_scale, 0.6 * EPOCH.tokens_scale, noise=0.0005)
    law = fit_loss(one_factor)
    assert law.params_scale / law.tokens_scale == pytest.approx(EPOCH.params_scale / EPOCH.tokens_scale)
    assert law.params_scale == pytest.approx(0.6 * EPOCH.params_scale, rel=0.05)


def test_one_cell_gives_the_entropy():
    law = fit_loss(losses(NINE[:1], 1.9, EPOCH.params_scale, EPOCH.tokens_scale))
    assert law.entropy == pytest.approx(1.9)
    assert law.left_out_error_percent is None


def test_an_entropy_that_would_be_negative_is_a_factor_instead():
    """A model so small that Epoch's N term alone exceeds the loss."""
    law = fit_loss([(3e5, 1e7, 4.0)])
    assert law.entropy > 0
    assert "one factor" in law.method
    assert law.law(Source("x", "x", "x")).loss(3e5, 1e7) == pytest.approx(4.0)


@given(
    st.lists(
        st.tuples(st.floats(1e5, 1e10), st.floats(1e6, 1e12), st.floats(0.5, 8)), min_size=1, max_size=12
    )
)
@settings(max_examples=40, deadline=None)
def test_any_losses_give_a_positive_law(cells):
    law = fit_loss(cells)
    assert law.entropy > 0
    assert law.params_scale >= 0
    assert law.tokens_scale >= 0
    assert np.isfinite(law.error_percent)
