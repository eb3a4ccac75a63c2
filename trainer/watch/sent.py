"""Which of a run's rows wandb has, in a small file beside them."""

import collections
import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stepline.trainer.files import write_whole

Place = tuple[int, bool]
NONE: Place = (-1, True)
"""Before all rows."""
KEPT_PLACES = 256
"""Of the last rows, which a machine's death may have kept from the server."""


def place_of(row: dict[str, Any]) -> Place:
    """Where a row stands among the others: its step, and behind the step's own row the one of its validation."""
    return row["step"], "val_loss" in row


class Sent:
    """The last row that wandb took, over all attempts."""

    def __init__(self, path: Path, recent_s: float) -> None:
        """recent_s: seconds after which wandb has surely written a row that it took."""
        self.path, self.mode, self._recent_s = path, "", recent_s
        self._last: Place = (-1, False)
        self._rows: int | None = None
        """How many the server should have; None where that is not known."""
        self._latest: collections.deque[Place] = collections.deque(maxlen=KEPT_PLACES)
        """Of those sent to the server."""
        self._recent: collections.deque[tuple[float, Place]] = collections.deque()
        """When wandb took its last rows, and their places."""
        self._held = False
        with contextlib.suppress(OSError, ValueError, KeyError):
            known = json.loads(path.read_text())
            self._last, self.mode = (known["step"], known["validation"]), known["mode"]
            self._latest.extend((step, validation) for step, validation in known["latest"])
            self._rows = known["rows"]

    def last_held(self, rows: int | None, step: int, logged: Sequence[Place]) -> Place:
        """Of the last row that a server with so many rows holds (None: it does not say), and with this step in its
        summary. logged: places of all rows of the run so far.

        The summary alone may be ahead: wandb sends a row's summary before the row itself.
        """
        if rows is None or self._rows is None:
            return (step, True)
        lost = self._rows - rows
        if lost <= 0:
            return self._last
        if lost < len(self._latest):
            return self._latest[-1 - lost]
        places = [place for place in logged if place <= self._last]
        return places[-1 - lost] if lost < len(places) else NONE

    def start(self, mode: str, on_server: Place | None, rows: int | None = None) -> None:
        """on_server: the place of the last row that the server holds, NONE for none, None offline. It knows
        better what came of rows that were sent online. rows: how many it holds, where it says that."""
        if on_server is not None and self.mode == "online":
            self._last = min(self._last, on_server)
        elif on_server is not None and not self.mode:
            self._last = on_server
        if on_server is not None:
            lost = self._rows - rows if rows is not None and self._rows is not None else 0
            for _ in range(min(lost, len(self._latest))):
                self._latest.pop()
            self._rows = rows
        self.mode = mode

    def forget(self, row: dict[str, Any]) -> None:
        """wandb has neither this row nor the later ones, nor those that were recent when it stopped."""
        step, validation = min([place_of(row), *(place for _, place in self._recent)])
        self._last = min(self._last, (step, False) if validation else (step - 1, True))
        self._recent.clear()
        self._held = False

    def hold(self) -> None:
        """Keeps which rows are recent now, until `forget`."""
        self._drop_old()
        self._held = True

    def _drop_old(self) -> None:
        while self._recent and self._recent[0][0] < time.monotonic() - self._recent_s:
            self._recent.popleft()

    @property
    def step(self) -> int:
        """Of the last row that wandb took; wandb lacks none of an earlier step."""
        return self._last[0]

    def lacks(self, row: dict[str, Any]) -> bool:
        """Whether wandb does not have the row yet."""
        return place_of(row) > self._last

    def note(self, row: dict[str, Any]) -> None:
        """wandb has taken the row."""
        self._last = place_of(row)
        if self.mode == "online":
            self._latest.append(self._last)
            self._rows = None if self._rows is None else self._rows + 1
        if not self._held:
            self._drop_old()
            self._recent.append((time.monotonic(), self._last))
        step, validation = self._last
        content = {"step": step, "validation": validation, "mode": self.mode}
        content |= {"rows": self._rows, "latest": list(self._latest)}
        with contextlib.suppress(OSError):
            write_whole(self.path, json.dumps(content) + "\n", durable=False)
