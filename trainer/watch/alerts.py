"""What a person wants to be told of at once: spikes, a validation loss that rises, stalls, and what the loop says."""

import logging
import math
import time
from collections.abc import Callable
from typing import Any

log = logging.getLogger("stepline")

AGAIN_S = 600.0
"""Seconds in which one title is said once."""
STALL_FACTOR, STALL_LEAST_S, STALL_HISTORY = 10, 30.0, 5
RISES = 3
LEVELS = {"info": logging.INFO, "warn": logging.WARNING, "error": logging.ERROR}


class Alerts:
    """Says each alert in the log and hands it to `send(title, text, level)`, the same title not more often than
    every AGAIN_S seconds."""

    def __init__(self, send: Callable[[str, str, str], None], skipped: int = 0) -> None:
        """skipped: updates that the guard had skipped before."""
        self._send, self._skipped = send, skipped
        self._said: dict[str, float] = {}
        self._kept_back: dict[str, int] = {}
        self._validation: float | None = None
        self._validated_on: int | None = None
        self._rises = 0

    def say(self, title: str, text: str, level: str = "warn") -> None:
        """level: info, warn or error."""
        now = time.monotonic()
        if now - self._said.get(title, -math.inf) < AGAIN_S:
            self._kept_back[title] = self._kept_back.get(title, 0) + 1
            return
        self._said[title] = now
        if count := self._kept_back.pop(title, 0):
            text += f" ({count} more since it was said last)"
        log.log(LEVELS[level], "%s: %s", title, text)
        self._send(title, text, level)

    def row(self, row: dict[str, Any]) -> None:
        """Looks at a row of a step (`skipped`) or of a validation (`val_loss`)."""
        skipped = row.get("skipped", self._skipped)
        if skipped > self._skipped:
            count = skipped - self._skipped
            steps = "a NaN or a spike was skipped" if count == 1 else f"{count} NaNs or spikes were skipped"
            self.say("Spike", f"{steps} up to step {row['step']}, {skipped} in the run so far")
        self._skipped = skipped
        if (loss := row.get("val_loss")) is not None:
            self._validated(row["step"], loss, row.get("val_tokens"))

    def step(self, step: int, seconds: float | None, median: float | None, count: int) -> None:
        """A step took `seconds`; the `count` steps before it took `median` seconds."""
        if seconds is None or median is None or count < STALL_HISTORY:
            return
        if seconds > STALL_LEAST_S and seconds > STALL_FACTOR * median:
            self.say("Stall", f"step {step} took {seconds:.0f} s; the steps before it took {median:.2g} s")

    def _validated(self, step: int, loss: float, tokens: int | None) -> None:
        if not math.isfinite(loss):
            self.say("Divergence", f"the validation loss at step {step} is {loss}", "error")
            return
        if tokens != self._validated_on:  # another text has another loss
            self._validation, self._validated_on = None, tokens
        rose = self._validation is not None and loss > self._validation
        self._rises = self._rises + 1 if rose else 0
        self._validation = loss
        if self._rises == RISES:
            self.say("Validation loss rises", f"{RISES} times in a row, to {loss:.4f} at step {step}")
