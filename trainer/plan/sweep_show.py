"""A sweep's layout and cost on the screen. Imports no torch."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from stepline.trainer.plan.sweep import SweepRun
from stepline.trainer.plan.sweep_cost import SweepCost


def show(
    title: str,
    runs: Sequence[SweepRun],
    notes: Sequence[str],
    split: str,
    cost: SweepCost,
    jobs: int,
    console: Console,
    every_run: bool,
) -> None:
    """Prints the cells of a sweep (or every run) and the cost of what is still to be done.

    split: the held-out text on which the runs are compared.
    """
    table = Table(title=title)
    groups: dict[Any, list[SweepRun]] = {}
    for run in runs:
        groups.setdefault(run.name if every_run else (run.params, run.tokens), []).append(run)
    for name in ("N", "D", "shape", "lr", "batch", "weight decay", "steps", "runs"):
        table.add_column(name, justify="right")
    for group in groups.values():
        shape = group[0].shape
        table.add_row(
            f"{group[0].params:,}",
            f"{group[0].tokens:,}",
            f"{shape['num_layers']} x {shape['hidden_size']}",
            *(_range([getattr(run, key) for run in group]) for key in ("lr", "batch_tokens", "weight_decay")),
            _range([run.steps for run in group]),
            str(len(group)),
        )
    console.print(table)
    console.print(
        f"Compared by the loss on the {split} split in nats per token. The cheapest runs come first."
    )
    for note in notes:
        console.print(f"note: {note}", markup=False)
    if cost.runs < len(runs):
        console.print(f"{len(runs) - cost.runs} of {len(runs)} runs are done.")
    console.print(
        f"{cost.runs} runs to do: {cost.tokens:,} training tokens, {cost.flops:.3g} FLOPs, "
        f"about {_duration(cost.seconds)} with {jobs} at a time ({cost.assumption}).",
        highlight=False,
    )


def _range(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.4g}" if low == high else f"{low:.4g}…{high:.4g}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
