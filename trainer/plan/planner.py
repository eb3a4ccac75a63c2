"""Fills every `auto` of a config: batch, learning rate and weight decay by law, the rest by the machine."""

import math
from dataclasses import dataclass

from stepline.models.flops import parameter_counts
from stepline.trainer.config import Config
from stepline.trainer.config_io import Origins
from stepline.trainer.errors import UserError
from stepline.trainer.plan.laws import PowerLines, StepLaw

WEIGHT_DECAY_RANGE = (0.02, 0.3)
"""Clamp of the planned weight decay: our choice, outside the values that the law was fitted on."""


@dataclass(frozen=True)
class Machine:
    """What the planner must know of the machine."""

    world_size: int
    device: str
    """`cpu` or `cuda`."""
    bf16: bool
    """Whether the device computes in bf16 at full speed."""


def round_batch(ideal_tokens: float, quantum: int) -> int:
    """The multiple of `quantum` tokens (ranks x micro-batch x sequence) nearest to the ideal in the logarithm."""
    k = max(1, math.floor(ideal_tokens / quantum))
    if math.log(ideal_tokens / (k * quantum)) > math.log((k + 1) * quantum / ideal_tokens):
        k += 1
    return k * quantum


def scaled_lr(lr: float, batch_ratio: float) -> float:
    """lr * min(1, B / B*)^.7: the learning rate when the batch is forced away from the law's."""
    return lr * min(1.0, batch_ratio) ** 0.7


def resolve(config: Config, origins: Origins, machine: Machine, corpus_tokens: int | None) -> list[str]:
    """Replaces every `auto` in place and notes its origin; returns warnings in plain words.

    corpus_tokens: training tokens on disk, for a config without a budget (one epoch). Raises UserError for
    a layout that the ranks cannot make.
    """
    warnings: list[str] = []

    def settle(section: str, key: str, value: object, origin: str) -> None:
        part = getattr(config, section)
        if getattr(part, key) in ("auto", None):
            setattr(part, key, value)
            origins[f"{section}.{key}"] = origin

    world, budget, parallel = machine.world_size, config.budget, config.parallel
    seq_len = config.data.seq_len
    settle("run", "device", machine.device, "machine")
    settle("precision", "compute", "bf16" if machine.device == "cuda" and machine.bf16 else "fp32", "machine")
    settle("run", "compile", machine.device == "cuda", "machine")
    settle("parallel", "shard", world, "machine")
    if parallel.shard > world:
        raise UserError(
            f"parallel.shard is {parallel.shard} but there are {world} ranks; set it to a divisor of {world} "
            "or start more ranks"
        )
    if world % parallel.shard:
        raise UserError(
            f"parallel.shard {parallel.shard} does not divide the {world} ranks; choose a divisor"
        )

    if budget.tokens is None and budget.steps is None:
        if corpus_tokens is None:
            raise UserError("the config has no budget; set budget.tokens (D) or budget.steps")
        settle("budget", "tokens", corpus_tokens, "one epoch of the data")
    if budget.batch_tokens != "auto" and budget.batch_tokens % seq_len:
        near = max(1, round(budget.batch_tokens / seq_len)) * seq_len
        raise UserError(
            f"budget.batch_tokens {budget.batch_tokens} is no multiple of data.seq_len {seq_len}; the nearest is {near}"
        )

    law = StepLaw()
    counts = parameter_counts(config.model)
    if budget.steps is not None and budget.batch_tokens == "auto":
        raise UserError("budget.steps needs budget.batch_tokens, or give budget.tokens instead")
    tokens = budget.tokens or budget.steps * budget.batch_tokens
    ideal_batch = law.batch_tokens(tokens)
    per_rank = max(
        1, (budget.batch_tokens if budget.batch_tokens != "auto" else ideal_batch) // (world * seq_len)
    )
    most = max(1, (16_384 if machine.device == "cuda" else 8_192) // seq_len)
    if parallel.micro_batch == "auto":
        pieces = math.ceil(per_rank / most)
        settle("parallel", "micro_batch", math.ceil(per_rank / pieces), "machine")
    settle(
        "budget",
        "batch_tokens",
        round_batch(ideal_batch, world * parallel.micro_batch * seq_len),
        "law: Step Law",
    )
    ratio = budget.batch_tokens / ideal_batch
    if not 0.5 <= ratio <= 2:
        warnings.append(
            f"the batch is {budget.batch_tokens:,} tokens, {ratio:.2g} x the law's {ideal_batch:,.0f}"
        )
    if config.optimizer.lr == "auto":
        settle("optimizer", "lr", scaled_lr(law.lr(counts.linear, tokens), ratio), "law: Step Law")
        if not (2e8 <= counts.linear <= 1.1e9 and 4e9 <= tokens <= 1e11):
            warnings.append(
                f"N = {counts.linear:.3g} and D = {tokens:.3g} lie outside the range in which Step Law was fitted "
                "(N 0.2-1.1 B, D 4-100 B): the learning rate is extrapolated"
            )
        if config.optimizer.name != "adamw":
            warnings.append(
                "the learning rate's law was fitted with AdamW, not Muon: set optimizer.lr if you know better"
            )
    if config.optimizer.weight_decay == "auto":
        decay = PowerLines().weight_decay(counts.linear, tokens, config.optimizer.lr, budget.batch_tokens)
        low, high = WEIGHT_DECAY_RANGE
        settle("optimizer", "weight_decay", min(max(decay, low), high), "law: Power Lines")
        if not low <= decay <= high:
            warnings.append(
                f"the law's weight decay {decay:.3g} is clamped to {config.optimizer.weight_decay}"
            )

    steps = config.total_steps()
    settle("schedule", "warmup_steps", min(2000, max(1, steps // 10)), "10 % of the steps")
    settle("checkpoint", "every", max(1, min(1000, steps // 10)), "a tenth of the run")
    settle("logging", "eval_every", max(1, steps // 10), "a tenth of the run")
    return warnings
