"""`stepline laws fit`: a law for learning rate and batch, and one for the loss, from a user's own runs.

The procedure: `surface.py` fits L/L0(cell) = 1 + excess around the optimum to the runs near each cell's minimum,
with Step Law's exponents kept (arXiv 2503.04715) and two intercepts. The exponents are free only with at least
`LEAST_SIZES` N and D, `LEAST_RUNS_A_CELL` runs a cell and 95 % intervals narrower than `WIDEST_INTERVAL`: they are
weakly identified, and a law is judged by its regret. Intervals: bootstrap-t over the cells, then over the runs in
them; a percentile bootstrap over few cells is too narrow. Kept exponents have the covariance that Step Law's have, so
that an interval widens away from the cells.
"""

import math
from dataclasses import dataclass

import numpy as np

from stepline.trainer.errors import UserError
from stepline.trainer.plan import surface
from stepline.trainer.plan.edges import cell_notes
from stepline.trainer.plan.law_file import FittedPowerLaw, FittedSpread, LawFile
from stepline.trainer.plan.laws import STEP_LAW, Spread
from stepline.trainer.plan.loss_fit import fit_loss
from stepline.trainer.plan.runs import Cell, RunTable, none_usable
from stepline.trainer.plan.surface import Problem, Surface

LEAST_SIZES, LEAST_RUNS_A_CELL, WIDEST_INTERVAL = 3, 9, 0.15
CELLS_OF_BOOTSTRAP_T = 6
"""Fewer cells are often drawn all alike, and a spread of nothing cannot studentise."""
TOGETHER = 0.95
"""Correlation of ln N and ln D over the cells beyond which they are one variable."""
FARTHEST = 4
"""Factor by which the optimum may lie outside of the runs of a middling cell."""
DRAWS, DRAW_STEPS = 500, 10
"""Resamples, and iterations for each: they end within 1e-3 of a standard error of where 30 would."""
CHUNK = 20_000
"""Numbers in one column of a chunk of resamples: what stays in a processor's cache."""


@dataclass(frozen=True)
class Uncertainty:
    """Covariance [p, p] of (a, b) or (a, b, alpha_N, alpha_D, beta), to be multiplied by quantiles^2 [p]."""

    covariance: np.ndarray
    quantiles: np.ndarray
    words: str

    @property
    def half_widths(self) -> np.ndarray:
        """Half of the 95 % interval of each parameter, [p]."""
        return self.quantiles * np.sqrt(np.diagonal(self.covariance))


def fit_law(table: RunTable, name: str, draws: int = DRAWS, seed: int = 0) -> LawFile:
    """The law of a file of runs; raises UserError with one sentence where the runs do not identify it."""
    cells = [cell for cell in table.cells if cell.usable]
    if not cells:
        raise UserError(f"{none_usable(table)}; lower the learning rates")
    problem = surface.pack(
        [(c.params, c.tokens, np.array([(r.lr, r.batch_tokens, r.loss) for r in c.finished])) for c in cells],
        [cell.best()[2] for cell in cells],
    )
    kept = np.array([*STEP_LAW.lr_law.exponents, *STEP_LAW.batch_law.exponents])
    check_runs(table, cells, problem, kept)
    skew = surface.carries_skew(problem, kept)
    fitted = surface.fit_intercepts(problem, kept, skew)
    check_inside(table, cells, problem, fitted)
    unsure = uncertainty(problem, fitted, skew, False, draws, seed)
    fitted, unsure, about_exponents = exponents_too(table, problem, fitted, unsure, skew, draws, seed)

    notes = [note for cell in table.cells for note in cell_notes(cell)]
    law = LawFile(
        name=name,
        optimizer=table.optimizer,
        sync=table.sync,
        assumes=table.assumes,
        held_out=table.held_out,
        kind=table.kind,
        **power_laws(problem, fitted, unsure),
        params=(cells[0].params, cells[-1].params),
        tokens=(min(c.tokens for c in cells), max(c.tokens for c in cells)),
        tokens_per_param=(min(c.tokens / c.params for c in cells), max(c.tokens / c.params for c in cells)),
        method=f"{about_exponents}; {problem.used} runs within {100 * surface.WINDOW:g} % of their cell's best, "
        f"or among its {surface.LEAST_RUNS} best, parabola{' with skew' if skew else ''}; {unsure.words}",
        cells=len(cells),
        runs=table.runs,
        diverged=table.diverged,
        loss=fit_loss(
            [(c.params, c.tokens, float(v) * c.best()[2]) for c, v in zip(cells, fitted.level, strict=True)]
        ),
    )
    law.notes = notes + above_diverged(table, law)
    return law


