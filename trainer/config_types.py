"""Kinds of values that several sections of the configuration have."""

from typing import Annotated, Literal

from pydantic import BeforeValidator

YEAR_S = 31_536_000
"""Most seconds that something waits for; beyond some 290 years torch's clocks overflow."""


def _count(value: object) -> object:
    """Counts may be written 1e9 or 1_000_000; a fraction is left for pydantic to refuse."""
    if isinstance(value, str) and value != "auto":
        try:
            value = float(value)
        except ValueError:
            return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def off(value: object) -> object:
    """YAML reads a bare `off` as false."""
    return "off" if value is False else value


Count = Annotated[int, BeforeValidator(_count)]
Auto = Literal["auto"]
