"""Fills every `auto` of a config: batch, learning rate and weight decay by law, the rest by the machine."""

import math
from dataclasses import dataclass, replace

from stepline.models.config import nearest_divisor
from stepline.models.flops import parameter_counts
from stepline.trainer.config import Config, dense_from
from stepline.trainer.config_io import Origins
from stepline.trainer.errors import UserError
from stepline.trainer.plan.eval_windows import auto_eval_windows
from stepline.trainer.plan.kind import kind_of
from stepline.trainer.plan.laws import STEP_LAW, StepLaw
from stepline.trainer.plan.memory import fit_layout
from stepline.trainer.plan.planner import Inputs, Plan, law_values, make_plan
from stepline.trainer.plan.product_checks import check_products
from stepline.trainer.plan.schedule_text import MOST_WARMUP, auto_warmup, check_warmup
from stepline.trainer.plan.zero import Settle, check_zero, settle_zero

MICRO_BATCH_TOKENS = {"cuda": 16_384, "cpu": 8_192}
"""Tokens beyond which a larger micro-batch is not faster."""


@dataclass(frozen=True)
class Machine:
    """What the planner must know of the machine."""

    world_size: int
    device: str
    """`cpu` or `cuda`."""
    bf16: bool
    """Whether the device computes in bf16 at full speed."""
    memory_bytes: int | None = None
    """Of one device, the same on every rank; None when it is not known."""
    node_ranks: int = 1
    """Ranks of one node, which share its fast links."""


def config_inputs(config: Config, world_size: int | None, corpus_tokens: int | None = None) -> Inputs:
    """The planner's inputs of a config; N and the active weights are counted from its shapes.

    corpus_tokens: training tokens on disk, for a config without a budget (one epoch). Raises UserError.
    """
    budget, seq_len = config.budget, config.data.seq_len
    batch = None if budget.batch_tokens == "auto" else budget.batch_tokens
    if batch is not None and batch % seq_len:
        near = max(1, round(batch / seq_len)) * seq_len
        raise UserError(
            f"budget.batch_tokens {batch} is no multiple of data.seq_len {seq_len}; the nearest is {near}"
        )
    if budget.steps is not None and batch is None:
        raise UserError("budget.steps needs budget.batch_tokens, or give budget.tokens instead")
    tokens = budget.steps * batch if budget.steps is not None else budget.tokens or corpus_tokens
    if tokens is None:
        raise UserError("the config has no budget; set budget.tokens (D) or budget.steps")
    counts = parameter_counts(config.model)
    given = {
        key: None if getattr(config.optimizer, key) == "auto" else getattr(config.optimizer, key)
        for key in ("lr", "weight_decay")
    }
    micro_batch = config.parallel.micro_batch
    return Inputs(
        params=counts.linear,
        tokens=tokens,
        active_params=counts.active,
        seq_len=seq_len,
        world_size=world_size,
        micro_batch=None if micro_batch == "auto" else micro_batch,
        batch_tokens=batch,
        optimizer=config.optimizer.name,
        sync=config.parallel.sync,
        schedule=config.schedule.name,
        warmup_steps=None if config.schedule.warmup_steps == "auto" else config.schedule.warmup_steps,
        final_fraction=config.schedule.final_fraction,
        decay_fraction=config.schedule.decay_fraction,
        kind=kind_of(config),
        **given,
    )


def law_of_resumed(config: Config) -> tuple[StepLaw, list[str]]:
    """`config_law`; where its file is gone Step Law and a note, since all that a law decides is settled."""
    try:
        return config_law(config), []
    except UserError as error:
        return STEP_LAW, [f"{error}; the run goes on with what was planned by it"]


def config_law(config: Config) -> StepLaw:
    """The law that the config names, Step Law by default."""
    if config.budget.law is None:
        return STEP_LAW
    from stepline.trainer.plan.law_file import named_law

    return named_law(config.budget.law)