def check_runs(table: RunTable, cells: list[Cell], problem: Problem, kept: np.ndarray) -> None:
    """Raises UserError for runs from which no curvature can be told."""
    if problem.cells == 1 and problem.used < LEAST_RUNS_A_CELL:
        raise UserError(
            f"{table.path} has one cell ({cells[0]}) with {problem.used} runs near its best; "
            "give at least 9, 3 learning rates x 3 batches, or more cells"
        )
    if problem.used < problem.cells + 6:
        raise UserError(
            f"{table.path} has {problem.used} runs near the best of their {problem.cells} cells; "
            f"the fit needs at least {problem.cells + 6}, better 9 a cell"
        )
    u, v = surface.offsets(problem, surface.middle(problem, kept), kept)
    columns, _ = surface.within(surface.terms(u, v, False), problem.y, problem.w)
    flat = (columns * np.sqrt(problem.w)[..., None]).reshape(-1, 5)
    scale = np.sqrt((flat**2).sum(0))
    for size, what in ((scale[0], "learning rate"), (scale[1], "batch")):
        if size < 1e-9:
            raise UserError(f"{table.path} has one {what} a cell; give at least three in every cell")
    if np.linalg.svd(flat / scale, compute_uv=False)[-1] < 1e-3:
        raise UserError(
            f"{table.path} has too few learning rates or batches a cell for a parabola; give at least three of each"
        )


def check_inside(table: RunTable, cells: list[Cell], problem: Problem, fitted: Surface) -> None:
    """Raises UserError where there is no minimum, or one far outside of most cells' grids."""
    hints = [note for cell in cells for note in cell_notes(cell)]
    hint = hints[0] if hints else "run learning rates and batches farther apart, or more seeds"
    if not fitted.convex:
        raise UserError(f"the losses of {table.path} show no minimum in learning rate and batch: {hint}")
    u, v = surface.offsets(problem, fitted.optimum, fitted.exponents)
    for offset, what in ((u, "learning rate"), (v, "batch")):
        near = np.where(problem.w > 0, offset, np.nan)
        beyond = np.maximum(np.nanmin(near, -1), -np.nanmax(near, -1))
        if np.median(beyond) > math.log(FARTHEST):
            raise UserError(f"the best {what} by {table.path} lies far outside of its runs: {hint}")


def bootstrap(
    problem: Problem, fitted: Surface, skew: bool, free: bool, draws: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Parameters less the fit's, [draws, p], and their standard errors, [draws, p], of resamples with a minimum."""
    rng = np.random.default_rng(seed)
    deviations, errors, middle = [], [], parameters(fitted, free)
    kept = fitted.exponents
    at_once = max(1, CHUNK // problem.y.size)
    for start in range(0, draws, at_once):
        sample = surface.resample(problem, min(at_once, draws - start), rng)
        other = surface.fit_intercepts(sample, kept, skew, DRAW_STEPS)
        if free:
            other = surface.fit_exponents(sample, other, skew, DRAW_STEPS)
        error = np.sqrt(np.diagonal(surface.covariance(sample, other, skew, free), axis1=-2, axis2=-1))
        deviation = parameters(other, free) - middle
        fine = (
            other.convex & np.isfinite(deviation).all(-1) & np.isfinite(error).all(-1) & (error > 0).all(-1)
        )
        deviations.append(deviation[fine])
        errors.append(error[fine])
    return np.concatenate(deviations), np.concatenate(errors)


def parameters(fitted: Surface, free: bool) -> np.ndarray:
    """a, b and, where free, alpha_N, alpha_D, beta: [.., 2 or 5]."""
    return np.concatenate([fitted.optimum, fitted.exponents], -1) if free else fitted.optimum


def uncertainty(
    problem: Problem, fitted: Surface, skew: bool, free: bool, draws: int, seed: int
) -> Uncertainty:
    """95 % intervals: bootstrap-t with the sandwich clustered by cells as its scale; Student's t where cells are few.

    With few cells the larger of two variances counts: the sandwich's, and that of runs alone.
    """
    spread = surface.covariance(problem, fitted, skew, free)
    if problem.cells >= CELLS_OF_BOOTSTRAP_T:
        deviations, errors = bootstrap(problem, fitted, skew, free, draws, seed)
        if len(deviations) < draws / 2:
            raise UserError(
                f"only {len(deviations)} of {draws} resamples of the runs have a minimum; give more runs or seeds"
            )
        words = f"intervals: bootstrap-t, {draws} resamples of the cells, then of their runs"
        return Uncertainty(spread, np.quantile(abs(deviations) / errors, 0.95, axis=0), words)
    of_runs = surface.covariance_of_runs(problem, fitted, skew)
    if problem.cells == 1:
        freedom, spread = surface.runs_to_spare(problem, skew), of_runs
        told = "from the noise of the runs of one cell, how cells differ is not in it"
    else:
        freedom = problem.cells - 1
        larger = np.maximum(np.diagonal(spread) * problem.cells / freedom, np.diagonal(of_runs))
        spread, told = np.diag(larger), f"from {problem.cells} cells"
    words = f"intervals: Student's t with {freedom} degrees of freedom, {told}"
    return Uncertainty(spread, np.full(len(spread), student_t(freedom)), words)


def student_t(freedom: int) -> float:
    """97.5 % quantile of Student's t: a table, then Cornish and Fisher's expansion (error below .1 %)."""
    table = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706}
    if freedom in table:
        return table[freedom]
    z = 1.959964
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom**i for i, term in enumerate(terms, 1))


