"""A plan for people and for programs: the table of `stepline plan` and the object of its --json."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from stepline.trainer.plan.cost import Cost, Hardware, Tradeoff
from stepline.trainer.plan.laws import EPOCH, POWER_LINES
from stepline.trainer.plan.opinions import (
    expected_loss_of,
    expected_loss_text,
    opinions,
    second_opinion,
    usable_loss_law,
)
from stepline.trainer.plan.planner import WEIGHT_DECAY_RANGE, Plan, penalty_percent
from stepline.trainer.plan.schedule_text import schedule_text
from stepline.trainer.plan.screen import short
from stepline.trainer.plan.units import seconds_text


@dataclass(frozen=True)
class Line:
    """One value of the table."""

    name: str
    used: float
    ideal: float | None
    interval95: tuple[float, float] | None
    equation: str
    """With this run's numbers put in."""
    in_range: bool | None
    second_opinions: dict[str, float]
    extrapolated_opinions: tuple[str, ...] = ()
    """Those of `second_opinions` that are outside of what their law was fitted on."""
    penalty_percent: float | None = None
    """What using `used` and not the ideal costs, in % of the loss."""


def lines(plan: Plan) -> list[Line]:
    """Learning rate, batch, weight decay, steps and critical batch, each with its equation and numbers."""
    law, n, d = plan.law, plan.inputs.params, plan.inputs.tokens
    said = opinions(plan)
    (a, b), (e,) = law.lr_law.exponents, law.batch_law.exponents
    inside = not law.source.outside(n, d, plan.inputs.active_params)
    batch_cost = penalty_percent(plan.ratio, 1.0)
    lr = f"{law.lr_law.scale:.4g} * {n:.4g}^{a:.4g} * {d:.4g}^{b:.4g} = {plan.ideal_lr:.4g}"
    if plan.inputs.lr is None and plan.ratio < 1:
        lr += f"; * ({plan.ratio:.4g})^0.7 = {plan.lr:.4g}"
    elif plan.inputs.lr is not None:
        lr += f"; {_by_whom(plan)}"
    batch = f"{law.batch_law.scale:.4g} * {d:.4g}^{e:.4g} = {plan.ideal_batch_tokens:,.0f}"
    if plan.inputs.batch_tokens is not None:
        batch += f"; {_by_whom(plan)}"
    elif plan.inputs.quantum is not None:
        batch += f"; {plan.grad_accumulation} x {plan.inputs.quantum:,}"
    return [
        Line(
            "learning rate",
            plan.lr,
            plan.ideal_lr,
            law.lr_law.interval(n, d),
            lr,
            inside,
            {other.name: other.lr for other in said if other.lr is not None},
            tuple(other.name for other in said if other.lr is not None and other.extrapolated),
            plan.penalty_percent - batch_cost,
        ),
        Line(
            "batch, tokens",
            plan.batch_tokens,
            plan.ideal_batch_tokens,
            law.batch_law.interval(d),
            batch,
            inside,
            {other.name: other.batch_tokens for other in said},
            tuple(other.name for other in said if other.extrapolated),
            batch_cost,
        ),
        Line(
            "weight decay",
            plan.weight_decay,
            plan.ideal_weight_decay,
            None,
            weight_decay_text(plan),
            not POWER_LINES.source.outside(n, d),
            {},
        ),
        Line(
            "steps",
            plan.steps,
            d / plan.ideal_batch_tokens,
            None,
            f"D / B = {d:.4g} / {plan.batch_tokens:,.0f}",
            None,
            {},
        ),
        Line(
            "critical batch",
            plan.batch_critical_tokens,
            None,
            None,
            f"2048 * 0.0471 * {d:.4g}^0.462",
            not POWER_LINES.source.outside(n, d),
            {},
        ),
    ]


def _by_whom(plan: Plan) -> str:
    """Where a value that is given comes from."""
    start = plan.inputs.settled_at
    return "set by you" if start is None else f"as at the start, D = {start:.4g}"


def weight_decay_text(plan: Plan) -> str:
    """The timescale's weight decay at the batch and the learning rate that will be used, and why it is not taken."""
    i, used = plan.inputs, plan.weight_decay
    n, d = i.params, i.tokens
    law = POWER_LINES.weight_decay(n, d, plan.lr, plan.batch_tokens)
    numbers = f"{plan.batch_tokens:,.0f} / ({plan.lr:.4g} * {plan.tau:.4g} * {d:.4g})"
    text = f"B / (lr * tau * D) = {numbers} = {law:.4g}, tau = 1.084 * {d / n:.4g}^-0.527"
    if i.weight_decay is not None:
        return f"{text}; {used:.4g} {_by_whom(plan)}"
    if i.mixture:
        return f"{text}; {used:.4g}, fixed for a mixture"
    low, high = WEIGHT_DECAY_RANGE
    return text if used == law else f"{text}; {used:.4g}, clamped to {low}-{high}"


