"""Every law against its published equation, written out again, and against the published table."""

import math

import pytest

from stepline.trainer.plan.laws import DEEPSEEK, EPOCH, PORIAN, POWER_LINES, STEP_LAW, PowerLaw, Spread

CELLS = {"124M": (124e6, 2.5e9), "1.1B": (1.1e9, 100e9), "7B": (7e9, 2e12)}


@pytest.mark.parametrize(("n", "d"), [*CELLS.values(), (3e5, 1e7)])
def test_values_are_those_of_the_equations(n, d):
    c = 6 * n * d
    for ours, published in (
        (STEP_LAW.lr(n, d), 1.79 * n**-0.713 * d**0.307),
        (STEP_LAW.batch_tokens(d), 0.58 * d**0.571),
        (POWER_LINES.tau(n, d), 1.084 * (d / n) ** -0.527),
        (POWER_LINES.batch_tokens(d), 2048 * 0.0306 * d**0.383),  # published in sequences of 2048
        (POWER_LINES.critical_batch_tokens(d), 2048 * 0.0471 * d**0.462),
        (DEEPSEEK.lr(n, d), 0.3118 * c**-0.125),
        (DEEPSEEK.batch_tokens(n, d), 0.2920 * c**0.3271),
        (PORIAN.lr(n), 3.7 * n**-0.36),
        (PORIAN.batch_tokens(n), 0.7576 * n**0.703),
        (EPOCH.loss(n, d), 1.8172 + 482.01 / n**0.3478 + 2085.43 / d**0.3658),
    ):
        assert ours == pytest.approx(published, rel=1e-6)


@pytest.mark.parametrize(
    ("cell", "lr", "batch", "tau", "decay", "optimal", "critical", "deepseek", "porian", "loss"),
    [
        ("124M", 2.330e-3, 134_788, 0.22261, 0.1039, 249e3, 2.12e6, (1.62e-3, 276e3), (4.51e-3, 371e3), 3.3165),
        ("1.1B", 1.525e-3, 1.108e6, 0.10066, 0.0722, 1.023e6, 11.65e6, (7.79e-4, 1.89e6), (2.06e-3, 1.72e6), 2.3601),
        ("7B", 1.023e-3, 6.128e6, 0.05505, 0.0544, 3.224e6, 46.5e6, (4.25e-4, 9.20e6), (1.06e-3, 6.32e6), 2.0647),
    ],
)  # fmt: skip
def test_worked_values(cell, lr, batch, tau, decay, optimal, critical, deepseek, porian, loss):
    n, d = CELLS[cell]
    assert STEP_LAW.lr(n, d) == pytest.approx(lr, rel=5e-4)
    assert STEP_LAW.batch_tokens(d) == pytest.approx(batch, rel=5e-4)
    assert POWER_LINES.tau(n, d) == pytest.approx(tau, rel=5e-4)
    got = POWER_LINES.weight_decay(n, d, STEP_LAW.lr(n, d), STEP_LAW.batch_tokens(d))
    assert got == pytest.approx(decay, rel=1e-3)
    assert POWER_LINES.batch_tokens(d) == pytest.approx(optimal, rel=2e-3)
    assert POWER_LINES.critical_batch_tokens(d) == pytest.approx(critical, rel=2e-3)
    assert (DEEPSEEK.lr(n, d), DEEPSEEK.batch_tokens(n, d)) == pytest.approx(deepseek, rel=5e-3)
    assert (PORIAN.lr(n), PORIAN.batch_tokens(n)) == pytest.approx(porian, rel=5e-3)
    assert EPOCH.loss(n, d) == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize(
    ("cell", "lr", "batch"),
    [
        ("124M", (2.18e-3, 2.59e-3), (125e3, 146e3)),
        ("1.1B", (1.42e-3, 1.70e-3), (1.02e6, 1.20e6)),
        ("7B", (0.85e-3, 1.28e-3), (5.08e6, 7.29e6)),
    ],
)
def test_intervals_are_those_of_the_published_bootstrap(cell, lr, batch):
    """Percentiles of the 1000 published fits; ours are a normal distribution's with the same moments."""
    n, d = CELLS[cell]
    assert STEP_LAW.lr_law.interval(n, d) == pytest.approx(lr, rel=0.015)
    assert STEP_LAW.batch_law.interval(d) == pytest.approx(batch, rel=0.015)


