"""What a sweep is asked for: sizes, budgets, learning rates and batches. Imports nothing heavy."""

import math
from dataclasses import dataclass

from stepline.trainer.errors import UserError

RANGES = {
    "sizes": (1e-6, 100),
    "widths": (1, 10**6),
    "tokens": (1, 1e18),
    "tokens_per_param": (1e-9, 1e12),
    "batch_tokens": (1, 1e15),
    "lr_points": (1, 25),
    "batch_points": (1, 25),
    "seeds": (1, 1000),
    "ranks": (1, 10**6),
}
"""What is accepted at all. Factors of 2 over 25 points are seven decades."""


@dataclass(frozen=True)
class Grid:
    """What is asked for. None: by the config and the law."""

    sizes: tuple[float, ...] | None = None
    """Fractions of the config's N."""
    widths: tuple[int, ...] | None = None
    """Hidden sizes at the config's depth, instead of `sizes`."""
    tokens: tuple[float, ...] | None = None
    """D of every size."""
    tokens_per_param: tuple[float, ...] | None = None
    """D/N of every size, instead of `tokens`."""
    lr: tuple[float, ...] | None = None
    lr_points: int = 5
    """Learning rates in factors of 2 around the law's."""
    batch_tokens: tuple[float, ...] | None = None
    batch_points: int = 3
    seeds: int = 1
    ranks: int = 1
    """Data-parallel ranks of one run."""

    def __post_init__(self) -> None:
        if self.sizes is not None and self.widths is not None:
            raise UserError("give --sizes or --widths, not both")
        if self.tokens is not None and self.tokens_per_param is not None:
            raise UserError("give --tokens or --tokens-per-param, not both")
        for name, (low, high) in RANGES.items():
            given, option = getattr(self, name), f"--{name.replace('_', '-')}"
            for value in given if isinstance(given, tuple) else (given,):
                if value is not None and not low <= value <= high:
                    raise UserError(f"{option} is {value:g}; it must be between {low:g} and {high:g}")


def numbers(text: str | None, option: str, whole: bool = False) -> tuple[float, ...] | None:
    """`1e5,2e5` as numbers; raises UserError for what is not positive, finite, whole (where asked) or is twice."""
    if text is None:
        return None
    values = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        try:
            value = float(part)
        except ValueError:
            raise UserError(
                f"{option} has '{part}', which is no number; write e.g. {option} 1e5,2e5"
            ) from None
        if not (0 < value < math.inf):
            raise UserError(f"{option} has {part}; every value must be above 0")
        if whole and value != int(value):
            raise UserError(f"{option} has {part}; every value must be a whole number")
        if value in values:
            raise UserError(f"{option} has {part} twice")
        values.append(int(value) if whole else value)
    if not values:
        raise UserError(f"{option} is empty; leave it out, or give numbers separated by commas")
    return tuple(values)


def log2_grid(centre: float, points: int) -> list[float]:
    """`points` values in factors of 2 around `centre`, which is the middle one (of two, the upper)."""
    return [centre * 2.0 ** (i - points // 2) for i in range(points)]
