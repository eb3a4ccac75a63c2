"""Long series in few points: what is drawn of a run, whatever its length."""

from array import array
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

BUCKETS = 600
"""Stretches of a long series; each gives its least and its largest value, and its mean."""
HEAT_CELLS = 200_000
"""Values of one run's heat map."""
HEAT_SLICES = 8, 96
"""Fewest and most stretches of steps of a heat map."""


@dataclass(frozen=True)
class Series:
    """One metric of one run."""

    step: list[int]
    value: list[float]
    mean_step: list[float]
    """Middle of each stretch; empty where `value` holds every logged value."""
    mean: list[float]
    count: int
    """Logged values."""


def thin(steps: np.ndarray, values: np.ndarray, buckets: int = BUCKETS) -> Series:
    """At most 2 · buckets + 2 of the values, `[n]`, at their own steps, `[n]`: the least and the largest of each
    of `buckets` stretches of equally many values, the first and the last. Up to 2 · buckets values are all kept."""
    count = len(values)
    if count <= 2 * buckets:
        return Series(steps.astype(int).tolist(), [_digits(v) for v in values.tolist()], [], [], count)
    edges = np.linspace(0, count, buckets + 1).astype(int)
    kept, middle, mean = {0, count - 1}, [], []
    for begin, end in pairwise(edges.tolist()):
        part = values[begin:end]
        kept |= {begin + int(part.argmin()), begin + int(part.argmax())}
        middle.append(_digits(float(steps[begin:end].mean())))
        mean.append(_digits(float(part.mean())))
    at = np.array(sorted(kept))
    return Series(
        steps[at].astype(int).tolist(), [_digits(v) for v in values[at].tolist()], middle, mean, count
    )


def _digits(value: float) -> float:
    """Seven significant digits: more than a screen can show, in half the bytes."""
    return float(f"{value:.7g}")


class Heat:
    """The mean load of every expert over stretches of equally many rows, in memory that does not grow with the run."""

    def __init__(self) -> None:
        self._sums: list[np.ndarray] = []
        self._spans: list[tuple[int, int]] = []
        self._rows: list[int] = []
        self._width = 1

    def add(self, step: int, load: list[list[float]]) -> None:
        """load: `[layers, experts]` of the row of `step`. A row of another shape than the first is left out, as is one
        with values that are not finite."""
        try:
            values = np.asarray(load, dtype=float)  # null becomes NaN
        except (ValueError, TypeError):
            return
        if not np.isfinite(values).all():
            return
        if values.ndim != 2 or (self._sums and values.shape != self._sums[0].shape):
            return
        if self._rows and self._rows[-1] < self._width:
            self._sums[-1] = self._sums[-1] + values
            self._spans[-1] = (self._spans[-1][0], step)
            self._rows[-1] += 1
            return
        if len(self._sums) == 2 * self._slices(values.size):
            self._halve()
        self._sums.append(values)
        self._spans.append((step, step))
        self._rows.append(1)

    @staticmethod
    def _slices(cells: int) -> int:
        least, most = HEAT_SLICES
        return min(max(HEAT_CELLS // (2 * max(cells, 1)), least // 2), most // 2)

    def _halve(self) -> None:
        pairs = range(0, len(self._sums), 2)
        self._sums = [self._sums[i] + self._sums[i + 1] for i in pairs]
        self._spans = [(self._spans[i][0], self._spans[i + 1][1]) for i in pairs]
        self._rows = [self._rows[i] + self._rows[i + 1] for i in pairs]
        self._width *= 2

    def result(self) -> dict | None:
        """`spans`: first and last step of each stretch; `load`: `[stretches][layers][experts]`, 1 for an even share.
        None where no row had a load."""
        if not self._sums:
            return None
        means = [total / rows for total, rows in zip(self._sums, self._rows, strict=True)]
        return {"spans": self._spans, "load": [np.round(mean, 3).tolist() for mean in means]}


class Column:
    """The values of one key, with their steps."""

    def __init__(self) -> None:
        self.steps, self.values = array("q"), array("d")

    def finite(self) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values without those that are not finite."""
        steps, values = np.array(self.steps), np.array(self.values)
        keep = np.isfinite(values)
        return steps[keep], values[keep]

    def lost_at(self) -> int | None:
        """The step since which no value is finite; None where the last one is."""
        finite = np.flatnonzero(np.isfinite(np.array(self.values)))
        begin = finite[-1] + 1 if len(finite) else 0
        return self.steps[begin] if begin < len(self.steps) else None
