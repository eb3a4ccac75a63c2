"""wandb, behind a thread of its own: whatever happens to it, the run does not wait."""

import contextlib
import logging
import math
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from stepline.trainer.errors import TO_BE_CONTINUED, first_line
from stepline.trainer.watch.loggers import has_key, run_id, wandb_mode
from stepline.trainer.watch.sent import NONE, Place, Sent, place_of

log = logging.getLogger("stepline")

KEPT = "its files stay in the run's folder, for `wandb sync`"
START_S, FINISH_S, FINISH_STOPPED_S = 10.0, 15.0, 10.0
"""Seconds that the run waits at most: for wandb to start, for its last data to be sent, and for that where the run
was told to leave."""
MOST_WAITING = 10_000
FIRST_PAUSE_S, LONGEST_PAUSE_S = 60.0, 3600.0
"""Between wandb's death and its new start; doubles each time."""
LIMITS = {
    "init_timeout": 20.0,
    "finish_timeout": FINISH_S - 3,
    "finish_timeout_raises": True,
    "x_transaction_log_flush_interval": 2.0,  # else rows of 15 s are lost with the machine
}


class WandbLogger:
    """wandb, which may be missing, without a key, away, or dying: then the run goes on and this is said once.

    mode `auto` is online where a key is found (WANDB_API_KEY or netrc) and offline elsewhere; WANDB_MODE decides if
    it is set. `online` without a key becomes offline: nothing ever asks for one. The run's id is kept in
    `folder/run_id`, so that a resumed run continues the same wandb run.

    wandb keeps what it was given, so no step may be logged again. `folder/wandb-sent.json` holds the last row that it
    took: rows up to it are left out. `logged` returns the run's rows so far from a step on: those behind it are sent
    first. So wandb has every step once, those of an attempt without it too. Where it dies it is started again after
    a while.
    """

    def __init__(
        self,
        folder: str | Path,
        project: str,
        name: str,
        config: dict[str, Any],
        mode: str = "auto",
        logged: Callable[[int], Iterable[dict[str, Any]]] = lambda first_step: (),
    ) -> None:
        self.folder = Path(folder)
        self.mode = self._choose(mode)
        self._arguments = {"project": project, "name": name, "config": config}
        self._logged = logged
        self._run: Any = None
        self._sent = Sent(self.folder / "wandb-sent.json", 2 * LIMITS["x_transaction_log_flush_interval"])
        self._queue: queue.Queue[Callable[[Any], None] | None] = queue.Queue(MOST_WAITING)
        self._started, self._closing = threading.Event(), threading.Event()
        self._lost = False
        self._thread: threading.Thread | None = None
        if self.mode != "off":
            self._thread = threading.Thread(target=self._work, daemon=True, name="wandb")
            self._thread.start()
            self._started.wait(START_S)

    def log(self, row: dict[str, Any]) -> None:
        """Sends one row, unless wandb has it."""
        self._put(lambda run: self._send(run, row))

    def disk_is_full(self) -> None:
        """What wandb has taken lately it may not have written yet, and will not: `begin_again` sends that too."""
        self._put(lambda run: self._sent.hold())

    def begin_again(self, row: dict[str, Any]) -> None:
        """Starts wandb anew and sends the rows from this one on, and those shortly before `disk_is_full`: wandb stops
        to write when its disk is full, says nothing, and never writes again."""
        self._put(lambda run: self._restart(row))

    def alert(self, title: str, text: str, level: str) -> None:
        """A wandb alert, which reaches a person by mail or Slack."""
        self._put(lambda run: run.alert(title, text, level=level.upper()))

    def finish(self, exit_code: int = 0, summary: dict[str, Any] | None = None) -> None:
        """Ends the wandb run with the exit code and the last values of this one; returns after at most FINISH_S."""
        if self._thread is None:
            return
        self._closing.set()
        self._put(lambda run: _finish(run, exit_code, summary or {}))
        self._put(None)
        self._thread.join(FINISH_STOPPED_S if exit_code == TO_BE_CONTINUED else FINISH_S)
        if self._thread.is_alive():
            self._off(f"it does not come to an end; {KEPT}")
            # Else wandb's own hook at the exit of the process waits for it, without a limit.
            ending = threading.Thread(target=_end_service, daemon=True)
            ending.start()
            ending.join(1)
            _kill_service()
        self._thread = None

    def _put(self, item: Callable[[Any], None] | None) -> None:
        if self._thread is None or self.mode == "off" or self._lost:
            return
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self._off("it takes no rows")

    def _work(self) -> None:
        """The thread: starts wandb, hands over what the queue holds, and starts it again where it has died."""
        pause = FIRST_PAUSE_S
        while self.mode != "off":
            try:
                self._open()
                self._started.set()
                self._hand_over()
                return
            except _Restart:
                continue
            except ImportError:
                self._off("wandb is not installed (pip install 'stepline[watch]')")
            except Exception as error:
                if not self._lost and self.mode != "off":
                    self._say(f"wandb is lost ({first_line(error)}); the run goes on without it")
                self._lost = True
            finally:
                self._started.set()
                _end_service()
            if self._closing.wait(pause):
                return
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _open(self) -> None:
        os.environ.setdefault(
            "WANDB_ERROR_REPORTING", "false"
        )  # else a server that hangs holds up the exit for 20 s
        import wandb

        self._run = None
        if self.mode == "online":
            try:
                self._run = self._start(wandb)
            except Exception as error:
                if self.mode == "off":  # given up meanwhile
                    return
                self._say(f"wandb is not reachable ({first_line(error)}); {KEPT}")
                _end_service()  # the failed attempt still holds the run's id
                self.mode = "offline"
        if self._run is None:
            self._run = self._start(wandb)
        self._sent.start(self.mode, *(self._on_server() if self.mode == "online" else (None,)))
        was_lost, self._lost = self._lost, False  # from here on the queue takes rows again
        for row in self._logged(max(0, self._sent.step)):
            self._send(self._run, row)
        if was_lost:
            log.info("wandb is back")

    def _on_server(self) -> tuple[Place, int | None]:
        """The place of the last row in the server's history, and how many rows it has."""
        if not self._run.resumed:
            return NONE, 0
        rows, step = self._rows_on_server(), self._run.summary.get("step", -1)
        return self._sent.last_held(rows, step, [place_of(row) for row in self._logged(0)]), rows

    def _rows_on_server(self) -> int | None:
        """How many rows the server has; None where it does not say (the summary is believed then)."""
        import wandb

        run = self._run
        try:
            return (
                wandb.Api(timeout=LIMITS["init_timeout"])
                .run(f"{run.entity}/{run.project}/{run.id}")
                .historyLineCount
            )
        except Exception as error:
            log.debug("wandb's server does not say how many rows it has: %s", error)
            return None

    def _start(self, wandb: Any) -> Any:
        known = getattr(wandb.Settings, "model_fields", LIMITS)
        limits = {name: value for name, value in LIMITS.items() if name in known}
        settings = wandb.Settings(silent=True, console="off", **limits)
        wandb.setup(settings)
        run = wandb.init(
            id=run_id(self.folder),
            dir=str(self.folder),
            mode=self.mode,
            resume="allow",  # offline too: `wandb sync` then appends each attempt to the one before
            settings=settings,
            **self._arguments,
        )
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run

    def _hand_over(self) -> None:
        while self.mode != "off" and (item := self._queue.get()) is not None:
            item(self._run)

    def _restart(self, row: dict[str, Any]) -> None:
        self._sent.forget(row)
        raise _Restart

    def _send(self, run: Any, row: dict[str, Any]) -> None:
        if self._sent.lacks(row):
            run.log(as_values(row))
            self._sent.note(row)

    def _choose(self, mode: str) -> str:
        mode = wandb_mode(mode)
        if mode == "online" and not has_key():
            self._say(f"wandb has no key (set WANDB_API_KEY or run `wandb login`); {KEPT}")
            return "offline"
        return mode

    def _off(self, reason: str) -> None:
        if self.mode != "off":
            self.mode = "off"
            self._say(f"the run is not logged to wandb: {reason}")

    def _say(self, sentence: str) -> None:
        log.warning("%s", sentence)


