"""heartbeat.json: where a run is, for a cluster's watcher that knows nothing but files."""

import contextlib
import json
import logging
import os
import socket
import statistics
import time
from collections import deque
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stepline.trainer.config import Config
from stepline.trainer.errors import DONE, STATUS
from stepline.trainer.files import write_whole
from stepline.trainer.watch.metrics import finite_row

log = logging.getLogger("stepline")

EVERY_S = 5.0
LEAST_STALE_S = 60.0
STALE_STEPS = 10
ENDED = tuple(STATUS.values())
"""Statuses after which the file is not written again by this attempt."""


class StepTimes:
    """How long the last steps took, from the moments at which the loop said that one was done."""

    def __init__(self, window: int = 100) -> None:
        self._seconds: deque[float] = deque(maxlen=window)
        self._last: tuple[int, float] | None = None

    def tick(self, step: int, status: str) -> float | None:
        """Seconds that `step` took, None where more than that step lies between this call and the one before."""
        now = time.monotonic()
        before, self._last = self._last, (step, now) if status == "training" else None
        if status != "training" or before is None or before[0] != step - 1:
            return None
        self._seconds.append(now - before[1])
        return now - before[1]

    @property
    def count(self) -> int:
        """Steps that were measured, of those that are still kept."""
        return len(self._seconds)

    @property
    def median(self) -> float | None:
        """Of the last steps, in seconds; None before the first of them."""
        return statistics.median(self._seconds) if self._seconds else None


class Heartbeat:
    """Keeps `path` no older than EVERY_S seconds while the loop calls `beat`, and at once where the status changes.

    The file is written by the run's own progress and not by a thread, so an old one means a run that stands still.
    It is replaced atomically. Where it cannot be written this is said once, and tried again with the next beat.
    """

    def __init__(
        self, path: Path, *, steps: int, start_step: int, limit_s: float, attempt: int, world_size: int
    ) -> None:
        self.path, self.limit_s = path, limit_s
        self._allowed_s = limit_s  # what the status has been given
        self.times = StepTimes()
        self._start: tuple[int, float] | None = None  # the first step that was done, and when
        self._written: float | None = None
        self._broken = False
        self.fields: dict[str, Any] = {
            "status": None,
            "step": start_step,
            "steps": steps,
            "tokens": None,
            "loss": None,
            "tokens_per_second": None,
            "eta_s": None,
            "attempt": attempt,
            "world_size": world_size,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "last_checkpoint": None,
            "failed_saves": 0,
            "exit_code": None,
        }

    def beat(self, step: int, status: str, limit_s: float = 0.0, **fields: Any) -> float | None:
        """Notes progress; `fields` stay until they are given again. limit_s: after which a hang ends what begins now,
        where that is longer than usual. Returns the seconds that the step took, where they are known. Raises nothing.
        """
        took = self.times.tick(step, status)
        before, self._allowed_s = self._allowed_s, max(self.limit_s, limit_s)
        changed = status != self.fields["status"] or before != self._allowed_s
        self.fields |= {"step": step, "status": status, **fields}
        now = time.monotonic()
        if status == "training" and self._start is None:
            self._start = (step, now)
        if changed or self._written is None or now - self._written >= EVERY_S:
            self._written = now
            self._write(now)
        return took

    def stale_after_s(self) -> float | None:
        """Age of the file, in seconds, from which the run stands still; None once it has ended.

        Ten steps and at least a minute while steps follow each other. What has no known length (the start, the
        first steps, a validation, a save) is given the time after which a hang ends the run.
        """
        status, step_s = self.fields["status"], self.times.median
        if status in ENDED:
            return None
        if status != "training" or step_s is None:
            return round(max(LEAST_STALE_S, self._allowed_s), 1)
        return round(max(LEAST_STALE_S, STALE_STEPS * step_s), 1)

    def _eta_s(self, now: float) -> float | None:
        left = max(self.fields["steps"] - self.fields["step"], 0)
        done = 0 if self._start is None else self.fields["step"] - self._start[0]
        if self.fields["status"] in ENDED or done < 1:
            return None
        return round((now - self._start[1]) / done * left, 1)

    def _write(self, now: float) -> None:
        try:
            _replace(self.path, self.stale_after_s(), self.fields | {"eta_s": self._eta_s(now)})
        except OSError as error:
            if not self._broken:
                log.warning("%s cannot be written (%s); the run goes on", self.path, error.strerror or error)
            self._broken = True
            return
        if self._broken:
            log.info("%s is written again", self.path)
        self._broken = False


def starting(folder: Path, config: Config, step: int, attempt: int, world_size: int) -> Heartbeat:
    """The heartbeat of an attempt that begins at `step`, already written."""
    beat = Heartbeat(
        folder / "heartbeat.json", steps=config.total_steps(), start_step=step, limit_s=config.parallel.timeout_s,
        attempt=attempt, world_size=world_size,
    )  # fmt: skip
    beat.beat(step, "starting", tokens=step * config.budget.batch_tokens)
    return beat


def end(folder: Path, exit_code: int) -> None:
    """What the file says of a start that has ended before its Watch could say so; the rest stays, and a run that is
    done stays done. Raises nothing."""
    path, status = folder / "heartbeat.json", STATUS[exit_code]
    with contextlib.suppress(OSError, ValueError, AttributeError):
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields.get("status") not in (status, STATUS[DONE]):
            _replace(path, None, fields | {"status": status, "eta_s": None, "exit_code": exit_code})


def _replace(path: Path, stale_after_s: float | None, fields: dict[str, Any]) -> None:
    """Writes the file whole or not at all; raises OSError."""
    wall = time.time()
    record = {
        "time": round(wall, 3),
        "time_iso": datetime.fromtimestamp(wall, UTC).isoformat(timespec="seconds"),
        "stale_after_s": stale_after_s,
    }
    record |= {key: value for key, value in fields.items() if key not in record}
    write_whole(path, json.dumps(finite_row(record), default=str) + "\n", durable=False)
