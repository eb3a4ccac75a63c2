"""The command that shows runs: `stepline report`."""

from pathlib import Path
from typing import Annotated

import typer

from stepline.trainer.cli_options import Json


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs: one, or several to compare.")],
    output: Annotated[
        Path | None,
        typer.Option(help="HTML file to write. \\[default: RUN/report.html; report.html for several runs]"),
    ] = None,
    png: Annotated[bool, typer.Option("--png", help="The same plots as a picture beside it, too.")] = False,
    as_json: Json = False,
) -> None:
    """Show runs in one HTML file that needs no network: curves, speed, events, plan, and how their configs differ.

    A run that goes on, or that was killed, is shown up to its last logged step.

    Example: stepline report runs/mine runs/other --output compare.html --png
    """
    from stepline.trainer.watch.report.command import run_report

    run_report(runs, output, png, as_json)