class _Restart(Exception):
    """wandb is to be ended and started again."""


def as_values(row: dict[str, Any]) -> dict[str, Any]:
    """`row` without its tables, which are no curves, and with NaN, which wandb knows, where `finite_row` has left a
    mark."""
    return {
        key: math.nan if row.get(f"{key}_is_finite") is False else value
        for key, value in row.items()
        if not isinstance(value, list) and not key.endswith("_is_finite")
    }


def _finish(run: Any, exit_code: int, summary: dict[str, Any]) -> None:
    # a NaN would remove the one that wandb has from the last row
    finite = {k: v for k, v in as_values(summary).items() if not isinstance(v, float) or math.isfinite(v)}
    run.summary.update(finite)
    if exit_code == TO_BE_CONTINUED:
        run.mark_preempting()  # shown as preempted instead of failed
    run.finish(exit_code=exit_code)


def _end_service() -> None:
    """Ends wandb's process; its own hook at exit would wait for one that hangs and show the traceback of a dead one."""
    if wandb := sys.modules.get("wandb"):
        with contextlib.suppress(BaseException):
            wandb.teardown()


def _kill_service() -> None:
    """Else a process that hangs outlives the run and keeps its output open."""
    with contextlib.suppress(OSError):
        for children in Path("/proc/self/task").glob("*/children"):
            for pid in children.read_text().split():
                if Path(f"/proc/{pid}/comm").read_text().strip() == "wandb-core":
                    os.kill(int(pid), signal.SIGKILL)
