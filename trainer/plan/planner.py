"""The planner: learning rate, weight decay, batch and steps of a run, from N and D and the machine's granularity.

The steps are numbered as in the docstring of `make_plan`; laws.py holds the equations. Imports nothing heavy.
"""

import math
from dataclasses import dataclass

from stepline.trainer.errors import UserError
from stepline.trainer.plan.kind import differences
from stepline.trainer.plan.laws import POWER_LINES, STEP_LAW, StepLaw

WEIGHT_DECAY_RANGE = (0.02, 0.3)
"""Clamp of the planned weight decay: our choice, outside the values that the law was fitted on."""
MOE_WEIGHT_DECAY = 0.1
"""For mixtures of experts the timescale's D/N is not validated: a fixed value instead."""
BATCH_RATIOS, TOO_FEW_STEPS = (0.5, 2.0), 2000
PARAMS_RANGE, TOKENS_RANGE = (1.0, 1e15), (1.0, 1e18)
"""What is accepted at all: beyond it a number is a slip of the keyboard. PARAMS_RANGE is that of counts too."""
LAW_RANGE = (1e-20, 1e20)
"""Of a law's learning rate and batch: what is beyond would overflow."""


@dataclass(frozen=True)
class Inputs:
    """What a plan is made from. What is None is left to the law, or, of the machine, not rounded to."""

    params: float
    """N: non-embedding linear weights; of a mixture of experts all of them."""
    tokens: float
    """D."""
    active_params: float | None = None
    """Linear weights that one token uses, where that is fewer than N (mixture of experts)."""
    seq_len: int | None = None
    world_size: int | None = None
    """Data-parallel ranks."""
    micro_batch: int | None = None
    """Windows of one forward-backward on one rank."""
    batch_tokens: int | None = None
    """A batch that is set; the law's own when None."""
    lr: float | None = None
    weight_decay: float | None = None
    optimizer: str = "adamw"
    sync: str = "all_reduce"
    schedule: str = "linear"
    warmup_steps: int | None = None
    """Left to `schedule_text.auto_warmup` when None."""
    final_fraction: float = 0.0
    """Learning rate at the end, over its peak."""
    decay_fraction: float = 0.2
    """Of the steps, those in which wsd decays."""
    kind: str = ""
    """Of the model (`kind.kind_of`); empty where only numbers are known."""
    settled_at: float | None = None
    """D at the start of a run whose budget was changed on resume: learning rate, weight decay and batch are its."""

    def __post_init__(self) -> None:
        for name in (
            "params", "tokens", "seq_len", "world_size", "micro_batch", "batch_tokens", "active_params",
        ):  # fmt: skip
            check_range(name, getattr(self, name))
        if self.active_params is not None and self.active_params > self.params:
            raise UserError(
                f"active_params {self.active_params:g} exceed params {self.params:g}; params counts all experts"
            )

    @property
    def quantum(self) -> int | None:
        """Tokens of one micro-batch on every rank; None unless ranks, micro-batch and sequence are known."""
        if None in (self.world_size, self.micro_batch, self.seq_len):
            return None
        return self.world_size * self.micro_batch * self.seq_len

    @property
    def mixture(self) -> bool:
        """Whether a token uses fewer weights than there are."""
        return self.active_params is not None and self.active_params < self.params

    @property
    def known_kind(self) -> str:
        """`kind`, or what the numbers tell of it."""
        return self.kind or ("ffn=moe" if self.mixture else "")


def check_range(name: str, value: float | None, called: str | None = None) -> None:
    """Raises UserError for a number of `Inputs` that is out of range; called: what the user calls it."""
    low, high = TOKENS_RANGE if name == "tokens" else PARAMS_RANGE
    if value is not None and not low <= value <= high:  # also refuses NaN
        raise UserError(f"{called or name} is {value:g}; it must be between {low:g} and {high:g}")


@dataclass(frozen=True)
class Plan:
    """What the run will use, and the law's values before rounding."""

    inputs: Inputs
    law: StepLaw
    ideal_lr: float
    ideal_batch_tokens: float
    ideal_weight_decay: float
    tau: float
    """Best AdamW timescale, as a fraction of the run."""
    batch_critical_tokens: float
    batch_tokens: float
    """A whole number where it was rounded or given."""
    grad_accumulation: int
    steps: int
    lr: float
    weight_decay: float
    penalty_percent: float
    """Loss above the best that the batch and the learning rate cost, in % (`penalty_percent`)."""
    warnings: tuple[str, ...]

    @property
    def ratio(self) -> float:
        """r = B / B*."""
        return self.batch_tokens / self.ideal_batch_tokens


