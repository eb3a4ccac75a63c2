"""Where the rows of a run go to be watched: the terminal, and what wandb (wandb_logger.py) needs to start."""

import contextlib
import logging
import netrc
import os
import secrets
import sys
import time
from pathlib import Path
from typing import Any, Protocol, TextIO
from urllib.parse import urlparse

log = logging.getLogger("stepline")


class Logger(Protocol):
    """Takes the rows that also go to metrics.jsonl."""

    def log(self, row: dict[str, Any]) -> None:
        """One row, with at least `step`."""

    def alert(self, title: str, text: str, level: str) -> None:
        """Something that a person should know at once; level: info, warn or error."""

    def finish(self, exit_code: int = 0, summary: dict[str, Any] | None = None) -> None:
        """The run has ended."""


class Loggers:
    """Hands each row to several loggers in turn. One that fails is said once and left out: the run goes on."""

    def __init__(self, *loggers: Logger) -> None:
        self.loggers = list(loggers)

    def log(self, row: dict[str, Any]) -> None:
        """One row, with at least `step`."""
        self._each("log", row)

    def alert(self, title: str, text: str, level: str) -> None:
        """Something that a person should know at once; level: info, warn or error."""
        self._each("alert", title, text, level)

    def finish(self, exit_code: int = 0, summary: dict[str, Any] | None = None) -> None:
        """The run has ended; `summary` holds its last values."""
        self._each("finish", exit_code, summary)

    def _each(self, method: str, *arguments: Any) -> None:
        for logger in list(self.loggers):
            try:
                getattr(logger, method)(*arguments)
            except Exception as error:
                self.loggers.remove(logger)
                log.warning("%s fails and is left out: %s", type(logger).__name__, error)


class ProgressLogger:
    """Progress on standard error: a live bar on a terminal, a line per row elsewhere."""

    def __init__(self, total_steps: int, start_step: int = 0, stream: TextIO | None = None) -> None:
        self.total_steps = total_steps
        self.stream = sys.stderr if stream is None else stream
        self._first: tuple[int, float] | None = None  # step and time of the first row: start-up is no pace
        self._progress = self._task = None
        if self.stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            columns = (
                TextColumn("{task.completed}/{task.total}"),
                BarColumn(20),
                TextColumn("{task.description}"),
            )
            self._progress = Progress(*columns, console=Console(file=self.stream))
            self._task = self._progress.add_task("starting", total=total_steps, completed=start_step)
            self._progress.start()

    def log(self, row: dict[str, Any]) -> None:
        """Shows loss, rate, learning rate and time left; a validation row stays on the screen."""
        text = describe_row(row)
        if "loss" in row and (left := self._seconds_left(row["step"])) is not None:
            text += f"  {format_seconds(left)} left"
        with contextlib.suppress(OSError):  # the terminal is gone, or the disk behind it is full
            self._show(row, text)

    def _show(self, row: dict[str, Any], text: str) -> None:
        if self._progress is None:
            print(f"step {row['step']}/{self.total_steps}  {text}", file=self.stream, flush=True)
        elif "val_loss" in row:
            self._progress.console.print(f"step {row['step']}  {text}", highlight=False)
        else:
            self._progress.update(self._task, completed=row["step"], description=text)

    def alert(self, title: str, text: str, level: str) -> None:
        """Nothing: the log has it."""

    def finish(self, exit_code: int = 0, summary: dict[str, Any] | None = None) -> None:
        """Leaves the last state of the bar on the screen."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _seconds_left(self, step: int) -> float | None:
        now = time.monotonic()
        first_step, start = self._first = self._first or (step, now)
        if step <= first_step:
            return None
        return (now - start) / (step - first_step) * max(self.total_steps - step, 0)


def describe_row(row: dict[str, Any]) -> str:
    """The values of a row that a person follows, in one line."""
    formats = {
        "loss": "loss {:.4f}",
        "val_loss": "val loss {:.4f}",
        "val_bits_per_byte": "{:.4f} bits/byte",
        "expected_final_loss": "(expected at the end {:.4f})",
        "lr": "lr {:.3g}",
        "grad_norm": "norm {:.3g}",
        "tokens_per_second": "{:,.0f} tok/s",
        "mfu": "MFU {:.1%}",
    }
    parts = [text.format(row[key]) for key, text in formats.items() if row.get(key) is not None]
    if row.get("skipped"):
        parts.append(f"{row['skipped']} skipped")
    return "  ".join(parts)


def format_seconds(seconds: float) -> str:
    """`42s`, `3m20s`, `5h07m` or `2d04h`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02}s"
    if seconds < 86400:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02}m"
    return f"{seconds // 86400}d{seconds % 86400 // 3600:02}h"


def run_id(folder: Path) -> str:
    """The id in `folder/run_id`, made at the first call."""
    path = Path(folder) / "run_id"
    if path.exists() and (known := path.read_text().strip()):
        return known
    return new_run_id(folder)


def new_run_id(folder: Path) -> str:
    """Another id, in `folder/run_id`: what comes now is another run of wandb."""
    path, fresh = Path(folder) / "run_id", secrets.token_hex(4)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(fresh + "\n")
    return fresh


def wandb_mode(asked: str = "auto") -> str:
    """online, offline or off: what a run with `logging.wandb=ASKED` asks of wandb."""
    if asked == "auto":
        asked = os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")
    return {"disabled": "off", "dryrun": "offline"}.get(asked, asked)


def has_key() -> bool:
    """Whether wandb would find an API key without asking for one."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    named = os.environ.get("NETRC")
    for path in [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            entry = netrc.netrc(path).authenticators(host)
        except (OSError, netrc.NetrcParseError):
            continue
        if entry and entry[2]:
            return True
    return False
