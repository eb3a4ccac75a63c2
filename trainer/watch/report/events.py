"""What happened to a run besides training: from its logs, its rows and its checkpoints."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from stepline.trainer.errors import UserError
from stepline.trainer.run.manifest import COMPLETE, complete_checkpoints, read_manifest, step_of

MOST = 200
"""Events of one kind; a run with more of them shows the first and the last ones and how many are between them."""
LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d+ ([A-Z]+) (.*)")
CONTINUING = re.compile(r"continuing .* at step (\d+)")
SAVING = re.compile(r"saving (\w+) step (\d+); training waited (\S+) s")
RANKS = re.compile(r", (\d+) (\w+) ranks?, micro-batch")
STEP = re.compile(r"\bstep (\d+)\b")
STOP = re.compile(r"SIG\w+: ")


@dataclass(frozen=True)
class Event:
    """Something at a step."""

    kind: str
    """attempt, checkpoint, skipped, not finite, warning, stop (told to, by a signal) or error."""
    step: int
    """Of warnings and errors that name none, the step that the log named before them."""
    text: str
    time: str = ""
    """Of the run's host, where it is known."""
    gone: bool = False
    """Whether it is a checkpoint that is no longer kept."""
    count: int = 1
    """More than one where it stands for events that are not shown."""


@dataclass
class Trouble:
    """Steps that the guard skipped and values that were not finite, as the rows of metrics.jsonl tell."""

    spans: list[tuple[str, int, int, int]] = field(default_factory=list)
    """kind or key, first and last logged step, and how many steps were skipped."""
    _skipped: int = 0
    _before: int = 0

    def row(self, step: int, row: dict[str, Any]) -> None:
        """Looks at one row."""
        skipped = row.get("skipped")
        if isinstance(skipped, int):
            if skipped > self._skipped:
                self._add("skipped", step, skipped - self._skipped)
            self._skipped = skipped
        if None in row.values():  # as `finite_row` writes what is not finite
            for key in row:
                if row.get(f"{key}_is_finite") is False:
                    self._add(key, step, 0)
        if "loss" in row:
            self._before = step

    def _add(self, kind: str, step: int, count: int) -> None:
        """Joins what goes on from the row before."""
        for i in range(len(self.spans) - 1, max(len(self.spans) - 9, -1), -1):
            name, first, last, total = self.spans[i]
            if name == kind and last >= self._before:
                self.spans[i] = (name, first, step, total + count)
                return
        self.spans.append((kind, step, step, count))

    def events(self) -> Iterator[Event]:
        """One for each stretch."""
        for kind, first, last, count in self.spans:
            where = f"step {first}" if first == last else f"steps {first} to {last}"
            if kind == "skipped":
                steps = "1 update" if count == 1 else f"{count} updates"
                yield Event("skipped", first, f"{steps} skipped by the guard, logged at {where}")
            else:
                yield Event("not finite", first, f"{kind} is not finite at {where}")


def read_events(folder: Path, trouble: Trouble) -> list[Event]:
    """All that is known, by step; of each kind as many as are shown (`fewer`)."""
    found = [*_from_logs(folder), *trouble.events()]
    logged = {event.step for event in found if event.kind == "checkpoint"}
    for checkpoint in complete_checkpoints(folder):
        if step_of(checkpoint) not in logged:
            kind = _kind(checkpoint)
            try:
                when = datetime.fromtimestamp((checkpoint / COMPLETE).stat().st_mtime)
            except OSError:  # a run that goes on has removed it for a newer one
                continue
            found.append(Event("checkpoint", step_of(checkpoint), kind, f"{when:%Y-%m-%d %H:%M:%S}"))
    return fewer(sorted(found, key=lambda event: event.step))  # those of one step stay in their order


def fewer(events: Sequence[Event]) -> list[Event]:
    """At most MOST of each kind and how many are left out: deleted checkpoints first, then those in the middle."""
    many = [kind for kind, count in Counter(event.kind for event in events).items() if count > MOST]
    gone = [i for i, event in enumerate(events) if event.gone and event.kind in many]
    gone = gone if len(gone) > 1 else []  # a line that says so would save none
    hidden = set(gone)
    left_out = [(gone, "{:,} checkpoints that are no longer kept are not shown")]
    for kind in many:
        places = [i for i, event in enumerate(events) if event.kind == kind and i not in hidden]
        if len(places) > MOST + 1:
            left_out.append((places[MOST // 2 : -(MOST // 2)], "{:,} more of this kind are not shown"))
    shown: list[Event | None] = list(events)
    for places, text in left_out:
        for i in places:
            shown[i] = None
        if places:
            first, count = events[places[0]], len(places)
            shown[places[0]] = Event(first.kind, first.step, text.format(count), count=count)
    return [event for event in shown if event is not None]


def _kind(checkpoint: Path) -> str:
    try:
        return f"{read_manifest(checkpoint)['kind']} checkpoint"
    except UserError:
        return "checkpoint with a damaged manifest"


def _from_logs(folder: Path) -> Iterator[Event]:
    """Of logs/attempt-K/rank-0.log, attempt by attempt; a warning that each attempt repeats is there once."""
    said: set[str] = set()
    here = {step_of(path) for path in complete_checkpoints(folder)}
    attempts = [path for path in (folder / "logs").glob("attempt-*") if path.name[8:].isdigit()]
    for path in sorted(attempts, key=lambda path: int(path.name[8:])):
        lines = list(_lines(path / "rank-0.log"))
        if lines:
            for event in _of_attempt(path.name[8:], lines, here):
                if event.kind != "warning" or event.text not in said:
                    yield event
                said.add(event.text)


def _of_attempt(number: str, lines: list[tuple[str, str, str]], here: set[int]) -> Iterator[Event]:
    texts = [text for _, _, text in lines]
    begin = next((int(found[1]) for text in texts if (found := CONTINUING.match(text))), 0)
    ranks = next((found for text in texts if (found := RANKS.search(text))), None)
    where = "" if ranks is None else f" on {ranks[1]} {ranks[2]} rank{'' if ranks[1] == '1' else 's'}"
    how = f"goes on at step {begin}" if begin else "starts"
    yield Event("attempt", begin, f"attempt {number} {how}{where}", lines[0][0])
    step = begin
    for time, level, text in lines:
        if level in ("WARNING", "ERROR"):
            named = STEP.search(text)
            step = int(named[1]) if named else step
            yield Event("stop" if STOP.match(text) else level.lower(), step, text, time)
        elif saved := SAVING.match(text):
            step = int(saved[2])
            kept = "" if step in here else ", no longer kept"
            said = f"{saved[1]} checkpoint{kept}; training waited {saved[3]} s"
            yield Event("checkpoint", step, said, time, gone=step not in here)


def _lines(path: Path) -> Iterator[tuple[str, str, str]]:
    """Time, level and text of the lines that the run has logged; stacks and tracebacks between them are left out."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                if found := LINE.match(line):
                    yield found[1], found[2], found[3]
    except OSError:  # an attempt that died before it spoke
        return
