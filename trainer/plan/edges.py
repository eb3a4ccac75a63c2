"""Where a sweep's grid ends at its optimum: which runs would extend it. Imports nothing heavy."""

from stepline.trainer.plan.runs import Cell


def cell_notes(cell: Cell) -> list[str]:
    """One sentence when a cell has no best loss, or when its best run lies on an edge of its grid.

    A run that diverged is a run: next to a learning rate that diverges, the best one is not on an edge.
    """
    if not cell.usable:
        lowest = min(run.lr for run in cell.runs)
        how = "no point where all seeds finished" if cell.finished else f"all {len(cell.runs)} runs diverged"
        return [f"{cell}: {how}; add runs with lr below {lowest:.3g}"]
    lr, batch, _ = cell.best()
    points = list(cell.points())
    more = beyond("learning rate", lr, sorted({at[0] for at in points}), ".3g")
    more += beyond("batch", batch, sorted({at[1] for at in points}), ",.0f")
    if not more:
        return []
    edges, missing = " and the ".join(edge for edge, _ in more), " and ".join(text for _, text in more)
    return [f"{cell}: the best run has the {edges} of its grid; runs with {missing} would extend it"]


def beyond(what: str, value: float, values: list[float], form: str) -> list[tuple[str, str]]:
    """The edge that `value` is on and the next value beyond it, by the grid's own factor; empty when inside."""
    unit = "lr {}" if what == "learning rate" else "{} tokens a batch"
    if len(values) == 1:
        both = f"{unit.format(format(value / 2, form))} and {format(value * 2, form)}"
        return [(f"only {what}", both)]
    if value == values[0]:
        return [(f"lowest {what}", unit.format(format(value * value / values[1], form)))]
    if value == values[-1]:
        return [(f"highest {what}", unit.format(format(value * value / values[-2], form)))]
    return []
