"""metrics.jsonl: one JSON object per line, every step once, whatever interrupted the run.

A row of a large mixture holds 100 KB, the file gigabytes: it is read row by row.
"""

import contextlib
import json
import logging
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stepline.trainer.errors import UserError

log = logging.getLogger("stepline")

BEGINS_WITH_STEP = re.compile(rb'\{"step": (\d+)[,}]')
BLOCK_BYTES = 1 << 20


class MetricsFile:
    """Appends rows to `path`. Rows that the disk does not take wait in memory and go with the next one, or `sync`.

    That they wait is said once, and once that it is over.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._waiting: list[dict[str, Any]] = []
        self._size: int | None = None  # bytes that are known to be whole lines
        self._cut: _Kept | None = None  # what the disk has not done yet
        self._broken = False

    @property
    def waits_from(self) -> dict[str, Any] | None:
        """The first row that waits; None where all are written."""
        return self._waiting[0] if self._waiting else None

    def write(self, row: dict[str, Any]) -> None:
        """Appends one row and hands it to the system at once; raises no OSError.

        JSON knows no NaN or infinity: such a value becomes null, with `"<key>_is_finite": false` beside it.
        """
        self._waiting.append(finite_row(row))
        self._write_waiting()

    def truncate_after(self, step: int) -> dict[str, Any]:
        """Drops the rows of later steps, which a run resumed from `step` writes again, and a half-written
        last line; returns the last value of each key in the rows that stay. Where the disk refuses, the next row
        tries again.

        Raises UserError when a line is not a JSON object.
        """
        self._size = None
        self._cut = _look(self.path, step) if self.path.exists() else None
        last = {} if self._cut is None else self._cut.last
        self._write_waiting()
        return last

    def read(self, first_step: int = 0) -> Iterator[dict[str, Any]]:
        """The rows from that step on that are on the disk. Raises UserError when a line is not a JSON object."""
        return iter_metrics(self.path, first_step) if self.path.exists() else iter(())

    def sync(self) -> None:
        """Tries what waits once more, and returns when the rows are on the disk: they outlive the machine as a
        checkpoint does."""
        if self._waiting:
            self._write_waiting()
        with contextlib.suppress(OSError):
            fd = os.open(self.path, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def close(self) -> None:
        """Tries once more to write what waits, and says what is lost."""
        if self._waiting:
            self._write_waiting()
        if self._waiting:
            first, last = self._waiting[0].get("step"), self._waiting[-1].get("step")
            log.error(
                "%s lacks its last %d rows (steps %s to %s)", self.path, len(self._waiting), first, last
            )

    def _write_waiting(self) -> None:
        try:
            if self._cut is not None:
                self._cut.make(self.path)
                self._cut = None
            self._append("".join(json.dumps(row, allow_nan=False) + "\n" for row in self._waiting).encode())
        except OSError as error:
            if not self._broken:
                reason = error.strerror or error
                log.warning("%s cannot be written (%s); its rows wait, the run goes on", self.path, reason)
            self._broken = True
            return
        if self._broken:
            log.info("%s is written again, with the %d rows that waited", self.path, len(self._waiting))
        self._broken = False
        self._waiting.clear()

    def _append(self, data: bytes) -> None:
        """Opens the file anew each time, as its disk may come and go. After an OSError the next call cuts off
        what this one left."""
        if not data:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size = os.fstat(fd).st_size
            if self._size is None or size < self._size:
                self._size = _whole_lines(fd, size)
            if size > self._size:
                os.ftruncate(fd, self._size)
            left = data
            while left:
                left = left[os.write(fd, left) :]
        finally:
            os.close(fd)  # a network disk may say only now that it is full
        self._size += len(data)


def finite_row(row: dict[str, Any]) -> dict[str, Any]:
    """`row` with null for each float that is not finite, and `"<key>_is_finite": false` beside it."""
    out: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            out |= {key: None, f"{key}_is_finite": False}
        else:
            out[key] = value
    return out


def keep_last(last: dict[str, Any], row: dict[str, Any]) -> None:
    """Makes `last` hold the last value of each key, `row` being the next one: what is finite again loses its mark."""
    for key in row:
        last.pop(f"{key}_is_finite", None)
    last |= row


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a half-written last line is left out.

    Raises UserError when the file is missing or another line is not a JSON object.
    """
    return list(iter_metrics(path))


