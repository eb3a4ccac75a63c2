"""Options that several commands share."""

from typing import Annotated

import typer

from stepline.trainer.errors import UserError

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to standard output, nothing else.")]


def _each_once(overrides: list[str] | None) -> list[str] | None:
    """Raises UserError for a key that is given two values, of which the first would be lost in silence."""
    given: dict[str, str] = {}
    for override in overrides or ():
        key, _, value = override.partition("=")
        if (first := given.setdefault(key, value)) != value:
            raise UserError(f"{key} is given twice, as {first} and as {value}; leave out one of the two")
    return overrides


Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value …", callback=_each_once)]
