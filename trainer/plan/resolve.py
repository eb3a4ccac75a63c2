"""Fills every `auto` of a config: batch, learning rate and weight decay by law, the rest by the machine."""

import math
from dataclasses import dataclass, replace

from stepline.models.config import nearest_divisor, nearest_multiple
from stepline.models.flops import parameter_counts
from stepline.trainer.config import Config
from stepline.trainer.config_io import Origins
from stepline.trainer.config_multiples import product_multiples
from stepline.trainer.errors import UserError
from stepline.trainer.plan.kind import kind_of
from stepline.trainer.plan.laws import STEP_LAW, StepLaw
from stepline.trainer.plan.memory import fit_layout
from stepline.trainer.plan.planner import Inputs, Plan, law_values, make_plan
from stepline.trainer.plan.zero import settle_zero

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
        kind=kind_of(config),
        **given,
    )


def config_law(config: Config) -> StepLaw:
    """The law that the config names, Step Law by default."""
    if config.budget.law is None:
        return STEP_LAW
    from stepline.trainer.plan.law_file import named_law

    return named_law(config.budget.law)


def resolve(
    config: Config, origins: Origins, machine: Machine, corpus_tokens: int | None
) -> tuple[Plan, list[str]]:
    """Replaces every `auto` in place and notes its origin; returns the plan and warnings in plain words.

    corpus_tokens: training tokens on disk, for a config without a budget (one epoch). Raises UserError for
    a layout that the ranks cannot make.
    """

    def settle(section: str, key: str, value: object, origin: str) -> bool:
        part = getattr(config, section)
        if getattr(part, key) not in ("auto", None):
            return False
        setattr(part, key, value)
        origins[f"{section}.{key}"] = origin
        return True

    world, budget, parallel = machine.world_size, config.budget, config.parallel
    settle("run", "device", machine.device, "machine")
    settle("precision", "compute", "bf16" if machine.device == "cuda" and machine.bf16 else "fp32", "machine")
    if parallel.backend == "zero":
        settle_zero(config, machine, settle)
    settle("run", "compile", machine.device == "cuda", "machine")
    if parallel.shard != "auto":
        check_layout(parallel.shard, world)
    check_experts(config, world)
    check_products(config)
    if config.model.blocks == "revffn" and config.run.recompute != "none":
        raise UserError("reversible blocks recompute their activations themselves; set run.recompute to none")

    law = config_law(config)
    inputs = config_inputs(config, world, corpus_tokens)
    if budget.steps is None:
        settle("budget", "tokens", inputs.tokens, "one epoch of the data")
    ideal = inputs.batch_tokens or law_values(law, inputs.params, inputs.tokens)[1]
    useful = (
        auto_micro_batch(config, ideal, machine) if parallel.micro_batch == "auto" else parallel.micro_batch
    )
    plan = make_plan(replace(config_inputs(config, world, corpus_tokens), micro_batch=useful), law)
    by_law = f"law: {law.source.name}"
    settle("budget", "batch_tokens", plan.batch_tokens, by_law)
    # After the batch, which the memory of the devices must not change.
    windows = budget.batch_tokens // config.data.seq_len
    shard, micro_batch, crowded = fit_layout(
        config, world, useful, windows, machine.memory_bytes, machine.node_ranks
    )
    settle("parallel", "shard", shard, "machine")
    settle("parallel", "micro_batch", micro_batch, "machine")
    pieces = math.ceil(windows / (world * micro_batch))
    plan = replace(plan, inputs=replace(plan.inputs, micro_batch=micro_batch), grad_accumulation=pieces)
    planned = settle("optimizer", "lr", plan.lr, by_law)
    planned |= settle("optimizer", "weight_decay", plan.weight_decay, "law: Power Lines")

    steps = config.total_steps()
    settle("schedule", "warmup_steps", min(2000, max(1, steps // 10)), "10 % of the steps")
    settle("checkpoint", "every", max(1, steps // 10), "a tenth of the run")
    settle("logging", "eval_every", max(1, steps // 10), "a tenth of the run")
    if config.schedule.warmup_steps >= steps > 1:
        crowded.append(
            f"schedule.warmup_steps {config.schedule.warmup_steps} is not below the run's {steps} steps: the learning "
            "rate never reaches its peak"
        )
    # Who sets lr and weight decay by hand has no use for what is wrong with the laws.
    return plan, crowded + (list(plan.warnings) if planned else [])


def check_layout(shard: int, world: int) -> None:
    """Raises UserError for a number of shards that the ranks cannot make."""
    if shard > world:
        raise UserError(
            f"parallel.shard is {shard} but there are {world} ranks; set it to a divisor of {world} "
            "or start more ranks"
        )
    if world % shard:
        raise UserError(f"parallel.shard {shard} does not divide the {world} ranks; choose a divisor")


def check_experts(config: Config, world: int) -> None:
    """Raises UserError for a number of parts that the experts, or the ranks of a replica, cannot make."""
    parts, shard = config.parallel.experts, config.parallel.shard
    if parts == 1:
        return
    if config.model.ffn != "moe":
        raise UserError("parallel.experts deals a mixture's experts; set it to 1, or model.ffn to moe")
    ranks = world if shard == "auto" else shard
    if ranks % parts:
        raise UserError(
            f"parallel.experts {parts} does not divide the {ranks} ranks of a replica; the nearest that does: "
            f"{nearest_divisor(ranks, parts)}"
        )
    if config.model.moe.experts % parts:
        both = math.gcd(ranks, config.model.moe.experts)
        raise UserError(
            f"the {config.model.moe.experts} experts cannot be dealt evenly to {parts} ranks (parallel.experts); the "
            f"nearest possible: {nearest_divisor(both, parts)}"
        )
    held, rest = config.model.moe.experts // parts, ranks // parts
    rows = (config.model.ffn_size, config.model.hidden_size)
    if held % rest and (whole_matrices(config) or any(n % rest for n in rows)):
        raise UserError(
            f"the {held} experts that each of {parts} ranks holds (parallel.experts) cannot be sharded evenly over "
            f"{rest} more; set parallel.experts to {nearest_divisor(math.gcd(ranks, config.model.moe.experts), ranks)}"
        )


def check_products(config: Config) -> None:
    """Raises UserError for layers that cannot be 2:4 sparse or multiplied in FP8."""
    model, sparse, fp8 = config.model, config.sparse.mode == "s-ste", config.precision.fp8
    ignored = [
        key
        for key, set_ in (
            ("forward", config.sparse.forward != "auto"),
            ("force", config.sparse.force),
            ("grad_weight", config.sparse.grad_weight == "mvue"),
            ("dense_fraction", config.sparse.dense_fraction > 0),
        )
        if set_
    ]
    if ignored and not sparse:
        raise UserError(f"sparse.{ignored[0]} needs sparse layers; set sparse.mode to s-ste, or leave it out")
    if model.ffn == "moe" and config.sparse.grad_weight == "mvue":
        raise UserError(
            "sparse.grad_weight=mvue is not made for experts, whose products are grouped; set it to dense"
        )
    if fp8 and config.precision.compute == "fp64":
        raise UserError(
            "precision.fp8 rounds to 8 bits, which fp64 is not for; set precision.compute to bf16 or fp32"
        )
    if config.precision.fp8_scales == "row":
        check_row_scales(fp8, sparse)
    forced = check_forward(config)
    multiple, of_keys = product_multiples(config.precision, config.sparse)
    kind = "2:4 sparse FP8 products" if forced else "FP8 products" if fp8 else "2:4 sparse layers"
    # what is refused: key, its value, and the width that it gives
    widths = [
        ("hidden_size", model.hidden_size, "layers", model.inner_size),
        ("ffn_size", model.ffn_size, "layers", model.ffn_size),
    ]
    if model.ffn == "moe" and model.moe.shared_size:
        widths.append(("moe.shared_size", model.moe.shared_size, "layers", model.moe.shared_size))
    if fp8:
        name = "hidden_size" if model.head_dim is None else "head_dim"
        widths.append((name, getattr(model, name), "attention's keys", model.dim_per_head * model.kv_heads))
    units = {"moe.shared_size": multiple} | model.units(multiple, of_keys)
    for name, value, what, width in widths:
        if width % multiple:
            key = "width" if value == width else name
            raise UserError(
                f"model.{name} gives {what} a width of {width}, and {kind} take multiples of {multiple}; the nearest "
                f"{key}: {nearest_multiple(value, units[name])}"
            )


def check_row_scales(fp8: bool, sparse: bool) -> None:
    """Raises UserError where precision.fp8_scales=row has no product that takes them."""
    if not fp8:
        raise UserError("precision.fp8_scales=row scales FP8; set precision.fp8=true, or leave it out")
    if sparse:
        raise UserError(
            "precision.fp8_scales=row is for dense layers, as 2:4 sparse products take one scale for all tokens; set "
            "it to tensor, or sparse.mode to none"
        )


def check_forward(config: Config) -> bool:
    """Whether products are to be sparse whatever is faster; raises UserError where settings contradict that."""
    sparse, asked = config.sparse, "sparse.force=true" if config.sparse.force else "sparse.forward=sparse"
    if sparse.force and sparse.forward == "dense":
        raise UserError("sparse.force=true contradicts sparse.forward=dense; leave one of them out")
    forced = sparse.force or sparse.forward == "sparse"
    if forced and not config.precision.fp8:
        raise UserError(f"{asked} is made for FP8; set precision.fp8=true, or leave it out")
    if forced and config.model.ffn == "moe" and not config.model.moe.shared_size:
        raise UserError(
            f"{asked} has no layer to work on: no grouped 2:4 product exists for experts; leave it out"
        )
    return forced


def whole_matrices(config: Config) -> bool:
    """Whether an update orthogonalises matrices, so that those of stacks may not be cut."""
    parallel = config.parallel
    return config.optimizer.name == "muon" or (parallel.sync == "demo" and parallel.demo.phi == "muon")


def auto_micro_batch(config: Config, batch_tokens: float, machine: Machine) -> int:
    """Windows of a micro-batch: a rank's share of the batch, in equal pieces that are not larger than useful."""
    seq_len = config.data.seq_len
    most = max(1, MICRO_BATCH_TOKENS[machine.device] // seq_len)
    per_rank = max(1, int(batch_tokens) // (machine.world_size * seq_len))
    return math.ceil(per_rank / math.ceil(per_rank / most))
