"""metrics.jsonl: one JSON object per line, every step once, whatever interrupted the run."""

import json
import math
import os
from pathlib import Path
from typing import Any

from stepline.trainer.errors import UserError


class MetricsFile:
    """Appends rows to `path`, which is opened with the first of them."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = None

    def write(self, row: dict[str, Any]) -> None:
        """Appends one row and hands it to the system at once.

        JSON knows no NaN or infinity: such a value becomes null, with `"<key>_is_finite": false` beside it.
        """
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                _drop_half_line(self.path)
            self._file = self.path.open("a", encoding="utf-8")
        self._file.write(json.dumps(finite_row(row), allow_nan=False) + "\n")
        self._file.flush()

    def truncate_after(self, step: int) -> None:
        """Drops the rows of later steps, which a run resumed from `step` writes again, and a half-written
        last line. The file is replaced atomically."""
        self.close()
        if not self.path.exists():
            return
        kept = [row for row in read_metrics(self.path) if row.get("step", 0) <= step]
        partial = self.path.with_name(self.path.name + ".partial")
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in kept)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.path)

    def close(self) -> None:
        """Closes the file; the next row opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


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
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"{path} does not exist; give the folder or the metrics.jsonl of a run that has started"
        )
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif number < len(lines):  # only what follows the last newline may be half-written
            raise UserError(f"{path}, line {number}, is not a JSON object; delete that line")
    return rows


def _drop_half_line(path: Path) -> None:
    """Cuts off what a killed writer left after the last newline."""
    with path.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
