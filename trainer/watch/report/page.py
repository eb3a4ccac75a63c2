"""The report as one HTML file: tables made here, plots drawn by the scripts beside this file."""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from datetime import datetime
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

from stepline.trainer.watch.report.plots import MIXTURE, SECTIONS, VALIDATION, Plot, plots_of
from stepline.trainer.watch.report.read import Run
from stepline.trainer.watch.report.series import BUCKETS
from stepline.trainer.watch.report.tables import config_texts, differences, event_lists, head, plans, sources

HERE = Path(__file__).resolve().parent
SCRIPTS = ("scale.js", "chart.js", "heat.js", "events.js", "page.js")


def render(runs: Sequence[Run]) -> str:
    """The whole file. All that comes from a run is escaped; a policy in the file lets no other script run and
    nothing be loaded."""
    plots, zero = plots_of(runs)
    script = "".join(_read(name) for name in SCRIPTS)
    style = _read("report.css")
    names = ", ".join(run.name for run in runs)
    parts = {
        "title": escape(names if len(runs) <= 3 else f"{len(runs)} runs"),
        "policy": f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'",
        "style": style,
        "made": escape(f"{datetime.now():%Y-%m-%d %H:%M}, Stepline {version('stepline')}"),
        "head": head(runs),
        "plots": "".join(_section(name, plots, zero, runs) for name in SECTIONS),
        "events": event_lists(runs),
        "plan": plans(runs),
        "config": differences(runs) + config_texts(runs),
        "thinned": _thinned(runs),
        "data": data_json(runs, plots),
        "script": script,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _read("report.html"))


def data_json(runs: Sequence[Run], plots: Sequence[Plot]) -> str:
    """What the scripts draw, as JSON that cannot end the element it stands in."""
    data = {
        "plots": [
            {
                "id": plot.id, "title": plot.title, "unit": plot.unit, "x": plot.x, "log": plot.log,
                "percent": plot.percent, "expected": plot.expected, "settled": plot.settled, "noisy": plot.noisy,
                "lines": [{"key": line.key, "label": line.label} for line in plot.lines],
            }
            for plot in plots
        ],
        "runs": [_run(run, {line.key for plot in plots for line in plot.lines}) for run in runs],
    }  # fmt: skip
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _run(run: Run, keys: set[str]) -> dict[str, Any]:
    return {
        "name": run.name,
        "axis": run.axis,
        "series": {
            key: {"step": s.step, "value": s.value}
            | ({"mean_step": s.mean_step, "mean": s.mean} if s.mean else {})
            for key, s in run.series.items()
            if key in keys
        },
        "expected": run.expected,
        "steps": run.summary["steps"],
        "events": [{"kind": e.kind, "step": e.step, "text": e.text, "time": e.time} for e in run.events],
        "heat": run.heat,
    }


def _section(name: str, plots: Sequence[Plot], zero: Sequence[Plot], runs: Sequence[Run]) -> str:
    mine, named = ([plot for plot in some if plot.section == name] for some in (plots, zero))
    if not mine and not named:
        return ""
    figures = "".join(_figure(plot) for plot in mine)
    if name == MIXTURE and any(run.heat for run in runs):
        figures += '<figure class="heat wide" data-heat></figure>'
    more = sources(runs) if name == VALIDATION else ""
    if named:
        said = ", ".join(plot.title.lower() for plot in named)
        more += f'<p class="note">0 throughout: {escape(said)}.</p>'
    return f'<section><h2>{escape(name)}</h2><div class="plots">{figures}</div>{more}</section>'


def _figure(plot: Plot) -> str:
    note = f'<p class="note">{escape(plot.note)}</p>' if plot.note else ""
    return f'<figure class="plot" data-plot="{escape(plot.id)}">{note}</figure>'


def _thinned(runs: Sequence[Run]) -> str:
    longest = max((s.count for run in runs for s in run.series.values()), default=0)
    if longest <= 2 * BUCKETS:
        return "Plots hold every logged value."
    return (
        f"Series of more than {2 * BUCKETS:,} values (the longest has {longest:,}) are drawn in {BUCKETS} stretches: "
        "the strong line is the mean of each, the faint one goes through its least and its largest value."
    )


def _read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
