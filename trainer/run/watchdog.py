"""Ends a rank that makes no progress, with its stacks in the log: a hang must not last the night."""

import contextlib
import faulthandler
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import TextIO

log = logging.getLogger("stepline")

HUNG = 1
SPARE_S = 30.0
"""How much later the process groups' own limit comes, which writes no stacks."""
GRACE_S = 3.0  # so that the other ranks, which wait for this one, write their stacks too


class Watchdog:
    """Expects `tick` at least every `timeout_s` seconds between entering and leaving it.

    All ranks wait for one that hangs, so on each of them the time runs out together: each writes the stacks of its
    threads to `stacks` and ends with exit code 1. `on_hang` gets one sentence before that.
    """

    def __init__(self, timeout_s: float, stacks: TextIO, on_hang: Callable[[str], None]) -> None:
        self.timeout_s, self.stacks, self.on_hang = timeout_s, stacks, on_hang
        self._last, self._where = time.monotonic(), "the start"
        self._paused = 0
        self._ended = threading.Event()

    def __enter__(self) -> "Watchdog":
        self.tick("the start")
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def tick(self, where: str) -> None:
        """There is progress; `where` says what was reached."""
        self._last, self._where = time.monotonic(), where

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside does not count: what is done there has a limit of its own."""
        self._paused += 1
        try:
            yield
        finally:
            self.tick(self._where)
            self._paused -= 1

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self.timeout_s / 10)):
            if self._paused or time.monotonic() - self._last < self.timeout_s:
                continue
            reason = f"no progress for {self.timeout_s:g} s (parallel.timeout_s) after {self._where}"
            log.error("%s; the stacks of this rank's threads follow in its log", reason)
            faulthandler.dump_traceback(self.stacks, all_threads=True)
            self.on_hang(reason)
            time.sleep(GRACE_S)
            os._exit(HUNG)