def plan_json(
    plan: Plan, machine: Hardware | None = None, cost: Cost | None = None, trade: Sequence[Tradeoff] = ()
) -> dict[str, Any]:
    """The object that `stepline plan --json` prints and a run keeps as plan.json."""
    n, d, law = plan.inputs.params, plan.inputs.tokens, plan.law
    loss_law = usable_loss_law(plan)
    return {
        "params": n,
        "tokens": d,
        "lr": plan.lr,
        "weight_decay": plan.weight_decay,
        "batch_tokens": plan.batch_tokens,
        "steps": plan.steps,
        "grad_accumulation": plan.grad_accumulation,
        "ideal": {
            "lr": plan.ideal_lr,
            "weight_decay": plan.ideal_weight_decay,
            "batch_tokens": plan.ideal_batch_tokens,
        },
        "tau": plan.tau,
        "batch_critical_tokens": plan.batch_critical_tokens,
        "second_opinion": second_opinion(plan),
        "second_opinion_extrapolated": [other.name for other in opinions(plan) if other.extrapolated],
        "interval95": {"lr": law.lr_law.interval(n, d), "batch_tokens": law.batch_law.interval(d)},
        "expected_loss": None if loss_law is None else loss_law.loss(n, d),
        "expected_loss_of": expected_loss_of(plan),
        "expected_loss_own": loss_law not in (None, EPOCH),
        "penalty_percent": plan.penalty_percent,
        "law": {
            "name": law.source.name,
            "paper": law.source.paper,
            "optimizer": law.optimizer,
            "sync": law.sync,
            "kind": law.kind,
        },
        "schedule": schedule_text(plan),
        "inputs": asdict(plan.inputs),
        "explain": [asdict(line) for line in lines(plan)],
        "hardware": None if machine is None else asdict(machine),
        "cost": None if cost is None else asdict(cost),
        "iso_loss": [asdict(row) for row in trade],
        "warnings": list(plan.warnings),
    }


def number(value: float) -> str:
    """Counts with separators, the rest with four digits."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def cells(line: Mapping[str, Any], absent: str = "") -> list[str]:
    """A line of the plan, as in plan.json's `explain`: name, used, ideal, interval, range, price."""
    interval, price = line["interval95"], line["penalty_percent"]
    return [
        line["name"],
        number(line["used"]),
        absent if line["ideal"] is None else short(line["ideal"], 4),
        absent if interval is None else " - ".join(map(short, interval)),
        {None: absent, True: "inside", False: "outside"}[line["in_range"]],
        absent if price is None else f"{price:.3f} %",
    ]


def show(
    plan: Plan, machine: Hardware | None, cost: Cost | None, trade: list[Tradeoff], console: Console
) -> None:
    """The tables and sentences that a person reads."""
    i = plan.inputs
    active = "" if i.active_params in (None, i.params) else f" ({i.active_params:.4g} active)"
    console.print(
        f"N = {i.params:.4g}{active}, D = {i.tokens:.4g}, D/N = {i.tokens / i.params:.4g}\n", style="bold"
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in ("", "use", "ideal", "95 %", "range", "price"):
        table.add_column(name, justify="left" if not name else "right", overflow="fold")
    rows = lines(plan)
    for line in rows:
        table.add_row(*cells(asdict(line)))
    console.print(table)
    console.print("range: whether N and D lie where the law was fitted; price: loss above the ideal's\n")
    for line in rows:
        console.print(f"{line.name}: {line.equation}", soft_wrap=True, highlight=False)
        if line.second_opinions:
            others = [
                f"{name} {number(value)}" + (" (extrapolated)" if name in line.extrapolated_opinions else "")
                for name, value in line.second_opinions.items()
            ]
            console.print(f"  others say: {', '.join(others)}", soft_wrap=True, highlight=False)
    console.print(f"schedule: {schedule_text(plan)}", soft_wrap=True)
    console.print(expected_loss_text(plan), soft_wrap=True, highlight=False)
    if cost is not None and machine is not None:
        how = "given" if machine.measured else "assumed"
        text = f"{cost.flops:.3g} FLOPs: {cost.gpu_hours:,.1f} GPU-hours on {machine.device} "
        text += f"at MFU {machine.mfu:.0%} ({how})"
        console.print(
            text
            + ("" if cost.hours is None else f", {seconds_text(3600 * cost.hours)} on {machine.gpus} GPUs")
        )
        console.print(f"these FLOPs are {cost.counted}", soft_wrap=True, highlight=False)
    if cost is not None and cost.max_useful_gpus is not None:
        console.print(
            f"beyond {cost.max_useful_gpus:,} GPUs (one window each is the critical batch of D_min) a further GPU adds "
            "more to the cost than it takes off the time",
            soft_wrap=True,
        )
    show_tradeoffs(plan, trade, console)
    for warning in plan.warnings:
        console.print(f"[yellow]warning:[/] {warning}", highlight=False)


def show_tradeoffs(plan: Plan, trade: list[Tradeoff], console: Console) -> None:
    """Time against compute at equal loss."""
    table = Table(
        title="The same loss with other batches", box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False
    )
    columns = {
        "batch, tokens": [
            number(row.batch_tokens) + (" <" if math.isclose(row.batch_tokens, plan.batch_tokens) else "")
            for row in trade
        ],
        "steps": [number(row.steps) for row in trade],
        "tokens": [short(row.tokens, 4) for row in trade],
        "GPU-hours": ["" if row.gpu_hours is None else f"{row.gpu_hours:,.1f}" for row in trade],
        "time, GPUs x batch": ["" if row.hours is None else seconds_text(3600 * row.hours) for row in trade],
    }
    # without a device nothing of time
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    for name in columns:
        table.add_column(name, justify="right", overflow="fold")
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    console.print(table)
