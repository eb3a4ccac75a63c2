"""The loss around its best learning rate and batch, fitted over all cells of a sweep at once. numpy only.

A cell is one (N, D). With n = ln N, d = ln D (both less their means over the cells),
u = ln lr - (a + alpha_N n + alpha_D d) and v = ln B - (b + beta d):

    L / L0(cell) = 1 + h11 u^2 / 2 + h12 u v + h22 v^2 / 2 + c u^3

All cells share the optimum's law and the curvature, each has its own L0. c, where the runs carry it, is the
skew: the loss rises faster above the best learning rate than below, and a parabola alone answers that by putting
the optimum too low (docs/LAB.md). Residuals count by soft-L1 of scale `SOFT`, solved by iteratively re-weighted
least squares; with the exponents kept the inner problem is linear, with free ones it is Gauss-Newton. Every
function takes leading batch dimensions, so that a bootstrap is one call.
"""

from dataclasses import dataclass, replace

import numpy as np

WINDOW = 0.03
"""Loss above the cell's best, as a fraction, at which a run's weight reaches zero."""
LEAST_RUNS = 6
"""Runs of a cell that count, were they outside the window: a parabola in two variables has six terms."""
SOFT = 0.002
"""Residual, as a fraction of the loss, at which soft-L1 turns from square to linear: about twice the noise of
released runs."""
STEPS = 30


@dataclass(frozen=True)
class Problem:
    """Runs of K cells, padded to R a cell; leading dimensions are those of a bootstrap."""

    centre: tuple[float, float]
    """Geometric means of the cells' N and D."""
    n: np.ndarray
    """ln N less that of the centre, [.., K]."""
    d: np.ndarray
    """ln D, likewise, [.., K]."""
    x: np.ndarray
    """ln lr, [.., K, R]."""
    z: np.ndarray
    """ln batch in tokens, [.., K, R]."""
    y: np.ndarray
    """Loss over the cell's best, [.., K, R]; 1 where padded."""
    w: np.ndarray
    """Weight, [.., K, R]; 0 where padded or outside the window."""

    @property
    def cells(self) -> int:
        """K."""
        return self.n.shape[-1]

    @property
    def used(self) -> int:
        """Runs with a weight."""
        return int((self.w > 0).sum())


@dataclass(frozen=True)
class Surface:
    """A fitted surface; leading dimensions are those of the problem."""

    optimum: np.ndarray
    """a, b: ln lr* and ln B* at the problem's centre, [.., 2]."""
    exponents: np.ndarray
    """alpha_N, alpha_D, beta, [.., 3]."""
    curvature: np.ndarray
    """[[h11, h12], [h12, h22]] at the optimum, [.., 2, 2]."""
    skew: np.ndarray
    """c, [..]; 0 where it was not fitted."""
    level: np.ndarray
    """L0 over the cell's best observed loss, [.., K]."""
    residual: np.ndarray
    """[.., K, R], as a fraction of the loss."""

    @property
    def convex(self) -> np.ndarray:
        """Whether there is a minimum at all, [..]."""
        h = self.curvature
        product = h[..., 0, 0] * h[..., 1, 1]
        return (h[..., 0, 0] > 0) & (product - h[..., 0, 1] ** 2 > 1e-4 * product)


