"""The runs of a sweep as CSV: `stepline sweep` writes them, `stepline laws` reads them. Imports nothing heavy.

Two headers are understood. Our own, `COLUMNS`: params is N (non-embedding linear weights), tokens is D, batch_tokens
the global batch in tokens, kind what the model is beside its size (kind.py), loss in nats per token (empty when the
run diverged), diverged 0 or 1. And that of the public Step Law data (arXiv 2503.04715): N, D, lr, bs (sequences of
2048), "smooth loss"; Na, the weights that one token uses, where there are experts. That data has no mark for
divergence: a loss above `DIVERGED` times the cell's best counts as diverged.
"""

import csv
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from stepline.trainer.errors import UserError, nearest
from stepline.trainer.plan.planner import LAW_RANGE, PARAMS_RANGE, TOKENS_RANGE

COLUMNS = (
    "name", "params", "tokens", "lr", "batch_tokens", "weight_decay", "optimizer", "sync", "schedule", "kind", "seed",
    "loss", "diverged", "held_out", "seconds",
)  # fmt: skip
REQUIRED = ("params", "tokens", "lr", "batch_tokens", "loss")
STEP_LAW_NAMES = {
    "params": "N",
    "tokens": "D",
    "lr": "lr",
    "batch_tokens": "bs",
    "active_params": "Na",
    "seq_len": "seq_len",
}
STEP_LAW_SEQUENCE = 2048
DIVERGED = 1.5
BOUNDS = {
    "params": PARAMS_RANGE,
    "active_params": PARAMS_RANGE,
    "tokens": TOKENS_RANGE,
    "lr": LAW_RANGE,
    "batch_tokens": LAW_RANGE,
}
"""What a run may have: as for a plan. A loss above LAW_RANGE is one that diverged."""
SAME_TOKENS = 1.02
"""Runs whose D differ by less belong to one cell: steps are whole, so D is a multiple of the batch."""


@dataclass(frozen=True)
class Run:
    """One training run."""

    params: float
    """N: non-embedding linear weights; of a mixture of experts all of them."""
    tokens: float
    """D."""
    lr: float
    batch_tokens: float
    loss: float
    """Nats per token; infinite when the run diverged."""
    active_params: float = 0.0
    """Linear weights that one token uses, where the file says; 0 otherwise."""

    @property
    def diverged(self) -> bool:
        return math.isinf(self.loss)


@dataclass(frozen=True)
class Cell:
    """All runs of one (N, D)."""

    params: float
    tokens: float
    runs: tuple[Run, ...]

    @property
    def finished(self) -> list[Run]:
        """Runs with a loss."""
        return [run for run in self.runs if not run.diverged]

    def points(self) -> dict[tuple[float, float], float]:
        """(lr, batch in tokens) to the loss, averaged over seeds; infinite where any seed diverged."""
        losses: dict[tuple[float, float], list[float]] = {}
        for run in self.runs:
            losses.setdefault((run.lr, run.batch_tokens), []).append(run.loss)
        return {at: sum(found) / len(found) for at, found in losses.items()}

    def best(self) -> tuple[float, float, float]:
        """lr, batch in tokens and loss of the best point."""
        points = self.points()
        at = min(points, key=points.__getitem__)
        return *at, points[at]

    @property
    def usable(self) -> bool:
        """Whether all seeds of some point finished, so that there is a best loss."""
        return math.isfinite(self.best()[2])

    def __str__(self) -> str:
        return f"N = {self.params:.4g}, D = {self.tokens:.4g}"


@dataclass(frozen=True)
class RunTable:
    """A file of runs."""

    path: str
    cells: tuple[Cell, ...]
    optimizer: str
    sync: str
    assumes: str
    """Schedule and fixed hyperparameters of the runs, in words."""
    held_out: str = ""
    """What the losses were measured on (`expect.held_out_text`), where the file says."""
    kind: str = ""
    """Of all models (`kind.kind_of`), where the file says."""

    @property
    def runs(self) -> int:
        return sum(len(cell.runs) for cell in self.cells)

    @property
    def diverged(self) -> int:
        return sum(run.diverged for cell in self.cells for run in cell.runs)


def none_usable(table: RunTable) -> str:
    """Why a table has no cell with a best loss."""
    if table.diverged == table.runs:
        return f"all {table.runs} runs of {table.path} diverged"
    return f"{table.path} has no point where all seeds finished"


