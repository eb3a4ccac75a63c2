"""Where the rows of a run go to be watched: the terminal and wandb."""

import functools
import netrc
import os
import secrets
import sys
import time
from pathlib import Path
from typing import Any, Protocol, TextIO
from urllib.parse import urlparse

KEPT = "its files stay in the run's folder, for `wandb sync`"


class Logger(Protocol):
    """Takes the rows that also go to metrics.jsonl."""

    def log(self, row: dict[str, Any]) -> None:
        """One row, with at least `step`."""

    def alert(self, title: str, text: str, level: str) -> None:
        """Something that a person should know at once; level: info, warn or error."""

    def finish(self, exit_code: int = 0, summary: dict[str, Any] | None = None) -> None:
        """The run has ended."""


class Loggers:
    """Hands each row to several loggers in turn."""

    def __init__(self, *loggers: Logger) -> None:
        self.loggers = loggers

    def log(self, row: dict[str, Any]) -> None:
        """One row, with at least `step`."""
        for logger in self.loggers:
            logger.log(row)

    def alert(self, title: str, text: str, level: str) -> None:
        """Something that a person should know at once; level: info, warn or error."""
        for logger in self.loggers:
            logger.alert(title, text, level)

    def finish(self, exit_code: int = 0, summary: dict[str, Any] | None = None) -> None:
        """The run has ended; `summary` holds its last values."""
        for logger in self.loggers:
            logger.finish(exit_code, summary)


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


class WandbLogger:
    """wandb, which may be missing, without a key or away: then the run goes on and this is said once.

    mode `auto` is online where a key is found (WANDB_API_KEY or netrc) and offline elsewhere; WANDB_MODE
    decides if it is set. `online` without a key becomes offline: nothing ever asks for one. The run's id is
    kept in `folder/run_id`, so that a resumed run continues the same wandb run.
    """

    def __init__(
        self,
        folder: str | Path,
        project: str,
        name: str,
        config: dict[str, Any],
        mode: str = "auto",
        init_timeout: float = 20,
        stream: TextIO | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.stream = sys.stderr if stream is None else stream
        self.mode = self._choose(mode)
        self._run = None
        if self.mode == "off":
            return
        try:
            import wandb
        except ImportError:
            self._off("wandb is not installed (pip install 'stepline[watch]')")
            return
        start = functools.partial(self._start, wandb, project, name, config, init_timeout)
        try:
            if self.mode != "offline":
                try:
                    self._run = start(self.mode)
                    return
                except Exception as error:
                    self._say(f"wandb is not reachable ({_reason(error)}); {KEPT}")
                    wandb.teardown()  # the failed attempt still holds the run's id
            self.mode = "offline"
            self._run = start("offline")
        except Exception as error:
            self._off(_reason(error))

    def _start(self, wandb, project: str, name: str, config: dict[str, Any], init_timeout: float, mode: str):
        settings = wandb.Settings(silent=True, console="off", init_timeout=init_timeout)
        wandb.setup(settings)
        run = wandb.init(
            project=project,
            name=name,
            id=run_id(self.folder),
            dir=str(self.folder),
            config=config,
            mode=mode,
            resume="allow" if mode == "online" else None,
            settings=settings,
        )
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run

    def log(self, row: dict[str, Any]) -> None:
        """Sends one row; a failure ends the sending, not the run."""
        if self._run is None:
            return
        try:
            self._run.log(row)
        except Exception as error:
            self._off(_reason(error))

    def alert(self, title: str, text: str, level: str) -> None:
        """A wandb alert, which reaches a person by mail or Slack."""
        if self._run is None:
            return
        try:
            self._run.alert(title, text, level=level.upper())
        except Exception as error:
            self._off(_reason(error))

    def finish(self, exit_code: int = 0, summary: dict[str, Any] | None = None) -> None:
        """Ends the wandb run with the exit code of this one."""
        run, self._run = self._run, None
        if run is None:
            return
        try:
            run.summary.update(summary or {})
            run.finish(exit_code=exit_code)
        except Exception as error:
            self._off(_reason(error))

    def _choose(self, mode: str) -> str:
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")
        if mode == "online" and not has_key():
            self._say(f"wandb has no key (set WANDB_API_KEY or run `wandb login`); {KEPT}")
            return "offline"
        return {"disabled": "off", "dryrun": "offline"}.get(mode, mode)

    def _off(self, reason: str) -> None:
        self._run, self.mode = None, "off"
        self._say(f"the run is not logged to wandb: {reason}")

    def _say(self, sentence: str) -> None:
        print(sentence, file=self.stream, flush=True)


def run_id(folder: Path) -> str:
    """The id in `folder/run_id`, made at the first call."""
    path = Path(folder) / "run_id"
    if path.exists() and (known := path.read_text().strip()):
        return known
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = secrets.token_hex(4)
    path.write_text(fresh + "\n")
    return fresh


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


def _reason(error: Exception) -> str:
    """The first line of an error, which may be long or empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
