"""metrics.jsonl: one JSON object per line, every step once, whatever interrupted the run."""

import contextlib
import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stepline.trainer.errors import UserError

log = logging.getLogger("stepline")


class MetricsFile:
    """Appends rows to `path`. Rows that the disk does not take wait in memory and go with the next one.

    That they wait is said once, and once that it is over.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._waiting: list[dict[str, Any]] = []
        self._size: int | None = None  # bytes that are known to be whole lines
        self._cut_after: int | None = None
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

    def truncate_after(self, step: int) -> list[dict[str, Any]]:
        """Drops the rows of later steps, which a run resumed from `step` writes again, and a half-written
        last line; returns the rows that stay. Where the disk refuses, the next row tries again.

        Raises UserError when a line is not a JSON object.
        """
        self._size = None
        kept = [row for row in self.read() if _within(row, step)]
        self._cut_after = step if self.path.exists() else None
        self._write_waiting()
        return kept

    def read(self) -> list[dict[str, Any]]:
        """The rows that are on the disk. Raises UserError when a line is not a JSON object."""
        return read_metrics(self.path) if self.path.exists() else []

    def sync(self) -> None:
        """Returns when the rows are on the disk, so that they outlive the machine as a checkpoint does."""
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
            if self._cut_after is not None:
                _cut(self.path, self._cut_after)
                self._cut_after = None
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
                self._size = self.path.read_bytes().rfind(b"\n") + 1
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


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a half-written last line is left out.

    Raises UserError when the file is missing or another line is not a JSON object.
    """
    return list(iter_metrics(path))


def iter_metrics(path: str | Path) -> Iterator[dict[str, Any]]:
    """What `read_metrics` returns, row by row: a long run's file is not held in memory."""
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"{path} does not exist; give the folder or the metrics.jsonl of a run that has started"
        )
    return (row for _, row in _rows(path))


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each row with the offset at which its line begins."""
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            begin, start = start, start + len(line)
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict):
                yield begin, row
            elif line.endswith(b"\n"):  # only what follows the last newline may be half-written
                raise UserError(f"{path}, line {number}, is not a JSON object; delete that line")


def _within(row: dict[str, Any], step: int) -> bool:
    return row.get("step", 0) <= step


def _cut(path: Path, step: int) -> None:
    """Drops the rows of later steps, and ends the last line. Later rows stand at the end and are cut off, which
    needs no space on a full disk; where they do not, the file is replaced atomically. Raises OSError."""
    rows = list(_rows(path))
    kept = [row for _, row in rows if _within(row, step)]
    first = next((i for i, (_, row) in enumerate(rows) if not _within(row, step)), len(rows))
    if first == len(kept) < len(rows):
        os.truncate(path, rows[first][0])
    elif first < len(kept) or not path.read_bytes().endswith(b"\n"):
        partial = path.with_name(path.name + ".partial")
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in kept)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