def iter_metrics(path: str | Path, first_step: int = 0) -> Iterator[dict[str, Any]]:
    """What `read_metrics` returns from that step on, row by row: a long run's file is not held in memory."""
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"{path} does not exist; give the folder or the metrics.jsonl of a run that has started"
        )
    return (row for _, row in _rows(path, first_step))


def has_validation(path: Path, step: int) -> bool:
    """Whether a metrics file has a validation of that step. Looks from its end, where the steps are the latest."""
    if not path.exists():
        return False
    for line in _lines_backwards(path):
        try:
            row = json.loads(line)
        except ValueError:  # half-written, or for those to complain of who read it all
            continue
        found = row.get("step") if isinstance(row, dict) else None
        if found is None or found > step:
            continue
        if found < step or "val_loss" in row:
            return found == step
    return False


def _lines_backwards(path: Path) -> Iterator[bytes]:
    """The lines of a file, the last one first."""
    with path.open("rb") as file:
        left = file.seek(0, os.SEEK_END)
        rest = [b""]  # pieces of a line whose begin is still to come, the last one first
        while left:
            size = min(left, BLOCK_BYTES)
            left -= size
            file.seek(left)
            first, *lines = file.read(size).split(b"\n")
            if lines:
                yield lines.pop() + b"".join(reversed(rest))
                yield from reversed(lines)
                rest = []
            rest.append(first)
        yield b"".join(reversed(rest))


def _whole_lines(fd: int, size: int) -> int:
    """How many of a file's first `size` bytes are whole lines."""
    while size:
        start = max(0, size - BLOCK_BYTES)
        if (found := os.pread(fd, size - start, start).rfind(b"\n")) >= 0:
            return start + found + 1
        size = start
    return 0


def _rows(path: Path, first_step: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each row from that step on, with the offset at which its line ends. Of earlier ones as little as can be is
    looked at: a row takes a millisecond or more."""
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            end += len(line)
            whole = line.endswith(b"\n")  # only what follows the last newline may be half-written
            begins = BEGINS_WITH_STEP.match(line) if first_step else None
            if whole and (not line.strip() or (begins and int(begins[1]) < first_step)):
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict):
                if row.get("step", first_step) >= first_step:
                    yield end, row
            elif whole:
                raise UserError(f"{path}, line {number}, is not a JSON object; delete that line")
            if not whole:  # what comes now is the rest of a row that is just being written
                return


def _within(row: dict[str, Any], step: int) -> bool:
    return row.get("step", 0) <= step


@dataclass
class _Kept:
    """What stays of a file after a resume from `step`."""

    step: int
    last: dict[str, Any] = field(default_factory=dict)
    """The last value of each key."""
    end: int = 0
    """Bytes up to the last row that stays."""
    mixed: bool = False
    """Whether a later step's row stands before one that stays."""
    closed: bool = True
    """Whether the last row that stays ends with a newline."""

    def make(self, path: Path) -> None:
        """Drops the rest, and ends the last line. Later rows at the end are cut off, which needs no space on a full
        disk; where they are elsewhere, the file is replaced atomically. Raises OSError."""
        if self.mixed:
            partial = path.with_name(path.name + ".partial")
            with partial.open("w", encoding="utf-8") as file:
                kept = (row for _, row in _rows(path) if _within(row, self.step))
                file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in kept)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            return
        if path.stat().st_size > self.end:
            os.truncate(path, self.end)
        if not self.closed:
            with path.open("ab") as file:
                file.write(b"\n")


def _look(path: Path, step: int) -> _Kept:
    """Reads the file once. Raises UserError when a line is not a JSON object."""
    kept, later = _Kept(step), False
    for end, row in _rows(path):
        if _within(row, step):
            keep_last(kept.last, row)
            kept.end, kept.mixed = end, kept.mixed or later
        else:
            later = True
    if kept.end:
        with path.open("rb") as file:
            file.seek(kept.end - 1)
            kept.closed = file.read(1) == b"\n"
    return kept