def test_intervals_of_the_exponents():
    (n_low, n_high), (d_low, d_high) = STEP_LAW.lr_law.spread.exponent_intervals()
    assert (n_low, n_high) == pytest.approx((-0.774, -0.655), abs=0.004)
    assert (d_low, d_high) == pytest.approx((0.271, 0.345), abs=0.003)
    assert STEP_LAW.batch_law.spread.exponent_intervals()[0] == pytest.approx((0.534, 0.606), abs=0.003)
    assert [limits[1:] for limits in EPOCH.intervals] == [(1.769, 1.871), (0.317, 0.373), (0.331, 0.415)]


def test_exponents_are_the_log_log_slopes():
    assert math.log(STEP_LAW.lr(2e9, 1e11) / STEP_LAW.lr(1e9, 1e11), 2) == pytest.approx(-0.713)
    assert math.log(STEP_LAW.lr(1e9, 2e11) / STEP_LAW.lr(1e9, 1e11), 2) == pytest.approx(0.307)
    assert math.log(STEP_LAW.batch_tokens(2e11) / STEP_LAW.batch_tokens(1e11), 2) == pytest.approx(0.571)
    assert math.log(POWER_LINES.tau(1e9, 2e11) / POWER_LINES.tau(1e9, 1e11), 2) == pytest.approx(-0.527)


def test_the_interval_of_a_power_law_is_that_of_draws():
    """10^6 draws of (ln value, exponent) against the closed form."""
    import numpy as np

    law = PowerLaw(2.0, (0.5,), Spread((10.0,), (1.0, 0.5), ((0.04, 0.01), (0.01, 0.09))))
    draws = np.random.default_rng(0).multivariate_normal([1.0, 0.5], [[0.04, 0.01], [0.01, 0.09]], 10**6)
    values = np.exp(draws[:, 0] + draws[:, 1] * math.log(70 / 10))
    assert law.interval(70.0) == pytest.approx(np.percentile(values, [2.5, 97.5]), rel=5e-3)
    assert law(70.0) == pytest.approx(2 * 70**0.5)


@pytest.mark.parametrize("batch", [1e4, 1e6, 1e8])
def test_equal_loss_means_the_same_least_tokens(batch):
    """D = D_min (1 + B / B_crit(D_min)) backwards and forwards; a vanishing batch needs D_min itself."""
    least = POWER_LINES.min_tokens(1e11, batch)
    assert POWER_LINES.tokens_for(least, batch) == pytest.approx(1e11, rel=1e-9)
    assert POWER_LINES.tokens_for(least, 1e-3) == pytest.approx(least, rel=1e-6)
    assert POWER_LINES.tokens_for(least, POWER_LINES.critical_batch_tokens(least)) == pytest.approx(2 * least)


def test_what_is_outside_the_range_is_said():
    assert STEP_LAW.source.outside(1e9, 1e11) == []
    assert [text.split(" ")[0] for text in STEP_LAW.source.outside(7e9, 2e12)] == ["N", "D"]
    assert STEP_LAW.source.outside(1e9, 1e10) == ["D/N = 10 outside 18-470"]
    assert DEEPSEEK.source.outside(1e9, 1e11) == ["C = 6ND = 6e+20 outside 1e+17-2e+19"]


def test_a_mixture_is_inside_of_the_mixtures_that_were_run():
    """Step Law's: 2.15B weights, a share of .087 to .576 active, 2 to 20B tokens."""
    outside = STEP_LAW.source.outside
    assert outside(2.15e9, 1e10, 5e8) == []
    assert outside(2.15e9, 1e10, 2.15e9) == outside(2.15e9, 1e10) != []
    assert outside(5e8, 1e10, 5e6) == [
        "N = 5e+08 outside 2.1e+09-2.2e+09",
        "active share = 0.01 outside 0.087-0.576",
    ]
    assert [text.split(" ")[0] for text in outside(2.15e9, 1e11, 1.3e9)] == ["D", "active"]
    # C is what is computed: 6 * 1e7 * 1e10 is inside, 6 * 1e9 * 1e10 is not
    assert DEEPSEEK.source.outside(1e9, 1e10, 1e7) == []
    assert DEEPSEEK.source.outside(1e9, 1e10) == ["C = 6ND = 6e+19 outside 1e+17-2e+19"]
