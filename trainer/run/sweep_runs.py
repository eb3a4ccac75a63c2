"""The folder of a sweep: its frozen layout, the result of each run, runs.csv. Imports no torch.

DIR/sweep.json, DIR/config.yaml: the layout, written once; DIR/runs/NAME/: an ordinary run with `result.json` once
it counts; DIR/runs.csv: one row for each result.
"""

import csv
import io
import json
import math
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from stepline.trainer.errors import UserError
from stepline.trainer.files import locked, write_whole
from stepline.trainer.plan.expect import held_out_text
from stepline.trainer.plan.runs import COLUMNS
from stepline.trainer.plan.sweep import SweepRun
from stepline.trainer.run.outcome import read_outcome
from stepline.trainer.watch.metrics import iter_metrics


@dataclass(frozen=True)
class Result:
    """What a run that has ended well or diverged leaves."""

    loss: float | None
    """Nats per token; None when it diverged."""
    diverged: bool
    seconds: float
    """Of training, over all attempts, without starts, validations and saves."""
    reason: str = ""
    """Why it counts as diverged."""


RUNS = TypeAdapter(list[SweepRun])


class RunFailed(Exception):
    """A run ended without a result: not data, but a fault to look into; its text is the log's last word."""


@dataclass(frozen=True)
class SweepFolder:
    """Paths and records of a sweep in `path`."""

    path: Path
    runs: tuple[SweepRun, ...]
    ranks: int = 1
    """Of each run."""
    held_out: str = ""
    """What the losses are measured on: split and data."""

    @property
    def config(self) -> Path:
        """The config of all runs, to which each adds its overrides."""
        return self.path / "config.yaml"

    def folder(self, run: SweepRun) -> Path:
        """Of one run."""
        return self.path / "runs" / run.name

    def lock(self, run: SweepRun) -> Path:
        """Held while a process, or a child that outlived it, works on the run."""
        return self.folder(run) / ".lock"

    def result(self, run: SweepRun) -> Result | None:
        """The recorded result."""
        path = self.folder(run) / "result.json"
        try:
            return Result(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
        except (ValueError, TypeError):
            raise UserError(f"{path} is damaged; remove it to do the run again") from None

    def missing(self) -> list[SweepRun]:
        """The runs without a result, in order."""
        return [run for run in self.runs if not (self.folder(run) / "result.json").is_file()]

    def record(self, run: SweepRun) -> Result:
        """Keeps the result of a run that has ended, then drops its checkpoints; raises RunFailed."""
        folder = self.folder(run)
        result = read_result(folder)
        write_whole(folder / "result.json", json.dumps(vars(result)) + "\n")
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return result

    def record_ended(self) -> None:
        """Keeps the results of runs that ended after the call that started them was killed."""
        for run in self.missing():
            if (self.folder(run) / "outcome.json").is_file():
                with locked(self.lock(run), wait=False) as mine, suppress(RunFailed):
                    if mine is not None:
                        self.record(run)

    def write_csv(self) -> int:
        """Gathers all results in runs.csv; returns their number."""
        with locked(self.path / ".lock", wait=True):
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(COLUMNS)
            count = 0
            for run in self.runs:
                result = self.result(run)
                if result is None:
                    continue
                count += 1
                own = [getattr(run, column) for column in COLUMNS[: COLUMNS.index("loss")]]
                loss = "" if result.loss is None else repr(result.loss)
                writer.writerow([*own, loss, int(result.diverged), self.held_out, result.seconds])
            write_whole(self.path / "runs.csv", text.getvalue())
            return count


def read_result(folder: Path) -> Result:
    """What the outcome of an ended run says.

    Diverged: stopped by the guard, a held-out loss that is not finite, or one above the first step's loss.
    Anything else that is not `done` raises RunFailed.
    """
    outcome = read_outcome(folder)
    # the former is not there where the watchdog ended the run, or where an older version did
    seconds = outcome.get("train_seconds", outcome.get("seconds", 0.0))
    if outcome.get("diverged"):
        return Result(None, True, seconds, outcome["message"])
    if outcome.get("status") != "done" or "val_loss" not in outcome:
        last = outcome.get("message") or last_line(folder / "output.log")
        raise RunFailed(last or "it left no outcome and no log")
    loss = outcome["val_loss"]
    if loss is None or not math.isfinite(loss):
        return Result(None, True, seconds, "the held-out loss is not finite")
    first = first_loss(folder / "metrics.jsonl")
    if first is not None and loss > first:
        return Result(
            None, True, seconds, f"the held-out loss {loss:.3f} is above the first loss {first:.3f}"
        )
    return Result(loss, False, seconds)


def first_loss(path: Path) -> float | None:
    """The loss of the first step; None where it was not finite or there are no rows, as after a full disk. Raises
    RunFailed where they cannot be read."""
    if not path.is_file():
        return None
    try:
        return next((row["loss"] for row in iter_metrics(path) if "loss" in row), None)
    except UserError as error:
        raise RunFailed(str(error)) from error


def last_line(path: Path) -> str:
    """The last line of a log that is not empty."""
    if not path.is_file():
        return ""
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


def sweep_of(path: Path, content: dict[str, Any]) -> SweepFolder:
    """The sweep in `path` with this content of sweep.json."""
    held_out = held_out_text(content["data"], content["config"]["logging"]["eval_split"])
    runs = tuple(SweepRun(**run) for run in content["runs"])
    return SweepFolder(path, runs, content["ranks"], held_out)


def open_sweep(path: Path) -> SweepFolder | None:
    """The sweep that was laid out in `path`; None where there is none."""
    file = path / "sweep.json"
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        sweep = sweep_of(path, content)
        # A dataclass takes any value: what is no number would only show where it is computed with.
        RUNS.validate_python([vars(run) for run in sweep.runs])
        TypeAdapter(int).validate_python(sweep.ranks)
        return sweep
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{file} is damaged; choose another --output") from None


def check_same(path: Path, layout: dict[str, Any]) -> None:
    """Raises UserError when the sweep in `path` was laid out otherwise, with the first difference."""
    saved = json.loads((path / "sweep.json").read_text(encoding="utf-8"))
    difference = first_difference(saved, json.loads(json.dumps(layout)))
    if difference is not None:
        raise UserError(
            f"{path} holds another sweep ({difference}); continue it with `stepline sweep --output {path}` "
            "or choose another --output"
        )


def first_difference(old: Any, new: Any, where: str = "") -> str | None:
    """`runs.3.lr was 0.01 and is now 0.02`, or None when both are equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [(k, old.get(k), new.get(k)) for k in [*old, *(k for k in new if k not in old)]]
    elif isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            return f"{where} were {len(old)} and are now {len(new)}"
        pairs = [(i, a, b) for i, (a, b) in enumerate(zip(old, new))]
    else:
        return None if old == new else f"{where} was {old!r} and is now {new!r}"
    found = (first_difference(a, b, f"{where}.{k}".lstrip(".")) for k, a, b in pairs)
    return next((text for text in found if text is not None), None)
