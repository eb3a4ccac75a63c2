"""Kinds of values that several sections of the configuration have."""

from pathlib import Path
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


def with_home(value: object) -> object:
    """A path that begins with `~` or `~user`, as in a shell, which leaves it as it is behind `key=`.

    Raises ValueError where that home is not known.
    """
    if not isinstance(value, str | Path):
        return value
    path = Path(value)
    if not str(path).startswith("~"):
        return value
    if not str(value).startswith("~"):  # `./~x` is no home, and stands in config.yaml without the dot
        return path.absolute()
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError(f"no home folder is known for {path.parts[0]}; write the whole path") from None


Count = Annotated[int, BeforeValidator(_count)]
Auto = Literal["auto"]
HomePath = Annotated[Path, BeforeValidator(with_home)]
