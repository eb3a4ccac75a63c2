"""The plots of a report as one picture."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stepline.trainer.errors import UserError
from stepline.trainer.watch.report.plots import Plot, plots_of
from stepline.trainer.watch.report.read import Run

COLUMNS, SIZE = 3, (4.6, 3.0)
"""Plots beside each other, and inches of each."""
MOST_OCTAVES = 2
"""Loads beyond four times an even share, or below a quarter of it, have one colour."""
DASHES = ("-", "--", ":", "-.")


def need_matplotlib() -> None:
    """Raises UserError where it is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("--png needs matplotlib: pip install 'stepline[watch]'") from None


def draw(runs: Sequence[Run], output: Path) -> Path:
    """Writes all plots that the page has, against tokens where it lets the reader choose, and the loads of experts of
    each run's first layer over time. Raises OSError where `output` cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    plots, _ = plots_of(runs)
    loads = [run for run in runs if run.heat]
    rows = max(1, -(-(len(plots) + len(loads)) // COLUMNS))  # where every value is 0 there is nothing to draw
    figure = Figure(figsize=(COLUMNS * SIZE[0], rows * SIZE[1] + 0.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axes, plot in zip(grid, plots, strict=False):
        _plot(axes, plot, runs)
    for axes, run in zip(grid[len(plots) :], loads, strict=False):
        _load(axes, run, run.name if len(runs) > 1 else "")
    for axes in grid[len(plots) + len(loads) :]:
        axes.set_axis_off()
    names = [run.name for run in runs]
    if not plots and not loads:
        figure.suptitle(f"{', '.join(names)}: 0 throughout")
    elif len(runs) > 1:
        lines = {line.get_label(): line for axes in grid for line in axes.get_lines()}
        shown = [name for name in names if name in lines]
        handles = [lines[name] for name in shown]
        figure.legend(handles, shown, loc="outside upper center", ncols=min(len(runs), 6), frameon=False)
    else:
        figure.suptitle(names[0])
    figure.savefig(output)
    return output


def _plot(axes, plot: Plot, runs: Sequence[Run]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter, LogFormatter, PercentFormatter

    kind, several = plot.x or "tokens", len(runs) > 1
    for r, run in enumerate(runs):
        for i, line in enumerate(plot.lines):
            if (series := run.series.get(line.key)) is None:
                continue
            style = {
                "color": f"C{r if several else i}",
                "linestyle": DASHES[i % len(DASHES)] if several else "-",
            }
            at, value = series.step, series.value
            if series.mean:  # as on the page: extremes are faint, means strong
                axes.plot(_positions(run, kind, at), value, linewidth=0.6, alpha=0.3, color=style["color"])
                at, value = series.mean_step, series.mean
            name = (run.name if several else line.label) if i == 0 or not several else None
            axes.plot(_positions(run, kind, at), value, label=name, linewidth=1.2, **style)
        if plot.expected and run.expected:
            color = f"C{r}" if several else "0.4"
            axes.axhline(run.expected["loss"], color=color, linestyle=(0, (7, 4)), linewidth=1)
    axes.set_title(plot.title, loc="left", fontsize=10)
    axes.set_ylabel(plot.unit, fontsize=9)
    axes.set_xlabel("tokens" if kind == "tokens" else "training time, s", fontsize=9)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(left=0)
    if plot.settled:
        axes.set_ylim(top=_settled_top(plot, runs))
    if plot.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    elif plot.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    elif axes.get_ylim()[1] >= 1e4:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    if len(plot.lines) > 1:
        dashes = [
            Line2D([], [], color="0.4", linestyle=DASHES[i % len(DASHES)], label=line.label)
            for i, line in enumerate(plot.lines)
        ]
        axes.legend(handles=dashes if several else None, frameon=False, fontsize=8)
    axes.tick_params(which="both", labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _settled_top(plot: Plot, runs: Sequence[Run]) -> float | None:
    """A little above the largest value after the first fiftieth of the runs; None where all values come before it."""
    found = [run.series[line.key] for run in runs for line in plot.lines if line.key in run.series]
    start = 0.02 * max(series.step[-1] for series in found)
    return max(
        (1.05 * v for s in found for at, v in zip(s.step, s.value, strict=True) if at >= start), default=None
    )


def _positions(run: Run, kind: str, steps: Sequence[float]) -> np.ndarray:
    return np.interp(steps, run.axis["step"], run.axis[kind])


def _load(axes, run: Run, name: str) -> None:
    load = np.array(run.heat["load"])[:, 0].T
    octaves = np.log2(np.maximum(load, 2.0 ** -(MOST_OCTAVES + 1)))
    edges = [span[0] for span in run.heat["spans"]] + [run.heat["spans"][-1][1]]
    shown = axes.imshow(
        octaves, aspect="auto", cmap="coolwarm", vmin=-MOST_OCTAVES, vmax=MOST_OCTAVES, interpolation="nearest",
        extent=(edges[0], edges[-1], len(load) - 0.5, -0.5),
    )  # fmt: skip
    axes.set_title(f"Load of experts, layer 0 {name}".strip(), loc="left", fontsize=10)
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel("expert", fontsize=9)
    axes.tick_params(labelsize=8)
    bar = axes.figure.colorbar(shown, ax=axes, ticks=range(-MOST_OCTAVES, MOST_OCTAVES + 1))
    bar.ax.set_yticklabels(["¼", "½", "1", "2", "4 ×"], fontsize=8)
