"""What a law is made of: a power law, how well it is known, and where it comes from. Imports nothing heavy."""

import math
from dataclasses import dataclass

NORMAL_95 = 1.959964


@dataclass(frozen=True)
class Spread:
    """How well a power law is known: mean and covariance of (ln value, exponents…) at `centre`.

    Centred, because ln(scale) and the exponents of one fit are almost collinear when extrapolated to N = D = 1.
    """

    centre: tuple[float, ...]
    mean: tuple[float, ...]
    covariance: tuple[tuple[float, ...], ...]
    quantile: float = NORMAL_95
    """Standard deviations of a two-sided 95 % interval; Student's t where a fit is from few cells."""

    def interval(self, arguments: tuple[float, ...]) -> tuple[float, float]:
        """95 % interval of the law's value at the arguments."""
        x = [1.0, *(math.log(a / c) for a, c in zip(arguments, self.centre, strict=True))]
        middle = sum(m * xi for m, xi in zip(self.mean, x, strict=True))
        variance = sum(xi * xj * self.covariance[i][j] for i, xi in enumerate(x) for j, xj in enumerate(x))
        half = self.quantile * math.sqrt(max(variance, 0.0))
        return tuple(math.exp(min(max(x, -700.0), 700.0)) for x in (middle - half, middle + half))

    def exponent_intervals(self) -> list[tuple[float, float]]:
        """95 % interval of each exponent."""
        halves = [self.quantile * math.sqrt(self.covariance[i][i]) for i in range(1, len(self.mean))]
        return [(m - h, m + h) for m, h in zip(self.mean[1:], halves, strict=True)]


@dataclass(frozen=True)
class PowerLaw:
    """value = scale * product of argument_i ^ exponent_i."""

    scale: float
    exponents: tuple[float, ...]
    spread: Spread | None = None

    def __call__(self, *arguments: float) -> float:
        return self.scale * math.prod(a**e for a, e in zip(arguments, self.exponents, strict=True))

    def interval(self, *arguments: float) -> tuple[float, float] | None:
        """95 % interval at the arguments; None where the source gives none."""
        return None if self.spread is None else self.spread.interval(arguments)


Range = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Ranges:
    """What was fitted on; None where that is not known, or no limit."""

    params: Range | None = None
    """N: of a mixture of experts all weights."""
    tokens: Range | None = None
    """D."""
    tokens_per_param: Range | None = None
    flops: Range | None = None
    """C = 6 N D; of a mixture with the weights that one token uses."""
    active_share: Range | None = None
    """Of the weights, those that one token uses."""


@dataclass(frozen=True)
class Source(Ranges):
    """Where a law comes from and where it holds."""

    name: str
    paper: str
    units: str
    mixtures: Ranges | None = None
    """Of the runs with mixtures of experts, where they are others."""

    def outside(self, params: float, tokens: float, active: float | None = None) -> list[str]:
        """What lies outside the fitted range, each in words; empty when everything is inside.

        active: weights that one token uses; all of them when None.
        """
        active = params if active is None else active
        limits_of = self.mixtures if self.mixtures is not None and active < params else self
        found = []
        for what, value, limits in (
            ("N", params, limits_of.params),
            ("D", tokens, limits_of.tokens),
            ("D/N", tokens / params, limits_of.tokens_per_param),
            ("C = 6ND", 6 * active * tokens, limits_of.flops),
            ("active share", active / params, limits_of.active_share),
        ):
            if limits is not None and not limits[0] <= value <= limits[1]:
                found.append(f"{what} = {value:.3g} outside {limits[0]:.3g}-{limits[1]:.3g}")
        return found
