"""Options that several commands share."""

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to standard output, nothing else.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="section.key=value …; of a key given twice the last counts.")
]
Device = Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu or cuda.")]
