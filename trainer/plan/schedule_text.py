"""The warm-up of a plan, and its schedule in words, with its own numbers. Imports nothing heavy."""

from stepline.trainer.plan.planner import Plan

WARMUP_SHARE, MOST_WARMUP = 10, 2000
"""One step in so many, and no more steps than so many."""


def auto_warmup(steps: int) -> int:
    """Warm-up steps of a run of so many, where the config leaves them open."""
    return min(MOST_WARMUP, max(1, steps // WARMUP_SHARE))


def check_warmup(warmup: int, steps: int) -> list[str]:
    """A warning where the warm-up takes the whole run."""
    if warmup < steps or steps == 1:
        return []
    return [
        f"schedule.warmup_steps {warmup} is not below the run's {steps} steps: the learning rate never reaches its peak"
    ]


def percent(share: float) -> str:
    """`2.1 %`, `10 %`."""
    return f"{100 * share:.1f}".removesuffix(".0") + " %"


def schedule_of(plan: Plan) -> str:
    """`2,000 steps (2.1 %) warm-up, then linear to zero`."""
    i = plan.inputs
    warmup = auto_warmup(plan.steps) if i.warmup_steps is None else i.warmup_steps
    steps = "1 step" if warmup == 1 else f"{warmup:,} steps"
    start = f"{steps} ({percent(warmup / plan.steps)}) warm-up" if warmup else "no warm-up"
    if i.schedule == "wsd":
        start += f", the peak until the last {percent(i.decay_fraction)}"
    end = "zero" if i.final_fraction == 0 else f"{percent(i.final_fraction)} of the peak"
    return f"{start}, then {'cosine' if i.schedule == 'cosine' else 'linear'} to {end}"


def schedule_text(plan: Plan) -> str:
    """The schedule of the run, and the one that the numbers were fitted with."""
    return (
        f"{schedule_of(plan)} ({plan.law.source.name} was fitted with: {plan.law.assumes}; Power Lines: 10 % warm-up, "
        "then linear to zero)"
    )
