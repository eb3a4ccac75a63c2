"""Ends a rank that makes no progress, with its stacks in the log: a hang must not last the night."""

import contextlib
import faulthandler
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn, TextIO

log = logging.getLogger("stepline")

HUNG = 1
SPARE_S = 30.0
"""How much later the process groups' own limit comes, which writes no stacks."""
GRACE_S = 3.0  # so that the other ranks, which wait for this one, write their stacks too
LAST_WORDS_S = 20.0
"""How long a rank that hangs may take over what it still has to say: a disk or a lock that hangs keeps nobody here."""
LOG_S = 2.0
"""Of that, for the log, whose lock a thread may hold that hangs: the stacks and `on_hang` do not wait for it."""


class Watchdog:
    """Expects `tick` at least every `timeout_s` seconds between entering and leaving it.

    All ranks wait for one that hangs, so on each of them the time runs out together: each writes the stacks of its
    threads to `stacks` and ends with exit code 1, whatever keeps it from writing. `on_hang` gets one sentence before.
    """

    def __init__(self, timeout_s: float, stacks: TextIO, on_hang: Callable[[str], None]) -> None:
        self.timeout_s, self.stacks, self.on_hang = timeout_s, stacks, on_hang
        self._last, self._where = time.monotonic(), "the start"
        self._longer: tuple[float, str] | None = None

    def __enter__(self) -> "Watchdog":
        self.tick(self._where)
        self._ended = ended = threading.Event()  # it may be entered again
        threading.Thread(target=self._watch, args=(ended,), daemon=True, name="watchdog").start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def tick(self, where: str) -> None:
        """There is progress; `where` says what was reached."""
        self._last, self._where = time.monotonic(), where

    @contextlib.contextmanager
    def longer(self, limit_s: float, what: str) -> Iterator[None]:
        """`what` is done inside, from now on, which may take `limit_s` seconds."""
        before, self._longer = self._longer, (max(limit_s, self.timeout_s), what)
        self.tick(self._where)
        try:
            yield
        finally:
            self.tick(self._where)
            self._longer = before

    def _watch(self, ended: threading.Event) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)  # while files can be opened
        while not ended.wait(min(1.0, self.timeout_s / 10)):
            limit_s, what = self._longer or (self.timeout_s, "")
            if time.monotonic() - self._last < limit_s:
                continue
            # A thread without Python ends the process: what writes the stacks holds the interpreter meanwhile.
            faulthandler.dump_traceback_later(LAST_WORDS_S, exit=True, file=nowhere)
            if what:
                self._end(f"{what} after {self._where} takes longer than {limit_s:g} s")
            self._end(f"no progress for {limit_s:g} s (parallel.timeout_s) after {self._where}")
        os.close(nowhere)

    def _end(self, reason: str) -> NoReturn:
        said = f"{reason}; the stacks of this rank's threads follow in its log"
        saying = threading.Thread(target=log.error, args=("%s", said), daemon=True)
        saying.start()
        saying.join(LOG_S)
        faulthandler.dump_traceback(self.stacks, all_threads=True)
        self.on_hang(reason)
        time.sleep(GRACE_S)
        os._exit(HUNG)
