"""Learning-rate schedules as pure functions of the update's index."""

import math

from stepline.trainer.config import Config
from stepline.trainer.errors import UserError, nearest

SCHEDULES = ("linear", "cosine", "wsd")


def lr_multiplier(
    step: int,
    total_steps: int,
    warmup_steps: int = 0,
    name: str = "linear",
    final_fraction: float = 0.0,
    decay_fraction: float = 0.2,
) -> float:
    """What the peak learning rate is multiplied by in update `step`, in [0, 1].

    Updates are counted 0 .. total_steps - 1. The first `warmup_steps` of them rise linearly,
    (step + 1) / warmup_steps: the first is above zero, the last is the peak. The schedule then starts from
    the peak at step = warmup_steps and would reach `final_fraction` at step = total_steps, one after the
    last update: no update is spent at a rate of zero.

    linear: straight to `final_fraction` (linear to zero: arXiv 2502.15938).
    cosine: half a cosine to `final_fraction` (arXiv 1608.03983).
    wsd:    the peak until the last `decay_fraction` of all updates, then straight to `final_fraction`
            (warmup-stable-decay: arXiv 2404.06395).

    Raises UserError for another name.
    """
    if name not in SCHEDULES:
        raise UserError(
            f"schedule.name '{name}' is not one of {', '.join(SCHEDULES)}{nearest(name, SCHEDULES)}"
        )
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    start = warmup_steps
    if name == "wsd":
        start = max(warmup_steps, total_steps - round(decay_fraction * total_steps))
    progress = min(max(step - start, 0) / max(total_steps - start, 1), 1.0)
    remaining = (1 + math.cos(math.pi * progress)) / 2 if name == "cosine" else 1 - progress
    return final_fraction + (1 - final_fraction) * remaining


def learning_rate_multiplier(config: Config, step: int) -> float:
    """The schedule's factor for the update with index `step` of a resolved config."""
    return lr_multiplier(
        step,
        total_steps=config.total_steps(),
        warmup_steps=config.schedule.warmup_steps,
        name=config.schedule.name,
        final_fraction=config.schedule.final_fraction,
        decay_fraction=config.schedule.decay_fraction,
    )
