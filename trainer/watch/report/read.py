"""What a run's folder tells of the run. Imports no torch."""

import json
import math
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stepline.trainer.config_io import dump, flatten, read_run_config
from stepline.trainer.config_yaml import read_yaml
from stepline.trainer.errors import UserError
from stepline.trainer.run.outcome import read_outcome
from stepline.trainer.watch.metrics import iter_metrics
from stepline.trainer.watch.report.events import Event, Trouble, read_events
from stepline.trainer.watch.report.series import BUCKETS, Column, Heat, Series, thin

AXES = ("step", "tokens")
"""Keys of a row that say when it is, not how the run does."""
NUMBERS = (float, int)
"""Types of the values that are drawn: JSON's true and false are none."""


@dataclass
class Run:
    """One run, in as many points as a picture needs."""

    folder: Path
    name: str
    series: dict[str, Series] = field(default_factory=dict)
    """By the keys of metrics.jsonl."""
    lost: dict[str, int] = field(default_factory=dict)
    """Keys whose last value is not finite, and the step since which none is."""
    axis: dict[str, list[float]] = field(default_factory=dict)
    """`step`, `tokens` and `seconds` of training at the same moments; between them all three grow evenly."""
    heat: dict[str, Any] | None = None
    """Loads of experts (`Heat.result`)."""
    events: list[Event] = field(default_factory=list)
    expected: dict[str, Any] | None = None
    """`loss` at the end and its `source`."""
    summary: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    """Dotted keys."""
    config_text: str = ""
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def validations(self) -> list[str]:
        """Keys of validation values, those of single sources too."""
        return sorted(key for key in self.series if key.startswith("val_"))


def read_run(folder: Path, name: str) -> Run:
    """Reads a run that is done, goes on or was killed at any moment.

    Raises UserError where `folder` is no run, has no metrics yet, or holds a file that is not what it should be.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give the folder of a run, such as runs/mine")
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is no run: it has no config.yaml")
    run = Run(folder, name)
    run.config = _config(folder)
    run.config_text = (folder / "config.yaml").read_text(encoding="utf-8")
    run.plan, run.environment = _object(folder / "plan.json"), _object(folder / "environment.json")
    if not (folder / "metrics.jsonl").is_file():
        raise UserError(f"{folder} has no metrics.jsonl yet; a report needs a run that has made a step")
    values, trouble = _read_metrics(run)
    run.events = read_events(folder, trouble)
    run.expected = run.plan.get("expected_final_loss")
    if "expected_final_loss" not in run.plan and (kept := run.series.get("expected_final_loss")) is not None:
        run.expected = {"loss": kept.value[-1], "source": "the run's own forecast"}
    run.summary = _summary(run, values)
    return run


def _config(folder: Path) -> dict[str, Any]:
    """Dotted keys and values, those too that have come into being since the run, with their defaults; of a config that
    this version does not know, as it stands. Raises UserError where it is no config."""
    try:
        return flatten(dump(read_run_config(folder)))
    except UserError:
        return flatten(read_yaml(folder / "config.yaml"))


def _read_metrics(run: Run) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], Trouble]:
    """Fills series, axis and heat map; returns steps and finite values by key, and what went wrong where."""
    columns: dict[str, Column] = defaultdict(Column)
    trouble, heat = Trouble(), Heat()
    axis = [(0, 0, 0.0)]
    late = axis[0]
    for row in iter_metrics(run.folder / "metrics.jsonl"):
        step = row.get("step")
        if not isinstance(step, int):
            continue
        for key, value in row.items():
            if value is None and row.get(f"{key}_is_finite") is False:  # as `finite_row` writes it
                value = math.nan
            if type(value) in NUMBERS and key not in AXES:
                column = columns[key]
                column.steps.append(step)
                column.values.append(value)
        if isinstance(row.get("expert_load"), list):
            heat.add(step, row["expert_load"])
        trouble.row(step, row)
        rate, tokens = row.get("tokens_per_second"), row.get("tokens")
        if tokens is not None and step > axis[-1][0]:
            late = (step, tokens, axis[-1][2] + ((tokens - axis[-1][1]) / rate if rate else 0.0))
            if rate:  # a row of training: others have no time of their own
                axis.append(late)
    if late[0] > axis[-1][0]:
        axis.append(late)
    values = {key: column.finite() for key, column in columns.items()}
    values = {key: found for key, found in values.items() if len(found[0])}
    if not values:
        raise UserError(f"{run.folder / 'metrics.jsonl'} holds no values yet; wait for the run's first step")
    run.lost = {key: step for key, column in columns.items() if (step := column.lost_at()) is not None}
    run.series = {key: thin(*found) for key, found in values.items()}
    knots = np.unique(np.linspace(0, len(axis) - 1, BUCKETS + 1).astype(int)).tolist()
    run.axis = {
        key: [round(axis[k][i], 3) for k in knots] for i, key in enumerate(("step", "tokens", "seconds"))
    }
    run.heat = heat.result()
    return values, trouble


def _summary(run: Run, values: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """Numbers for the head of the report; None for what is not known."""

    def of(key: str, how=lambda column: column[-1]) -> float | None:
        return float(how(values[key][1])) if key in values else None

    beat, outcome = _object(run.folder / "heartbeat.json"), read_outcome(run.folder)
    status = outcome.get("status") or f"{beat.get('status', 'training')}, or killed"
    return {
        "status": status,
        "message": outcome.get("message"),
        "step": int(max(steps[-1] for steps, _ in values.values())),
        "steps": run.plan.get("steps") or beat.get("steps"),
        "tokens": run.axis["tokens"][-1],
        "params": run.plan.get("params"),
        "expected": None if run.expected is None else run.expected["loss"],
        "tokens_per_second": of("tokens_per_second", np.median),
        "mfu": of("mfu", np.median),
        "memory_gb": of("memory_gb", max),
        "seconds": run.axis["seconds"][-1],
        "skipped": of("skipped"),
        "attempts": sum(event.count for event in run.events if event.kind == "attempt") or None,
        "ranks": run.environment.get("world_size"),
        "device": run.environment.get("device"),
    }


def _object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where the file is missing, as in runs that were killed early, or broken."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