def round_batch(ideal_tokens: float, quantum: int) -> int:
    """The multiple of `quantum` tokens (ranks x micro-batch x sequence) nearest to the ideal in the logarithm."""
    k = max(1, math.floor(ideal_tokens / quantum))
    if ideal_tokens / (k * quantum) > (k + 1) * quantum / ideal_tokens:
        k += 1
    return k * quantum


def scaled_lr(lr: float, batch_ratio: float) -> float:
    """lr * min(1, B / B*)^.7: the learning rate when the batch is forced away from the law's."""
    return lr * min(1.0, batch_ratio) ** 0.7


def penalty_percent(batch_ratio: float, lr_ratio: float) -> float:
    """Loss above the best in %, .29 log2(B/B*)^2 + .33 log2(lr/lr_best(B))^2 (our fit on Step Law's released runs).

    lr_ratio: the learning rate over the best one at that batch, `scaled_lr`.
    """
    return 0.29 * math.log2(batch_ratio) ** 2 + 0.33 * math.log2(lr_ratio) ** 2


def law_values(law: StepLaw, params: float, tokens: float) -> tuple[float, float]:
    """The law's learning rate and batch in tokens; raises UserError where they are no use to anyone."""
    lr, batch = law.lr(params, tokens), law.batch_tokens(tokens)
    low, high = LAW_RANGE
    if not (low <= lr <= high and low <= batch <= high):
        raise UserError(
            f"{law.source.name} gives lr {lr:.3g} and a batch of {batch:.3g} tokens at N = {params:.3g}, "
            f"D = {tokens:.3g}, which cannot be used; take another law"
        )
    return lr, batch


def make_plan(inputs: Inputs, law: StepLaw = STEP_LAW) -> Plan:
    """The seven steps; raises UserError when the budget is below one batch or one window.

    1. lr* and B* by Step Law (or a law fitted on the user's own runs).
    2. Second opinion: Power Lines' B_opt; a warning when the two differ by more than 2 x.
    3. B: the multiple of ranks x micro-batch x sequence nearest to B* in the logarithm; steps = D / B.
    4. lr = lr* min(1, B/B*)^.7.
    5. Weight decay from the timescale at this lr and B, clamped; a fixed .1 for a mixture of experts.
    6. The schedule that the numbers assume is named.
    7. Warnings.
    """
    n, d = inputs.params, inputs.tokens
    ideal_lr, ideal_batch = law_values(law, n, d)
    batch = float(ideal_batch)
    if inputs.batch_tokens is not None:
        batch = inputs.batch_tokens
    elif inputs.quantum is not None:
        batch = round_batch(ideal_batch, inputs.quantum)
    for what, least in (("batch", batch), ("window", inputs.seq_len or 0)):
        if d < least:
            raise UserError(
                f"the budget of {d:,.0f} tokens is below one {what} of {least:,.0f}; give more tokens"
            )
    best_lr = scaled_lr(ideal_lr, batch / ideal_batch)
    lr = inputs.lr if inputs.lr is not None else best_lr
    warnings = law_warnings(inputs, law)

    by_timescale = POWER_LINES.weight_decay(n, d, lr, batch)
    if inputs.weight_decay is None and not inputs.mixture:
        warnings += decay_warnings(inputs)
    if inputs.weight_decay is not None:
        decay = inputs.weight_decay
    elif inputs.mixture:
        decay = MOE_WEIGHT_DECAY
        warnings.append(
            f"weight decay is {MOE_WEIGHT_DECAY}: the timescale law is not validated for mixtures of experts"
        )
    else:
        low, high = WEIGHT_DECAY_RANGE
        decay = min(max(by_timescale, low), high)
        if decay != by_timescale:
            warnings.append(
                f"the law's weight decay {by_timescale:.3g} is clamped to {decay} (our range is {low}-{high})"
            )

    steps = math.ceil(d / batch)
    critical = POWER_LINES.critical_batch_tokens(d)
    warnings += batch_warnings(batch, ideal_batch, critical, steps, fewest_steps(law))
    quantum = inputs.quantum
    return Plan(
        inputs=inputs,
        law=law,
        ideal_lr=ideal_lr,
        ideal_batch_tokens=ideal_batch,
        ideal_weight_decay=POWER_LINES.weight_decay(n, d, ideal_lr, ideal_batch),
        tau=POWER_LINES.tau(n, d),
        batch_critical_tokens=critical,
        batch_tokens=batch,
        grad_accumulation=1 if quantum is None else math.ceil(batch / quantum),
        steps=steps,
        lr=lr,
        weight_decay=decay,
        penalty_percent=penalty_percent(batch / ideal_batch, lr / best_lr),
        warnings=tuple(warnings),
    )


