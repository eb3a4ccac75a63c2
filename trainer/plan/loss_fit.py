"""The user's own loss law: Epoch's exponents (arXiv 2404.10102), entropy and scales as far as the cells tell."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from stepline.trainer.plan.law_file import FittedLoss
from stepline.trainer.plan.laws import EPOCH


@dataclass(frozen=True)
class Form:
    """Which numbers of E + A N^-alpha + B D^-beta are fitted; the others keep Epoch's ratios."""

    words: str
    columns: tuple[tuple[float, float, float], ...]
    """Multiples of (1, N^-alpha, D^-beta) that each fitted number stands for."""
    fixed: tuple[float, float, float] = (0.0, 0.0, 0.0)


A, B = EPOCH.params_scale, EPOCH.tokens_scale
FORMS = (
    Form("one factor of Epoch's E, A and B", ((EPOCH.entropy, A, B),)),
    Form("E; A and B are Epoch's", ((1, 0, 0),), (0, A, B)),
    Form("E and one factor of Epoch's A and B", ((1, 0, 0), (0, A, B))),
    Form("E, A and B", ((1, 0, 0), (0, 1, 0), (0, 0, 1))),
)


def fit_loss(cells: Sequence[tuple[float, float, float]]) -> FittedLoss:
    """The law through (N, D, best loss in nats per token) of each cell, by relative non-negative least squares.

    Of `FORMS`, that which predicts a cell from all the others best (leave-one-out); a form needs two cells more
    than it has numbers, three sizes or budgets for each of A and B, and the positive E that a loss has. With a
    single cell: E alone where that is positive, else one factor.
    """
    data = np.array(cells, float)
    several = len({n for n, _, _ in cells}) >= 3 and len({d for _, d, _ in cells}) >= 3
    best, found = np.inf, None
    for form in FORMS:
        count = len(form.columns)
        if len(cells) < count + (2 if count > 1 else 0) or (count == 3 and not several):
            continue
        values = _solve(form, data)
        if values is None or values[0] <= 0:
            continue
        if len(cells) == 1:
            error = 0.0
        else:
            error = _leave_one_out(form, data)
        # With one cell every form is exact: the later one, E alone, is preferred.
        if error < best or (len(cells) == 1 and count == 1):
            best, found = error, (form, values)
    form, (entropy, by_params, by_tokens) = found
    misses = _basis(data) @ np.array([entropy, by_params, by_tokens]) / data[:, 2] - 1
    return FittedLoss(
        entropy=entropy,
        params_scale=by_params,
        params_exponent=EPOCH.params_exponent,
        tokens_scale=by_tokens,
        tokens_exponent=EPOCH.tokens_exponent,
        method=f"fitted: {form.words}; exponents are Epoch's",
        error_percent=100 * float(np.sqrt(np.mean(misses**2))),
        left_out_error_percent=None if len(cells) == 1 else 100 * float(best),
    )


def _basis(data: np.ndarray) -> np.ndarray:
    """1, N^-alpha, D^-beta, [cells, 3]."""
    return np.stack(
        [np.ones(len(data)), data[:, 0] ** -EPOCH.params_exponent, data[:, 1] ** -EPOCH.tokens_exponent], -1
    )


def _solve(form: Form, data: np.ndarray) -> tuple[float, float, float] | None:
    """E, A, B of a form; None where no number is positive."""
    basis, loss = _basis(data), data[:, 2]
    columns = basis @ np.array(form.columns, float).T / loss[:, None]
    numbers = non_negative(columns, 1 - basis @ np.array(form.fixed) / loss)
    values = np.array(form.fixed) + numbers @ np.array(form.columns, float)
    return tuple(map(float, values)) if numbers.any() else None


def _leave_one_out(form: Form, data: np.ndarray) -> float:
    """Root mean square of the relative errors of cells that the fit did not see."""
    errors = []
    for i in range(len(data)):
        values = _solve(form, np.delete(data, i, 0))
        if values is None:
            return np.inf
        errors.append(float((_basis(data[i : i + 1]) @ np.array(values))[0]) / data[i, 2] - 1)
    return float(np.sqrt(np.mean(np.square(errors))))


def non_negative(columns: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Least squares with non-negative coefficients, [p], by trying every set of positive ones: p is at most 3."""
    size = columns.shape[1]
    best, found = float(y @ y), np.zeros(size)
    for count in range(1, size + 1):
        for chosen in map(list, combinations(range(size), count)):
            values = np.linalg.lstsq(columns[:, chosen], y, rcond=None)[0]
            rest = y - columns[:, chosen] @ values
            if (values > 0).all() and rest @ rest < best:
                best, found = float(rest @ rest), np.zeros(size)
                found[chosen] = values
    return found