def pack(cells: list[tuple[float, float, np.ndarray]], best: list[float]) -> Problem:
    """A problem from (N, D, rows of lr, batch, loss [runs, 3]) and the best loss of each cell.

    Weights fall from 1 at the best loss to 0 at `WINDOW` above it as (1 - t^2)^2; the `LEAST_RUNS` best runs of a
    cell keep at least .1 however far they are.
    """
    near = []
    for (_, _, rows), least in zip(cells, best, strict=True):
        ordered = rows[np.argsort(rows[:, 2], kind="stable")]
        weight = (1 - np.clip((ordered[:, 2] / least - 1) / WINDOW, 0, 1) ** 2) ** 2
        weight[:LEAST_RUNS] = np.maximum(weight[:LEAST_RUNS], 0.1)
        near.append((ordered[weight > 0], weight[weight > 0]))
    shape = (len(cells), max(len(rows) for rows, _ in near))
    x, z, y, w = np.zeros(shape), np.zeros(shape), np.ones(shape), np.zeros(shape)
    for k, (rows, weight) in enumerate(near):
        r = len(rows)
        x[k, :r], z[k, :r], y[k, :r] = np.log(rows[:, 0]), np.log(rows[:, 1]), rows[:, 2] / best[k]
        w[k, :r] = weight
    n, d = np.log([c[0] for c in cells]), np.log([c[1] for c in cells])
    centre = (float(np.exp(n.mean())), float(np.exp(d.mean())))
    return Problem(centre, n - n.mean(), d - d.mean(), x, z, y, w)


