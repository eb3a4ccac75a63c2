"""The tables of a report, as HTML in which everything that comes from a run is escaped."""

import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from stepline.trainer.plan.explain import cells
from stepline.trainer.plan.screen import short
from stepline.trainer.watch.loggers import format_seconds
from stepline.trainer.watch.report.read import Run

ABSENT = "–"
UNLISTED = {"run.folder"}
"""Differs between any two runs."""


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table that scrolls by itself; cells are text. left: so many columns are words, the rest numbers."""

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{'' if i < left else ' class=n'}>{escape(cell)}</{tag}>" for i, cell in enumerate(row)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    head = f"<thead><tr>{cells('th', columns)}</tr></thead>"
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def head(runs: Sequence[Run]) -> str:
    """The numbers that one looks for first: tiles for one run, a table for several."""
    if len(runs) > 1:
        names = [name for name, *_ in _facts(runs[0])]
        rows = [[run.name, *(value for _, value, _ in _facts(run))] for run in runs]
        known = [0] + [i + 1 for i in range(len(names)) if any(row[i + 1] != ABSENT for row in rows)]
        return table([["run", *names][i] for i in known], ([row[i] for i in known] for row in rows), left=2)
    (run,) = runs
    tiles = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(more)}</small></dd></div>"
        for name, value, more in _facts(run)
        if value != ABSENT
    )
    message = run.summary["message"]
    return f'<dl class="tiles">{tiles}</dl>' + (f'<p class="note">{escape(message)}</p>' if message else "")


def _facts(run: Run) -> list[tuple[str, str, str]]:
    """Name, value and what belongs to it in small print."""
    s = run.summary

    def say(key: str, text: str) -> str:
        return ABSENT if s[key] is None else text.format(s[key])

    source = "" if run.expected is None else str(run.expected.get("source", ""))
    return [
        ("status", s["status"], ""),
        ("step", f"{s['step']:,}", "" if s["steps"] is None else f"of {s['steps']:,}"),
        ("tokens", short(s["tokens"]), ""),
        ("N", ABSENT if s["params"] is None else short(s["params"]), "linear weights"),
        ("loss", *_last(run, "loss", "last training step")),
        ("validation loss", *_last(run, "val_loss")),
        ("bits per byte", *_last(run, "val_bits_per_byte")),
        ("expected loss", say("expected", "{:.4f}"), source),
        ("tokens/s", say("tokens_per_second", "{:,.0f}"), "median"),
        ("MFU", say("mfu", "{:.1%}"), "median"),
        ("memory", say("memory_gb", "{:.3g} GB"), "peak"),
        ("trained for", format_seconds(s["seconds"]), ""),
        ("ranks", say("ranks", "{}"), s["device"] or ""),
        ("attempts", say("attempts", "{}"), ""),
        ("skipped", say("skipped", "{:.0f}"), "updates"),
    ]


def _last(run: Run, key: str, more: str = "") -> tuple[str, str]:
    """The last value of a key, which need not be finite, and its small print."""
    if key in run.lost:
        return f"not finite since step {run.lost[key]:,}", ""
    return (f"{run.series[key].value[-1]:.4f}" if key in run.series else ABSENT), more


def sources(runs: Sequence[Run]) -> str:
    """The last value of every source, run by run."""
    keys = [key for key in dict.fromkeys(k for run in runs for k in run.validations) if "/" in key]
    rows = [
        [key.partition("/")[2], key.partition("/")[0].removeprefix("val_").replace("_", " ")]
        + [_last(run, key)[0] for run in runs]
        for key in sorted(keys, key=lambda key: key.partition("/")[::-1])
    ]
    return table(["source", "last", *(run.name for run in runs)], rows, left=2) if rows else ""


def event_lists(runs: Sequence[Run]) -> str:
    """What happened, run by run."""
    lists = []
    for run in runs:
        rows = [[f"{e.step:,}", e.kind, e.text, e.time] for e in run.events]
        content = table(["step", "event", "", "time"], rows, left=4) if rows else "<p>Nothing is known.</p>"
        count = f"{sum(event.count for event in run.events):,} events"
        title = f"{run.name}: {count}" if len(runs) > 1 else count
        lists.append(_folded(title, content, is_open=len(runs) == 1 and len(rows) <= 30))
    return "".join(lists)


def plans(runs: Sequence[Run]) -> str:
    """What the laws said of each run before it started."""
    return "".join(
        _folded(run.name, _plan(run.plan), is_open=i == 0) if len(runs) > 1 else _plan(run.plan)
        for i, run in enumerate(runs)
    )


def _plan(plan: dict[str, Any]) -> str:
    if not plan.get("explain"):
        return "<p>This run has no plan.json.</p>"
    rows = [cells(line, ABSENT) for line in plan["explain"]]
    law = plan.get("law", {})
    equations = "".join(
        f"<li>{escape(line['name'])}: <code>{escape(line['equation'])}</code></li>"
        for line in plan["explain"]
    )
    n, d = plan["params"], plan["tokens"]
    return (
        f"<p>N = {short(n, 4)}, D = {short(d, 4)}, D/N = {d / n:.4g}, by {escape(str(law.get('name')))} "
        f"({escape(str(law.get('paper')))})</p>"
        + table(["", "used", "ideal", "95 %", "range of the law", "price"], rows)
        + f'<ul class="note">{equations}</ul>'
        + "".join(f'<p class="note">{escape(str(text))}</p>' for text in plan.get("warnings", []))
    )


def differing(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Keys of the configs, and of the machines, whose values are not the same in all runs, with their values."""
    found = []
    for label, of in (("", lambda run: run.config), ("machine: ", _machine)):
        for key in dict.fromkeys(key for run in runs for key in of(run)):
            values = [_text(of(run)[key]) if key in of(run) else ABSENT for run in runs]
            if len(set(values)) > 1 and key not in UNLISTED:
                found.append((label + key, values))
    return found


def _machine(run: Run) -> dict[str, Any]:
    environment = run.environment
    versions = {f"{name} version": value for name, value in environment.get("versions", {}).items()}
    return {
        key: environment[key] for key in ("world_size", "device", "host") if key in environment
    } | versions


def differences(runs: Sequence[Run]) -> str:
    """The table of `differing`; empty for a single run."""
    if len(runs) == 1:
        return ""
    rows = [[key, *values] for key, values in differing(runs)]
    if not rows:
        return "<p>The configs are the same.</p>"
    return f'<h3>Differences</h3><div class="long">{table(["key", *(run.name for run in runs)], rows)}</div>'


def config_texts(runs: Sequence[Run]) -> str:
    """Every config.yaml as it is, which says where each value came from."""
    return "".join(
        _folded(f"config.yaml of {run.name}", f"<pre>{escape(run.config_text)}</pre>", is_open=False) for run in runs
    )  # fmt: skip


def _folded(title: str, content: str, is_open: bool) -> str:
    return f"<details{' open' if is_open else ''}><summary>{escape(title)}</summary>{content}</details>"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