def law_warnings(inputs: Inputs, law: StepLaw) -> list[str]:
    """What of the law does not fit this run: range, optimizer, synchroniser, models, a second opinion far away.

    Only of what is left to the law: nothing of a learning rate or a batch that is set.
    """
    n, d = inputs.params, inputs.tokens
    open_keys = [key for key in ("lr", "batch_tokens") if getattr(inputs, key) is None]
    if not open_keys:
        return []
    names = {"lr": "learning rate", "batch_tokens": "batch"}
    what = " and ".join(names[key] for key in open_keys)
    key = "optimizer.lr" if inputs.lr is None else "budget.batch_tokens"
    warnings = []
    if outside := law.source.outside(n, d, inputs.active_params):
        warnings.append(f"{law.source.name} is extrapolated: {', '.join(outside)}")
    if inputs.optimizer != law.optimizer:
        warnings.append(
            f"{law.source.name} was fitted with {law.optimizer}, not {inputs.optimizer}: "
            f"set {key}, or budget.law to a law fitted on your own runs"
        )
    if inputs.sync != law.sync:
        warnings.append(
            f"{law.source.name} was fitted with {law.sync}, not {inputs.sync}: check the {names[open_keys[0]]}"
        )
    if told := differences(law.kind, inputs.known_kind):
        no_loss = "" if law.loss_law is None else ", and no loss is expected by it"
        guess = "are" if len(open_keys) > 1 else "is"
        warnings.append(
            f"{law.source.name} was fitted on models with {' and '.join(told)}: its {what} {guess} a "
            f"guess here{no_loss}"
        )
    if law is STEP_LAW and inputs.batch_tokens is None:
        ideal, other = law.batch_tokens(d), POWER_LINES.batch_tokens(d)
        if not 0.5 <= other / ideal <= 2:
            warnings.append(
                f"the laws disagree on the batch: {law.source.name} says {ideal:,.0f} tokens, Power Lines {other:,.0f}"
            )
    return warnings


def decay_warnings(inputs: Inputs) -> list[str]:
    """What of the weight decay's law, of which there is none but the published one, does not fit this run."""
    other = inputs.optimizer if inputs.optimizer != "adamw" else inputs.sync
    if other in ("adamw", "all_reduce"):
        return []
    return [
        f"weight decay: Power Lines was fitted with adamw and all_reduce, not {other}: set optimizer.weight_decay"
    ]


def fewest_steps(law: StepLaw) -> int:
    """Of the runs that a law was fitted on: of a user's own law, those of its smallest budget at its batch."""
    if law is STEP_LAW or law.source.tokens is None:
        return TOO_FEW_STEPS
    least = law.source.tokens[0]
    return round(least / law.batch_tokens(least))


def batch_warnings(batch: float, ideal: float, critical: float, steps: int, fewest: int) -> list[str]:
    """What the batch that will be used costs."""
    warnings = []
    if batch > critical:
        warnings.append(
            f"the batch of {batch:,.0f} tokens exceeds the critical {critical:,.0f}: "
            "more ranks no longer save time in proportion"
        )
    ratio, (low, high) = batch / ideal, BATCH_RATIOS
    if not low <= ratio <= high:
        warnings.append(f"the batch is {batch:,.0f} tokens, {ratio:.2g} x the law's {ideal:,.0f}")
    if steps < fewest:
        warnings.append(f"{steps:,} steps are few: the laws were fitted on runs of at least {fewest:,}")
    return warnings
