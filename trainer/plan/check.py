"""`stepline laws check`: what a law's learning rate and batch would have cost on runs it may not have seen.

Regret of a cell: the loss at the law's (lr, batch), above the best loss of the cell's grid, in %. Inside the grid
the loss is bilinear in (ln lr, ln batch) between the four runs around the point, which is an upper bound wherever
the loss is convex; where one of the four is missing or diverged, between the next ones. Elsewhere it is that of a
parabola through the cell's own runs near its best, and marked as extrapolated.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np

from stepline.trainer.plan import surface
from stepline.trainer.plan.laws import STEP_LAW, StepLaw
from stepline.trainer.plan.planner import law_values
from stepline.trainer.plan.runs import Cell, RunTable

SAME = 1.01
"""Learning rates and batches whose ratio is below are one grid value: files round them differently."""
WIDEST = 4.1
"""Ratio of two grid values beyond which nothing is interpolated between them."""


@dataclass(frozen=True)
class CellCheck:
    """A law on one cell."""

    params: float
    tokens: float
    runs: int
    diverged: int
    best_lr: float
    best_batch_tokens: float
    best_loss: float
    lr: float
    """The law's."""
    batch_tokens: float
    loss: float | None
    """At the law's learning rate and batch; None where the runs cannot tell."""
    regret_percent: float | None
    extrapolated: bool
    """The law's point lies outside the grid, or among runs that diverged: in no mean or maximum."""


def check_law(law: StepLaw, table: RunTable) -> list[CellCheck]:
    """The law on every cell that has a best loss."""
    checks = []
    for cell in table.cells:
        if not cell.usable:
            continue
        lr, batch = law_values(law, cell.params, cell.tokens)
        best_lr, best_batch, best = cell.best()
        loss = on_grid(cell, lr, batch)
        inside = loss is not None
        if not inside:
            loss = on_parabola(cell, lr, batch)
        checks.append(
            CellCheck(
                params=cell.params,
                tokens=cell.tokens,
                runs=len(cell.runs),
                diverged=sum(run.diverged for run in cell.runs),
                best_lr=best_lr,
                best_batch_tokens=best_batch,
                best_loss=best,
                lr=lr,
                batch_tokens=batch,
                loss=loss,
                regret_percent=None if loss is None else 100 * (loss / best - 1),
                extrapolated=not inside,
            )
        )
    return checks


def grid_values(values: list[float]) -> list[float]:
    """Sorted values, those within `SAME` of each other once."""
    found: list[float] = []
    for value in sorted(values):
        if not found or value > found[-1] * SAME:
            found.append(value)
    return found


def brackets(values: list[float], value: float) -> list[tuple[float, float, float]]:
    """Pairs of grid values around `value`, at most `WIDEST` apart, and the share of the way in the logarithm; it is
    a little below 0 or above 1 where `value` is at one end, but for the rounding of files."""
    found = []
    for low, high in itertools.combinations(values, 2):
        if low / SAME <= value <= high * SAME and high / low <= WIDEST:
            found.append((low, high, math.log(value / low) / math.log(high / low)))
    return found


def on_grid(cell: Cell, lr: float, batch: float) -> float | None:
    """Loss between four runs of the grid, in the smallest rectangle that is whole; None where there is none."""
    points = cell.points()

    def corner(x: float, z: float) -> float:
        near = [loss for (a, b), loss in points.items() if x <= a <= x * SAME and z <= b <= z * SAME]
        return sum(near) / len(near) if near else math.inf

    best, smallest = None, (math.inf, math.inf)
    rates = brackets(grid_values([at[0] for at in points]), lr)
    batches = brackets(grid_values([at[1] for at in points]), batch)
    for (low, high, s), (few, many, t) in itertools.product(rates, batches):
        outside = sum(max(-share, share - 1, 0.0) for share in (s, t))
        s, t = (min(max(share, 0.0), 1.0) for share in (s, t))
        size = (round(math.log(high / low) * math.log(many / few), 6), outside)
        losses = [corner(low, few), corner(high, few), corner(low, many), corner(high, many)]
        if size < smallest and all(map(math.isfinite, losses)):
            shares = [(1 - s) * (1 - t), s * (1 - t), (1 - s) * t, s * t]
            best, smallest = sum(w * loss for w, loss in zip(shares, losses, strict=True)), size
    return best


def on_parabola(cell: Cell, lr: float, batch: float) -> float | None:
    """Loss by a parabola through the cell's runs near its best; None where they give none with a minimum."""
    rows = np.array([(run.lr, run.batch_tokens, run.loss) for run in cell.finished])
    if len(cell.points()) < surface.LEAST_RUNS:
        return None
    best = cell.best()[2]
    problem = surface.pack([(cell.params, cell.tokens, rows)], [best])
    kept = np.array([*STEP_LAW.lr_law.exponents, *STEP_LAW.batch_law.exponents])
    fitted = surface.fit_intercepts(problem, kept, skew=False)
    if not fitted.convex:
        return None
    s = np.log([lr, batch]) - fitted.optimum
    return float(best * fitted.level[0] * (1 + s @ fitted.curvature @ s / 2))