def exponents_too(
    table: RunTable, problem: Problem, fitted: Surface, unsure: Uncertainty, skew: bool, draws: int, seed: int
) -> tuple[Surface, Uncertainty, str]:
    """Fit and intervals with the exponents free where the runs carry them, as they were otherwise; and why."""
    cells = [cell for cell in table.cells if cell.usable]
    sizes, budgets = len({c.params for c in cells}), len({c.tokens for c in cells})
    least = min(len(c.finished) for c in cells)
    kept = "two intercepts fitted, Step Law's exponents kept"
    if problem.cells < CELLS_OF_BOOTSTRAP_T:
        return fitted, unsure, f"{kept} ({problem.cells} cells)"
    if sizes < LEAST_SIZES or budgets < LEAST_SIZES or least < LEAST_RUNS_A_CELL:
        return fitted, unsure, f"{kept} ({sizes} N, {budgets} D, at least {least} runs a cell)"
    if abs(np.corrcoef(problem.n, problem.d)[0, 1]) > TOGETHER:
        return fitted, unsure, f"{kept} (N and D rise together: their exponents cannot be told apart)"
    free, widest = surface.fit_exponents(problem, fitted, skew), math.inf
    if free.convex and np.isfinite(parameters(free, True)).all():
        # The sandwich alone is quick and, with few cells, the narrower: where it is too wide, so is the bootstrap.
        spread = surface.covariance(problem, free, skew, True)
        widest = 2 * student_t(problem.cells - 1) * math.sqrt(np.diagonal(spread)[2:].max())
        if widest < WIDEST_INTERVAL:
            own = uncertainty(problem, free, skew, True, draws, seed)
            widest = 2 * own.half_widths[2:].max()
    if not widest < WIDEST_INTERVAL:
        return fitted, unsure, f"{kept} (an exponent's 95 % interval would be {widest:.2f} wide)"
    return free, own, f"intercepts and exponents fitted (95 % intervals at most {widest:.2f} wide)"


def power_laws(problem: Problem, fitted: Surface, unsure: Uncertainty) -> dict[str, FittedPowerLaw]:
    """The two laws with their spreads, centred at the problem's centre."""
    (n0, d0), e = problem.centre, [float(value) for value in fitted.exponents]
    size = len(unsure.quantiles)
    lr_rows, batch_rows = ([0, 2, 3], [1, 4]) if size == 5 else ([0], [1])
    a, b = (float(value) for value in fitted.optimum)

    def law(
        middle: float, exponents: list[float], centre: tuple[float, ...], rows: list[int], published: Spread
    ) -> FittedPowerLaw:
        quantile = float(unsure.quantiles[rows[0]])
        # One quantile for all: the exponents' own are put into their variances.
        stretch = unsure.quantiles[rows] / quantile
        some = unsure.covariance[np.ix_(rows, rows)] * np.outer(stretch, stretch)
        spread = np.zeros((len(centre) + 1, len(centre) + 1))
        if len(rows) == 1:  # normal quantiles, as published
            spread[1:, 1:] = np.array(published.covariance)[1:, 1:] * (published.quantile / quantile) ** 2
        spread[: len(rows), : len(rows)] = some
        log_scale = middle - sum(x * math.log(c) for x, c in zip(exponents, centre, strict=True))
        return FittedPowerLaw(
            scale=math.exp(log_scale),
            exponents=exponents,
            spread=FittedSpread(
                centre=list(centre), mean=[middle, *exponents], covariance=spread.tolist(), quantile=quantile
            ),
        )

    return {
        "lr": law(a, e[:2], (n0, d0), lr_rows, STEP_LAW.lr_law.spread),
        "batch_tokens": law(b, e[2:], (d0,), batch_rows, STEP_LAW.batch_law.spread),
    }


def above_diverged(table: RunTable, law: LawFile) -> list[str]:
    """Cells in which a run diverged at no more than the law's learning rate and no smaller a batch."""
    notes, fitted = [], law.law()
    for cell in table.cells:
        lr, batch = fitted.lr(cell.params, cell.tokens), fitted.batch_tokens(cell.tokens)
        bounds = [run.lr for run in cell.runs if run.diverged and run.lr <= lr and run.batch_tokens >= batch]
        if bounds:
            notes.append(f"{cell}: a run with lr {min(bounds):.3g} diverged, the law says {lr:.3g}; lower it")
    return notes
