"""`stepline laws fit` and `stepline laws check`: files in, sentences or JSON out. Imports no torch."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from stepline.trainer.errors import UserError
from stepline.trainer.plan.check import CellCheck, check_law
from stepline.trainer.plan.edges import cell_notes
from stepline.trainer.plan.fit import fit_law
from stepline.trainer.plan.law_file import LawFile, find_law, read_law, write_law
from stepline.trainer.plan.laws import STEP_LAW
from stepline.trainer.plan.runs import read_runs

PUBLISHED = "step-law"
"""The name by which `laws check` knows the law that `stepline plan` uses by default."""


def run_fit(runs: str, output: Path, name: str | None, as_json: bool) -> None:
    """Reads runs, writes law.json, says what was fitted; raises UserError."""
    table = read_runs(runs)
    if not output.parent.is_dir():
        raise UserError(f"no folder {output.parent} for {output.name}; make it first")
    law = fit_law(table, name or output.stem)
    try:
        write_law(law, output)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error}") from None
    for note in law.notes:
        print(f"note: {note}", file=sys.stderr)
    if as_json:
        print(json.dumps(law.model_dump(mode="json")))
        return
    for line in fit_lines(law):
        print(line)
    print(f"written to {output}; use it with `stepline plan --law {output}` or budget.law={output}")


def fit_lines(law: LawFile) -> list[str]:
    """What a person reads: the equations, their intervals in the middle of the runs, the method."""
    fitted = law.law()
    (n, d), (n_exponent, d_exponent) = law.lr.spread.centre, law.lr.exponents
    low, high = fitted.lr_law.interval(n, d)
    least, most = fitted.batch_law.interval(d)
    return [
        f"{law.runs} runs in {law.cells} cells, {law.diverged} diverged; {law.optimizer}, {law.sync}",
        f"lr    = {law.lr.scale:.4g} * N^{n_exponent:.4g} * D^{d_exponent:.4g}",
        f"        at N = {n:.4g}, D = {d:.4g}: {fitted.lr(n, d):.4g}, 95 % interval {low:.4g} - {high:.4g}",
        f"batch = {law.batch_tokens.scale:.4g} * D^{law.batch_tokens.exponents[0]:.4g} tokens",
        f"        at D = {d:.4g}: {fitted.batch_tokens(d):,.0f}, 95 % interval {least:,.0f} - {most:,.0f}",
        f"{fitted.loss_law.equation.replace('L =', 'loss  =')}; misses by {law.loss.error_percent:.2f} %",
        f"method: {law.method}; loss: {law.loss.method}",
    ]


def run_check(law: str, runs: str, as_json: bool) -> None:
    """The regret of a law on each cell of a file of runs; raises UserError."""
    which = STEP_LAW if law == PUBLISHED else read_law(find_law(law))
    table = read_runs(runs)
    checks = check_law(which, table)
    if not checks:
        raise UserError(f"all {table.runs} runs of {table.path} diverged; there is no loss to compare with")
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
        print(json.dumps(told))
        return
    show_checks(checks, Console())
    if known:
        told = f"regret {mean:.3f} % on average, at most {most:.3f} %"
        print(f"{which.source.name}: {told} ({len(known)} of {len(checks)} cells)")
    else:
        print(f"{which.source.name}: no cell's grid holds it")


def show_checks(checks: list[CellCheck], console: Console) -> None:
    """One row a cell, losses in nats per token; * marks an extrapolated loss, - one that the runs cannot tell."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in ("N", "D", "runs", "best lr", "batch", "loss", "law's lr", "batch", "loss", "regret, %"):
        table.add_column(name, justify="right", no_wrap=True)
    for c in checks:
        mark = "*" if c.extrapolated else ""
        table.add_row(
            short(c.params),
            short(c.tokens),
            str(c.runs),
            f"{c.best_lr:.3g}",
            short(c.best_batch_tokens),
            f"{c.best_loss:.3f}",
            f"{c.lr:.3g}",
            short(c.batch_tokens),
            "-" if c.loss is None else f"{c.loss:.3f}",
            "-" if c.regret_percent is None else f"{c.regret_percent:.3f}{mark}",
        )
    console.print(table)
    if any(c.extrapolated for c in checks):
        console.print(
            "* outside of the cell's grid, by a parabola through its runs, in no mean (-: too few runs for one)",
            soft_wrap=True,
        )


def short(value: float) -> str:
    """Three digits with k, M, B or T."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