def resolve(
    config: Config, origins: Origins, machine: Machine, corpus_tokens: int | None, law: StepLaw | None = None
) -> tuple[Plan, list[str]]:
    """Replaces every `auto` in place and notes its origin; returns the plan and warnings in plain words.

    corpus_tokens: training tokens on disk, for a config without a budget (one epoch). law: in the place of the one
    that the config names. Raises UserError for a layout that the ranks cannot make.
    """

    settle = settler(config, origins)
    world, budget, parallel = machine.world_size, config.budget, config.parallel
    settle_machine(config, origins, machine)
    law = law or config_law(config)
    inputs = config_inputs(config, world, corpus_tokens)
    if budget.steps is None:
        settle("budget", "tokens", inputs.tokens, "one epoch of the data")
    ideal = inputs.batch_tokens or law_values(law, inputs.params, inputs.tokens)[1]
    useful = (
        auto_micro_batch(config, ideal, machine) if parallel.micro_batch == "auto" else parallel.micro_batch
    )
    plan = make_plan(replace(config_inputs(config, world, corpus_tokens), micro_batch=useful), law)
    by_law = f"law: {law.source.name}"
    planned = settle("budget", "batch_tokens", plan.batch_tokens, by_law)
    # After the batch, which the memory of the devices must not change.
    windows = budget.batch_tokens // config.data.seq_len
    shard, micro_batch, crowded = fit_layout(
        config, world, useful, windows, machine.memory_bytes, machine.node_ranks
    )
    settle("parallel", "shard", shard, "machine")
    check_experts(config, world)
    settle("parallel", "micro_batch", micro_batch, "machine")
    pieces = math.ceil(windows / (world * micro_batch))
    plan = replace(plan, inputs=replace(plan.inputs, micro_batch=micro_batch), grad_accumulation=pieces)
    planned |= settle("optimizer", "lr", plan.lr, by_law)
    planned |= settle("optimizer", "weight_decay", plan.weight_decay, "law: Power Lines")

    steps = config.total_steps()
    warmup = auto_warmup(steps)
    how = "10 % of the steps" if warmup < MOST_WARMUP else f"at most {MOST_WARMUP:,} steps"
    settle("schedule", "warmup_steps", warmup, how)
    settle("checkpoint", "every", max(1, steps // 10), "a tenth of the run")
    settle("logging", "eval_every", max(1, steps // 10), "a tenth of the run")
    if config.logging.eval_windows == "auto":  # null has a meaning
        settle("logging", "eval_windows", *auto_eval_windows(config))
    crowded += check_warmup(config.schedule.warmup_steps, steps)
    crowded += check_dense_end(config.sparse.dense_fraction, steps)
    # Who sets all three by hand, and who resumes, has no use for what the laws say.
    return plan, crowded + (list(plan.warnings) if planned else [])


def check_dense_end(fraction: float, steps: int) -> list[str]:
    """A warning where the dense steps at the end of a sparse run come to none; raises UserError where all are dense."""
    dense = steps - dense_from(fraction, steps)
    if not fraction or 0 < dense < steps:
        return []
    if dense:
        raise UserError(
            f"sparse.dense_fraction {fraction:g} makes all of the run's {steps} steps dense; lower it, or set "
            "sparse.mode to none"
        )
    return [f"sparse.dense_fraction {fraction:g} of {steps} steps is less than one: none is dense"]


def settler(config: Config, origins: Origins) -> Settle:
    """Sets a key that is still open, and notes its origin; says whether it did."""

    def settle(section: str, key: str, value: object, origin: str) -> bool:
        part = getattr(config, section)
        if getattr(part, key) not in ("auto", None):
            return False
        setattr(part, key, value)
        origins[f"{section}.{key}"] = origin
        return True

    return settle


def settle_machine(config: Config, origins: Origins, machine: Machine) -> None:
    """Fills what follows from the machine alone and checks what is left: for `plan` as for `train`.

    Raises UserError for what no run of the config can do on it.
    """
    settle = settler(config, origins)
    settle("run", "device", machine.device, "machine")
    settle("precision", "compute", "bf16" if machine.device == "cuda" and machine.bf16 else "fp32", "machine")
    if config.parallel.backend == "zero":
        settle_zero(config, machine, settle)
    settle("run", "compile", machine.device == "cuda", "machine")
    check_run(config, machine.world_size)


def check_run(config: Config, world: int | None) -> None:
    """Raises UserError for what no run of the config on `world` ranks can do; None: on any number of them."""
    if config.parallel.backend == "zero":
        check_zero(config)
    if world is not None and config.parallel.shard != "auto":
        check_layout(config.parallel.shard, world)
    check_experts(config, world)
    check_products(config)
    if config.parallel.sync == "random_k":
        check_random_k(config.parallel.random_k.density)
    if config.model.blocks == "revffn" and config.run.recompute != "none":
        raise UserError("reversible blocks recompute their activations themselves; set run.recompute to none")


def check_random_k(density: float) -> None:
    """Raises UserError for a share of the values that is not near one of a whole number."""
    if abs(round(1 / density) * density - 1) > 0.05:
        below, above = 1 / math.ceil(1 / density), 1 / math.floor(1 / density)
        raise UserError(
            f"parallel.random_k.density {density:g} is not near one value of a whole number; the nearest are "
            f"{below:.4g} and {above:.4g}"
        )


def check_layout(shard: int, world: int) -> None:
    """Raises UserError for a number of shards that the ranks cannot make."""
    if shard > world:
        raise UserError(
            f"parallel.shard is {shard} but there are {world} ranks; set it to a divisor of {world} "
            "or start more ranks"
        )
    if world % shard:
        raise UserError(f"parallel.shard {shard} does not divide the {world} ranks; choose a divisor")


def check_experts(config: Config, world: int | None, shard: int | None = None) -> None:
    """Raises UserError for a number of parts that the experts, or the ranks of a replica, cannot make.

    world: None where it is not known; there are then taken to be no more ranks than parts. shard: ranks of a replica;
    None: those of the config, of which nothing is known while they are auto.
    """
    parts = config.parallel.experts
    if parts == 1:
        return
    if config.model.ffn != "moe":
        raise UserError("parallel.experts deals a mixture's experts; set it to 1, or model.ffn to moe")
    if shard is None and config.parallel.shard != "auto":
        shard = config.parallel.shard
    ranks = shard or world or parts
    if ranks % parts:
        raise UserError(
            f"parallel.experts {parts} does not divide the {ranks} ranks{' of a replica' if shard else ''}; the "
            f"nearest that does: {nearest_divisor(ranks, parts)}"
        )
    if config.model.moe.experts % parts:
        both = math.gcd(ranks, config.model.moe.experts)
        raise UserError(
            f"the {config.model.moe.experts} experts cannot be dealt evenly to {parts} ranks (parallel.experts); the "
            f"nearest possible: {nearest_divisor(both, parts)}"
        )
    if shard is None:
        return
    held, rest = config.model.moe.experts // parts, shard // parts
    rows = (config.model.ffn_size, config.model.hidden_size)
    if held % rest and (whole_matrices(config) or any(n % rest for n in rows)):
        raise UserError(
            f"the {held} experts that each of {parts} ranks holds (parallel.experts) cannot be sharded evenly over "
            f"{rest} more; set parallel.experts to {nearest_divisor(math.gcd(ranks, config.model.moe.experts), ranks)}"
        )


def whole_matrices(config: Config) -> bool:
    """Whether an update orthogonalises matrices, so that those of stacks may not be cut."""
    parallel = config.parallel
    return config.optimizer.name == "muon" or (parallel.sync == "demo" and parallel.demo.phi == "muon")


def auto_micro_batch(config: Config, batch_tokens: float, machine: Machine) -> int:
    """Windows of a micro-batch: a rank's share of the batch, in as few equal pieces as are not larger than useful.

    batch_tokens: the config's batch, or the law's where that is open. The law's goes to the nearest number of windows a
    rank that so many pieces divide. Rounded to micro-batches on all ranks it then never shrinks when D grows.
    """
    most = max(1, MICRO_BATCH_TOKENS[machine.device] // config.data.seq_len)
    each = machine.world_size * config.data.seq_len

    def pieces(windows: int) -> int:
        return math.ceil(windows / most)

    if config.budget.batch_tokens != "auto":
        share = math.ceil(batch_tokens / each)
    else:
        low = max(1, math.floor(batch_tokens / each))
        while low % pieces(low):
            low -= 1
        high = low + 1
        while high % pieces(high):
            high += 1
        # In tokens, as in `round_batch`, which then finds the same batch: its neighbours are no nearer than these.
        share = high if batch_tokens / (low * each) > high * each / batch_tokens else low
    return math.ceil(share / pieces(share))
