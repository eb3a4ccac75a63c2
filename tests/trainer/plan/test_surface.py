"""The surface's fit against scipy on the same objective, and its intervals by how often they hold the truth."""

import math

import numpy as np
import pytest
from scipy import optimize, stats

from stepline.trainer.plan import surface
from stepline.trainer.plan.fit import student_t, uncertainty

from .synthetic import STEP, sweep

KEPT = np.array([-0.713, 0.307, 0.571])


def packed(cells):
    return surface.pack(cells, [rows[:, 2].min() for _, _, rows in cells])


def truth(problem):
    n, d = map(math.log, problem.centre)
    (a, *lr), (b, beta) = STEP
    return np.array([math.log(a) + lr[0] * n + lr[1] * d, math.log(b) + beta * d])


def by_scipy(p, skew, free):
    """The whole model by least_squares with soft_l1, weights put into the loss."""
    used = p.w > 0
    cell = np.nonzero(used)[0]
    n, d, x, z, y, w = p.n[cell], p.d[cell], p.x[used], p.z[used], p.y[used], p.w[used]

    def residual(t):
        a, b, h11, h12, h22 = t[:5]
        c = t[5] if skew else 0.0
        e = t[6:9] if free else KEPT
        level = t[9:]
        u, v = x - a - e[0] * n - e[1] * d, z - b - e[2] * d
        q = h11 * u * u / 2 + h12 * u * v + h22 * v * v / 2 + c * u**3
        return (y - level[cell] * (1 + q)) / surface.SOFT

    def loss(f2):
        root = np.sqrt(1 + f2)
        return np.stack([w * 2 * (root - 1), w / root, -w / (2 * root**3)])

    start = np.concatenate([truth(p), [0.01, 0, 0.01, 0], KEPT, np.ones(p.cells)])
    found = optimize.least_squares(
        residual, start, loss=loss, x_scale="jac", xtol=1e-13, ftol=1e-13, gtol=1e-13
    )
    return found.x


@pytest.mark.parametrize(("skew", "free"), [(False, False), (True, False), (True, True)])
def test_the_optimum_is_scipys(skew, free):
    p = packed(sweep(points=5, noise=0.002, scatter=(0.1, 0.1), skew=0.002 if skew else 0.0))
    ours = surface.fit_intercepts(p, KEPT, skew)
    if free:
        ours = surface.fit_exponents(p, ours, skew)
    theirs = by_scipy(p, skew, free)
    # L0 is a weighted mean here, a least-squares coefficient there: equal to a hundredth of the intervals.
    assert ours.optimum == pytest.approx(theirs[:2], abs=1e-3)
    assert ours.curvature[[0, 0, 1], [0, 1, 1]] == pytest.approx(theirs[2:5], abs=5e-5)
    assert ours.skew == pytest.approx(theirs[5] if skew else 0.0, abs=2e-5)
    assert ours.exponents == pytest.approx(theirs[6:9] if free else KEPT, abs=1e-3)
    assert ours.level == pytest.approx(theirs[9:], abs=5e-5)


@pytest.mark.parametrize("skew", [0.0, 0.002])
def test_a_law_without_noise_is_found_exactly(skew):
    p = packed(sweep(points=5, skew=skew))
    fitted = surface.fit_intercepts(p, KEPT, bool(skew))
    assert fitted.optimum == pytest.approx(truth(p), abs=1e-6)
    assert float(fitted.curvature[0, 0]) == pytest.approx(0.0106, rel=1e-4)
    assert float(fitted.skew) == pytest.approx(skew, abs=1e-7)


def test_without_the_skew_the_optimum_would_be_too_low():
    """Why the cubic term is there: a parabola through a loss that is steeper above shifts the learning rate."""
    p = packed(sweep(points=7, skew=0.002, shift=0.0))
    assert surface.carries_skew(p, KEPT)
    parabola = surface.fit_intercepts(p, KEPT, False).optimum[0] - truth(p)[0]
    assert parabola < -0.1
    assert surface.fit_intercepts(p, KEPT, True).optimum[0] == pytest.approx(truth(p)[0], abs=1e-6)


def test_three_learning_rates_do_not_carry_a_skew():
    assert not surface.carries_skew(packed(sweep(points=3)), KEPT)


def test_free_exponents_are_found():
    other = {"lr": (1.5, -0.6, 0.2), "batch": (0.6, 0.45)}
    p = packed(sweep(points=5, shift=0.1, **other))
    start = surface.fit_intercepts(p, KEPT, True)
    fitted = surface.fit_exponents(p, start, True)
    assert fitted.exponents == pytest.approx([-0.6, 0.2, 0.45], abs=1e-4)


def test_a_batch_of_problems_is_each_of_them():
    p = packed(sweep(noise=0.002))
    sample = surface.resample(p, 3, np.random.default_rng(0))
    together = surface.fit_intercepts(sample, KEPT, False)
    for i in range(3):
        alone = surface.Problem(p.centre, *(getattr(sample, k)[i] for k in ("n", "d", "x", "z", "y", "w")))
        assert together.optimum[i] == pytest.approx(
            surface.fit_intercepts(alone, KEPT, False).optimum, abs=1e-9
        )


def test_resamples_draw_cells_then_runs():
    p = packed(sweep(points=3))
    sample = surface.resample(p, 400, np.random.default_rng(0))
    assert (
        np.count_nonzero(sample.w, axis=-1) < 9
    ).mean() > 0.9  # of nearly every cell some run is drawn twice
    share = np.mean([len(set(zip(sample.n[i], sample.d[i]))) for i in range(400)]) / 9
    assert share == pytest.approx(1 - (8 / 9) ** 9, abs=0.02)  # distinct cells of 9 draws out of 9


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 8, 26, 200])
def test_students_quantile(freedom):
    assert student_t(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-3)


@pytest.mark.parametrize(("noise", "scatter"), [(0.002, (0.0, 0.0)), (0.001, (0.1, 0.15))])
def test_intervals_hold_the_truth_in_90_to_99_of_100_draws(noise, scatter):
    """9 cells of 9 runs; noise of the runs alone, and cells whose own optima scatter about the law."""
    held = []
    for seed in range(200):
        p = packed(sweep(noise=noise, scatter=scatter, seed=seed))
        fitted = surface.fit_intercepts(p, KEPT, False)
        unsure = uncertainty(p, fitted, False, False, draws=150, seed=seed)
        held.append(np.abs(fitted.optimum - truth(p)) < unsure.half_widths)
    lr, batch = np.mean(held, axis=0)
    assert 0.90 <= lr <= 0.99
    assert 0.90 <= batch <= 0.99


def test_intervals_of_few_cells_are_not_too_narrow():
    """4 cells: Student's t with 3 degrees of freedom holds the truth at least as often as it says."""
    held = []
    for seed in range(200):
        p = packed(
            sweep(
                cells=[(5e6, 1e8), (5e6, 2e9), (8e7, 1e8), (8e7, 2e9)],
                noise=0.001,
                scatter=(0.1, 0.1),
                seed=seed,
            )
        )
        fitted = surface.fit_intercepts(p, KEPT, False)
        held.append(
            np.abs(fitted.optimum - truth(p)) < uncertainty(p, fitted, False, False, 0, 0).half_widths
        )
    assert (np.mean(held, axis=0) >= 0.93).all()