def read_runs(path: str | Path) -> RunTable:
    """The runs of a CSV file, in cells; raises UserError with one sentence that names the file and the line."""
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = list(csv.reader(file, skipinitialspace=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    lines = [
        (i, [field.strip() for field in row]) for i, row in enumerate(table, 1) if any(map(str.strip, row))
    ]
    if not lines:
        raise UserError(f"{path} is empty; give the runs.csv of `stepline sweep`")
    header = lines[0][1]
    names = column_names(path, header)
    rows = []
    for number, fields in lines[1:]:
        if len(fields) != len(header):
            raise UserError(f"{path} line {number} has {len(fields)} fields, the header {len(header)}")
        rows.append((number, dict(zip(header, fields, strict=True))))
    if not rows:
        raise UserError(f"{path} has a header but no runs")
    ours = names["params"] == "params"
    runs = [parse(path, number, row, names) for number, row in rows]
    cells = group(runs)
    if not ours:
        cells = tuple(mark_diverged(cell) for cell in cells)
    optimizer = constant(path, rows, "optimizer", "adamw")
    sync = constant(path, rows, "sync", "all_reduce")
    if not ours:
        return RunTable(str(path), cells, optimizer, sync, "final learning rate 1e-5, weight decay .1")
    assumes = [f"schedule {schedule}"] if (schedule := constant(path, rows, "schedule", "")) else []
    if decays := weight_decays(path, rows):
        assumes.append(f"weight decay {decays[0]}" + ("" if len(decays) == 1 else f" to {decays[-1]}"))
    held_out, kind = (constant(path, rows, column, "") for column in ("held_out", "kind"))
    return RunTable(str(path), cells, optimizer, sync, ", ".join(assumes), held_out, kind)


def column_names(path: Path, header: list[str]) -> dict[str, str]:
    """What each of our columns is called in this file."""
    if {"N", "D", "bs"} <= set(header):
        names = {ours: theirs for ours, theirs in STEP_LAW_NAMES.items() if theirs in header}
        names["loss"] = "smooth loss" if "smooth loss" in header else "loss"
    else:
        names = {name: name for name in (*REQUIRED, "active_params", "diverged") if name in header}
    for name in REQUIRED:
        if names.get(name, "") not in header:
            missing = names.get(name, STEP_LAW_NAMES[name] if "bs" in names.values() else name)
            others = [column for column in header if column not in names.values() and column not in COLUMNS]
            raise UserError(f"{path} has no column '{missing}'{nearest(missing, others)}")
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise UserError(f"{path} has two columns '{twice}'")
    return names


def parse(path: Path, line: int, row: dict[str, str], names: dict[str, str]) -> Run:
    """One row; raises UserError for what is no number, or no positive one."""

    def number(name: str) -> float:
        text = row[names[name]]
        try:
            value = float(text)
        except ValueError:
            raise UserError(f"{path} line {line}: {names[name]} is '{text}', which is no number") from None
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"{path} line {line}: {names[name]} is {text}; it must be positive")
        return value

    values = {name: number(name) for name in ("params", "tokens", "lr", "batch_tokens")}
    if "active_params" in names and row[names["active_params"]]:
        values["active_params"] = number("active_params")
        if values["active_params"] > values["params"]:
            raise UserError(
                f"{path} line {line}: {names['active_params']} is {row[names['active_params']]}, more than "
                f"{names['params']} {row[names['params']]}, which counts all experts"
            )
    if names["batch_tokens"] == "bs":
        values["batch_tokens"] *= number("seq_len") if "seq_len" in names else STEP_LAW_SEQUENCE
    # After the multiplication: what a fit takes to powers and compares must not overflow.
    for name, value in values.items():
        low, high = BOUNDS[name]
        if not low <= value <= high:
            told = f"is {row[names[name]]}" if value == float(row[names[name]]) else f"gives {value:g} tokens"
            raise UserError(
                f"{path} line {line}: {names[name]} {told}; it must be between {low:g} and {high:g}"
            )
    if "diverged" in names and row["diverged"] not in ("0", "1"):
        raise UserError(f"{path} line {line}: diverged is '{row['diverged']}'; it must be 0 or 1")
    loss, said = row[names["loss"]], row["diverged"] if "diverged" in names else None
    if said == "1" or (said is None and loss.lower() in ("", "nan", "inf")):
        return Run(**values, loss=math.inf)
    if not loss:
        raise UserError(f"{path} line {line} has no loss but is not marked as diverged")
    value, (low, high) = number("loss"), LAW_RANGE
    if value < low:
        raise UserError(f"{path} line {line}: {names['loss']} is {loss}; it must be at least {low:g}")
    return Run(**values, loss=value if value <= high else math.inf)


def weight_decays(path: Path, rows: list[tuple[int, dict[str, str]]]) -> list[str]:
    """The values of the column, as they are written, the smallest first; raises UserError for what is no number."""
    values: dict[str, float] = {}
    for line, row in rows:
        if text := row.get("weight_decay"):
            try:
                values[text] = float(text)
            except ValueError:
                values[text] = math.nan
            if not 0 <= values[text] < math.inf:
                raise UserError(
                    f"{path} line {line}: weight_decay is '{text}'; it must be a number at least 0, or empty"
                )
    return sorted(values, key=values.__getitem__)


def group(runs: Iterable[Run]) -> tuple[Cell, ...]:
    """Runs of equal N and of D within `SAME_TOKENS` of each other, in the order of N, then of D."""
    by_size: dict[tuple[float, float], list[Run]] = {}
    for run in runs:
        by_size.setdefault((run.params, run.active_params), []).append(run)
    cells = []
    for key in sorted(by_size):
        members: list[Run] = []
        for run in sorted(by_size[key], key=lambda run: run.tokens):
            if members and run.tokens > members[0].tokens * SAME_TOKENS:
                cells.append(members)
                members = []
            members.append(run)
        cells.append(members)
    return tuple(Cell(c[0].params, c[len(c) // 2].tokens, tuple(c)) for c in cells)


def mark_diverged(cell: Cell) -> Cell:
    """The cell with its losses above `DIVERGED` times the best made infinite."""
    best = min(run.loss for run in cell.runs)
    if math.isinf(best):
        return cell
    runs = tuple(run if run.loss <= DIVERGED * best else replace(run, loss=math.inf) for run in cell.runs)
    return replace(cell, runs=runs)


def constant(path: Path, rows: list[tuple[int, dict[str, str]]], column: str, default: str) -> str:
    """The one value of a column; `default` where there is none. Raises UserError for two values."""
    found = dict.fromkeys(value for _, row in rows if (value := row.get(column, "")))
    if len(found) > 1:
        first, second = list(found)[:2]
        raise UserError(f"{path} mixes {column} {first} and {second}; fit each in a file of its own")
    return next(iter(found), default)
