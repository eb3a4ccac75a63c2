"""`stepline laws fit` and `stepline laws check`: files in, sentences or JSON out. Imports no torch."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from pydantic import ValidationError
from rich import box
from rich.console import Console
from rich.table import Table

from stepline.trainer.errors import UserError
from stepline.trainer.plan.check import CellCheck, check_law
from stepline.trainer.plan.edges import cell_notes
from stepline.trainer.plan.fit import fit_law
from stepline.trainer.plan.kind import differences
from stepline.trainer.plan.law_file import LawFile, named_law, problem_of, read_law, write_law
from stepline.trainer.plan.laws import StepLaw
from stepline.trainer.plan.runs import none_usable, read_runs
from stepline.trainer.plan.screen import screen, short


def run_fit(runs: str, output: Path, name: str | None, as_json: bool) -> None:
    """Reads runs, writes law.json, says what was fitted; raises UserError."""
    table = read_runs(runs)
    check_output(output, Path(runs))
    try:
        law = fit_law(table, name or output.stem)
    except ValidationError as error:
        raise UserError(f"{runs} gives no law that can be used: {problem_of(error)}") from None
    try:
        write_law(law, output)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error}") from None
    for note in law.notes:
        print(f"note: {note}", file=sys.stderr)
    if as_json:
        print(json.dumps(law.model_dump(mode="json"), allow_nan=False))
        return
    for line in fit_lines(law):
        print(line)
    print(f"written to {output}; use it with `stepline plan --law {output}` or budget.law={output}")


def check_output(output: Path, runs: Path) -> None:
    """Raises UserError for an output that is the input, a folder, or holds anything but a law."""
    if not output.parent.is_dir():
        raise UserError(f"no folder {output.parent} for {output.name}; make it first")
    if output.is_dir():
        raise UserError(f"{output} is a folder; name a file in it, e.g. {output / 'law.json'}")
    if not output.exists():
        return
    if output.samefile(runs):
        raise UserError(f"{output} holds the runs, which the law would overwrite; choose another --output")
    try:
        if not output.is_file():  # a pipe or device, which reading would wait for
            raise UserError(f"{output} is no file")
        read_law(output)
    except UserError:
        raise UserError(f"{output} exists and is no law, so it is kept; choose another --output") from None


def fit_lines(law: LawFile) -> list[str]:
    """What a person reads: the equations, their intervals in the middle of the runs, the method."""
    fitted = law.law()
    (n, d), (n_exponent, d_exponent) = law.lr.spread.centre, law.lr.exponents
    low, high = fitted.lr_law.interval(n, d)
    least, most = fitted.batch_law.interval(d)
    return [
        f"{law.runs} runs in {law.cells} cells, {law.diverged} diverged; {law.optimizer}, {law.sync}"
        + (f"; {law.kind}" if law.kind else ""),
        f"lr    = {law.lr.scale:.4g} * N^{n_exponent:.4g} * D^{d_exponent:.4g}",
        f"        at N = {n:.4g}, D = {d:.4g}: {fitted.lr(n, d):.4g}, 95 % interval {low:.4g} - {high:.4g}",
        f"batch = {law.batch_tokens.scale:.4g} * D^{law.batch_tokens.exponents[0]:.4g} tokens",
        f"        at D = {d:.4g}: {fitted.batch_tokens(d):,.0f}, 95 % interval {least:,.0f} - {most:,.0f}",
        f"{fitted.loss_law.equation.replace('L =', 'loss  =')}; misses by {law.loss.error_percent:.2f} %",
        f"method: {law.method}; loss: {law.loss.method}",
    ]


def run_check(law: str, runs: str, as_json: bool) -> None:
    """The regret of a law on each cell of a file of runs; raises UserError."""
    which = law_of_check(law, runs)
    table = read_runs(runs)
    checks = check_law(which, table)
    if not checks:
        raise UserError(f"{none_usable(table)}; there is no loss to compare with")
    # An extrapolated loss may be anything, below the grid's best too: it is shown but not summed up.
    known = [check.regret_percent for check in checks if not check.extrapolated]
    mean, most = (sum(known) / len(known), max(known)) if known else (None, None)
    notes = [note for cell in table.cells for note in cell_notes(cell)]
    for what, mine, theirs in (
        ("optimizer", which.optimizer, table.optimizer),
        ("sync", which.sync, table.sync),
    ):
        if mine != theirs:
            notes.append(f"{which.source.name} was fitted with {what} {mine}, these runs with {theirs}")
    if told := differences(which.kind, table.kind):
        notes.append(f"{which.source.name} was fitted on models with {' and '.join(told)} as in these runs")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if as_json:
        told = {
            "law": which.source.name,
            "runs": table.path,
            "mean_regret_percent": mean,
            "max_regret_percent": most,
            "cells": [asdict(check) for check in checks],
            "notes": notes,
        }
        print(json.dumps(told, allow_nan=False))
        return
    show_checks(checks, screen())
    if known:
        told = f"regret {mean:.3f} % on average, at most {most:.3f} %"
        print(f"{which.source.name}: {told} ({len(known)} of {len(checks)} cells)")
    else:
        print(f"{which.source.name}: no cell has runs around it, near enough to tell")


def law_of_check(law: str, runs: str) -> StepLaw:
    """The law of `laws check`; raises UserError, which says so where law and runs are swapped."""
    try:
        return named_law(law)
    except UserError:
        try:
            named_law(runs)
        except UserError:
            pass
        else:
            told = f"{runs} is a law and {law} is none"
            raise UserError(f"{told}: the law comes first, stepline laws check {runs} {law}") from None
        raise


def show_checks(checks: list[CellCheck], console: Console) -> None:
    """One row a cell, losses in nats per token; * marks an extrapolated loss, - one that the runs cannot tell."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in ("N", "D", "runs", "best lr", "batch", "loss", "law's lr", "batch", "loss", "regret, %"):
        table.add_column(name, justify="right", overflow="fold")
    for c in checks:
        mark = "*" if c.extrapolated else ""
        table.add_row(
            short(c.params),
            short(c.tokens),
            str(c.runs),
            short(c.best_lr),
            short(c.best_batch_tokens),
            f"{c.best_loss:.3f}",
            short(c.lr),
            short(c.batch_tokens),
            "-" if c.loss is None else f"{c.loss:.3f}",
            "-" if c.regret_percent is None else f"{c.regret_percent:.3f}{mark}",
        )
    console.print(table)
    if any(c.extrapolated for c in checks):
        console.print(
            "* outside of the cell's grid, or between runs too far apart: by a parabola through its runs, in no mean "
            "(-: too few runs for one)",
            soft_wrap=True,
        )
