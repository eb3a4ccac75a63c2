"""A sweep's layout and cost on the screen. Imports no torch."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from stepline.trainer.plan.screen import short
from stepline.trainer.plan.sweep import SweepRun
from stepline.trainer.plan.sweep_cost import SweepCost
from stepline.trainer.plan.units import seconds_text


def show(
    title: str,
    runs: Sequence[SweepRun],
    notes: Sequence[str],
    split: str,
    cost: SweepCost,
    jobs: int | None,
    console: Console,
    every_run: bool,
) -> None:
    """Prints the cells of a sweep (or every run) and the cost of what is still to be done.

    split: the held-out text on which the runs are compared. jobs: runs at a time; None: as many as SLURM starts.
    """
    console.print(title, markup=False, highlight=False, soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    groups: dict[Any, list[SweepRun]] = {}
    for run in runs:
        groups.setdefault(run.name if every_run else (run.params, run.tokens), []).append(run)
    for name in ("N", "D", "shape", "lr", "batch", "decay", "steps", "runs"):
        table.add_column(name, justify="right", overflow="fold")
    for group in groups.values():
        shape = group[0].shape
        table.add_row(
            short(group[0].params),
            short(group[0].tokens),
            f"{shape['num_layers']} x {shape['hidden_size']}",
            *(
                _range([getattr(run, key) for run in group])
                for key in ("lr", "batch_tokens", "weight_decay", "steps")
            ),
            str(len(group)),
        )
    console.print(table)
    console.print(
        f"Compared by the loss on the {split} split in nats per token. The cheapest runs come first.",
        soft_wrap=True,
    )
    for note in notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    if cost.runs < len(runs):
        console.print(f"{len(runs) - cost.runs} of {len(runs)} runs are done.")
    together = (
        f"with {jobs} at a time" if jobs else "of all runs together, of which SLURM starts as many as it can"
    )
    console.print(
        f"{cost.runs} {'run' if cost.runs == 1 else 'runs'} to do: {cost.tokens:,} training tokens, "
        f"{cost.flops:.3g} FLOPs, about {seconds_text(cost.seconds)} {together} ({cost.assumption}).",
        highlight=False,
        soft_wrap=True,
    )


def _range(values: list[float]) -> str:
    low, high = min(values), max(values)
    if low == high:
        return f"{low:,}" if isinstance(low, int) else short(low, 4)
    return f"{short(low)}–{short(high)}"
