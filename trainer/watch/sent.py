"""Which of a run's rows wandb has, in a small file beside them."""

import collections
import contextlib
import json
import time
from pathlib import Path
from typing import Any


def place_of(row: dict[str, Any]) -> tuple[int, bool]:
    """Where a row stands among the others: its step, and behind the step's own row the one of its validation."""
    return row["step"], "val_loss" in row


class Sent:
    """The last row that wandb took, over all attempts."""

    def __init__(self, path: Path, recent_s: float) -> None:
        """recent_s: seconds after which wandb has surely written a row that it took."""
        self.path, self.mode, self._recent_s = path, "", recent_s
        self._last = (-1, False)
        self._recent: collections.deque[tuple[float, tuple[int, bool]]] = collections.deque()
        """When wandb took its last rows, and their places."""
        self._held = False
        with contextlib.suppress(OSError, ValueError, KeyError):
            known = json.loads(path.read_text())
            self._last, self.mode = (known["step"], known["validation"]), known["mode"]

    def start(self, mode: str, on_server: tuple[int, bool] | None) -> None:
        """on_server: the place of the last row that the server holds, (-1, True) for none, None offline. It knows
        better what came of rows that were sent online."""
        if on_server is not None and self.mode == "online":
            self._last = min(self._last, on_server)
        elif on_server is not None and not self.mode:
            self._last = on_server
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
        if not self._held:
            self._drop_old()
            self._recent.append((time.monotonic(), self._last))
        partial = self.path.with_name(self.path.name + ".partial")
        with contextlib.suppress(OSError):
            step, validation = self._last
            partial.write_text(json.dumps({"step": step, "validation": validation, "mode": self.mode}) + "\n")
            partial.replace(self.path)