def offsets(p: Problem, at: np.ndarray, exponents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """u and v, [.., K, R], about an optimum `at` [.., 2] with exponents [.., 3]."""
    e = exponents
    u = p.x - (at[..., 0, None] + e[..., 0, None] * p.n + e[..., 1, None] * p.d)[..., None]
    return u, p.z - (at[..., 1, None] + e[..., 2, None] * p.d)[..., None]


def terms(u: np.ndarray, v: np.ndarray, skew: bool) -> np.ndarray:
    """u, v, u^2, u v, v^2 and, with skew, u^3: [.., 5 or 6]."""
    return np.stack([u, v, u * u, u * v, v * v, *([u**3] if skew else [])], -1)


def within(columns: np.ndarray, y: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns [.., K, R, P] and y [.., K, R] less their weighted means in each cell: L0 is profiled out."""
    total = np.maximum(w.sum(-1, keepdims=True), 1e-300)
    means = (w[..., None, :] @ columns)[..., 0, :] / total
    return columns - means[..., None, :], y - (w * y).sum(-1, keepdims=True) / total


def normal(columns: np.ndarray, y: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted least squares over all runs, [.., P], and the normal matrix [.., P, P].

    Columns are scaled to one; a ridge of 1e-9 keeps resamples solvable that have too few different runs.
    """
    size = columns.shape[-1]
    flat = columns.reshape(*columns.shape[:-3], -1, size)
    weighted = flat * w.reshape(*w.shape[:-2], -1, 1)
    gram = np.swapaxes(weighted, -1, -2) @ flat
    side = np.swapaxes(weighted, -1, -2) @ y.reshape(*y.shape[:-2], -1, 1)
    scale = np.sqrt(np.maximum(np.diagonal(gram, axis1=-2, axis2=-1), 1e-300))
    gram = gram + 1e-9 * np.eye(size) * (scale**2)[..., None]
    unit = gram / (scale[..., None] * scale[..., None, :])
    return np.linalg.solve(unit, side / scale[..., None])[..., 0] / scale, gram


def soft(residual: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Weights of soft-L1."""
    return w / np.sqrt(1 + (residual / SOFT) ** 2)


def carries_skew(p: Problem, exponents: np.ndarray) -> bool:
    """Whether the runs tell u^3 from the parabola: at most 95 % of its variance lies in the other terms."""
    if p.used < p.cells + 9:
        return False
    u, v = offsets(p, middle(p, exponents), exponents)
    columns, _ = within(terms(u, v, True), p.y, p.w)
    flat = (columns * np.sqrt(p.w)[..., None]).reshape(-1, 6)
    rest = flat[:, 5] - flat[:, :5] @ np.linalg.lstsq(flat[:, :5], flat[:, 5], rcond=None)[0]
    return float(rest @ rest) > 0.05 * float(flat[:, 5] @ flat[:, 5])


def middle(p: Problem, exponents: np.ndarray) -> np.ndarray:
    """Weighted mean of ln lr and ln B less the exponents' part, [.., 2]."""
    u, v = offsets(p, np.zeros((*p.n.shape[:-1], 2)), exponents)
    total = p.w.sum((-1, -2))
    return np.stack([(p.w * u).sum((-1, -2)) / total, (p.w * v).sum((-1, -2)) / total], -1)


def fit_intercepts(p: Problem, exponents: np.ndarray, skew: bool, steps: int = STEPS) -> Surface:
    """Optimum, curvature and levels with the exponents [3] kept."""
    means = middle(p, exponents)
    columns = terms(*offsets(p, means, exponents), skew)
    w, level = p.w, np.ones(p.n.shape)
    for _ in range(steps):
        scaled, y = within(columns * level[..., None, None], p.y, w)
        beta, _ = normal(scaled, y, w)
        residual = y - (scaled @ beta[..., None, :, None])[..., 0]
        cubic = beta[..., 5] if skew else np.zeros(beta.shape[:-1])
        h = np.stack([2 * beta[..., 2], beta[..., 3], beta[..., 3], 2 * beta[..., 4]], -1)
        h = h.reshape(*h.shape[:-1], 2, 2)
        at = minimum(beta[..., :2], h, cubic)
        least = terms(at[..., 0], at[..., 1], skew)[..., None, :] @ beta[..., :, None]
        above = (columns @ beta[..., None, :, None])[..., 0] - least
        level = factor(p.y, above, w)
        w = soft(residual, p.w)
    # The cubic term moves the curvature from the middle of the runs to the optimum.
    h[..., 0, 0] += 6 * cubic * at[..., 0]
    kept = np.broadcast_to(exponents, (*cubic.shape, 3))
    return Surface(at + means, kept, h, cubic, level, residual)


def factor(y: np.ndarray, excess: np.ndarray, w: np.ndarray) -> np.ndarray:
    """L0 over the best observed loss, [.., K]; within a factor of two whatever a degenerate resample says."""
    return np.clip((w * y).sum(-1) / np.maximum((w * (1 + excess)).sum(-1), 1e-300), 0.5, 2)


def minimum(slope: np.ndarray, h: np.ndarray, cubic: np.ndarray) -> np.ndarray:
    """Minimum of slope . s + s' h s / 2 + c u^3, [.., 2]; without one, where its slope is least."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        # v is eliminated: 3 c u^2 + k u + m = 0, in the form that is stable for c = 0.
        k = h[..., 0, 0] - h[..., 0, 1] ** 2 / h[..., 1, 1]
        m = slope[..., 0] - h[..., 0, 1] * slope[..., 1] / h[..., 1, 1]
        u = -2 * m / (k + np.sqrt(np.maximum(k * k - 12 * cubic * m, 0)))
        v = -(slope[..., 1] + h[..., 0, 1] * u) / h[..., 1, 1]
    # 20: a factor of 5e8, only ever reached by a resample without an optimum.
    return np.clip(np.nan_to_num(np.stack([u, v], -1)), -20, 20)


def jacobian(p: Problem, s: Surface, skew: bool, free: bool) -> tuple[np.ndarray, np.ndarray]:
    """Derivatives of the excess by a, b, (alpha_N, alpha_D, beta,) h11, h12, h22 (, c), [.., K, R, P]; the excess."""
    u, v = offsets(p, s.optimum, s.exponents)
    h11, h12, h22 = (s.curvature[..., i, j, None, None] for i, j in ((0, 0), (0, 1), (1, 1)))
    c, n, d = s.skew[..., None, None], p.n[..., None], p.d[..., None]
    excess = h11 * u * u / 2 + h12 * u * v + h22 * v * v / 2 + c * u**3
    du, dv = -(h11 * u + h12 * v + 3 * c * u * u), -(h12 * u + h22 * v)
    exponents = [du * n, du * d, dv * d] if free else []
    columns = [du, dv, *exponents, u * u / 2, u * v, v * v / 2, *([u**3] if skew else [])]
    return np.stack(columns, -1), excess


def fit_exponents(p: Problem, start: Surface, skew: bool, steps: int = STEPS) -> Surface:
    """The same with the three exponents free, by Gauss-Newton from `start`."""
    s, w = start, soft(start.residual, p.w)
    for _ in range(steps):
        columns, excess = jacobian(p, s, skew, free=True)
        level = factor(p.y, excess, w)
        scaled, y = within(columns * level[..., None, None], p.y - level[..., None] * (1 + excess), w)
        step, _ = normal(scaled, y, w)
        residual = y - (scaled @ step[..., None, :, None])[..., 0]
        step = np.clip(step, -0.3, 0.3)
        h = s.curvature + step[..., [5, 6, 6, 7]].reshape(s.curvature.shape)
        c = s.skew + step[..., 8] if skew else s.skew
        s = Surface(s.optimum + step[..., :2], s.exponents + step[..., 2:5], h, c, level, residual)
        w = soft(residual, p.w)
    return s


def bend(residual: np.ndarray) -> np.ndarray:
    """Derivative of soft-L1's influence r / sqrt(1 + (r / SOFT)^2)."""
    return (1 + (residual / SOFT) ** 2) ** -1.5


def covariance(p: Problem, s: Surface, skew: bool, free: bool) -> np.ndarray:
    """Of (a, b) or (a, b, alpha_N, alpha_D, beta): the sandwich with the cells as clusters, [.., 2 or 5, same]."""
    columns, _ = jacobian(p, s, skew, free)
    weights = p.w * bend(s.residual)
    scaled, _ = within(columns * s.level[..., None, None], s.residual, weights)
    _, gram = normal(scaled, s.residual, weights)
    scores = (soft(s.residual, p.w) * s.residual)[..., None, :] @ scaled
    size = 5 if free else 2
    bread = np.linalg.solve(gram, np.broadcast_to(np.eye(gram.shape[-1])[:, :size], (*gram.shape[:-1], size)))
    effects = scores[..., 0, :] @ bread
    return np.swapaxes(effects, -1, -2) @ effects


def covariance_of_runs(p: Problem, s: Surface, skew: bool) -> np.ndarray:
    """Of (a, b) where cells differ by nothing but the noise of their runs, which is equal everywhere, [2, 2]."""
    columns, _ = jacobian(p, s, skew, free=False)
    scaled, _ = within(columns * s.level[..., None, None], s.residual, p.w)
    flat, w, r = scaled.reshape(-1, scaled.shape[-1]), p.w.reshape(-1, 1), s.residual
    influence = (
        float((p.w * r**2 / (1 + (r / SOFT) ** 2)).sum() / p.w.sum()) * p.used / runs_to_spare(p, skew)
    )
    slope = float((p.w * bend(r)).sum() / p.w.sum())
    bread = np.linalg.inv(flat.T @ (flat * w))[:, :2] / slope
    return influence * bread.T @ (flat.T @ (flat * w**2)) @ bread


def runs_to_spare(p: Problem, skew: bool) -> int:
    """Degrees of freedom of the runs: those that count, less the numbers fitted; at least 1."""
    return max(1, p.used - p.cells - (6 if skew else 5))


def resample(p: Problem, draws: int, rng: np.random.Generator) -> Problem:
    """`draws` problems: the cells drawn with replacement, then the runs that count in each of them."""
    chosen = rng.integers(p.cells, size=(draws, p.cells))
    counted = p.w > 0
    runs = counted.sum(-1)
    times = rng.multinomial(runs[chosen], (counted / runs[:, None])[chosen])
    return replace(
        p, n=p.n[chosen], d=p.d[chosen], x=p.x[chosen], z=p.z[chosen], y=p.y[chosen], w=p.w[chosen] * times
    )
