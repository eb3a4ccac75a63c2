"""`stepline plan`: from two numbers, or from a config, to a plan on the screen or as JSON. Imports no torch."""

import json
from dataclasses import dataclass, replace

from stepline.models.flops import flops_per_token
from stepline.trainer.config import Config
from stepline.trainer.config_io import load_config
from stepline.trainer.errors import UserError
from stepline.trainer.plan.cost import (
    WEIGHTS_ALONE,
    WHOLE_MODEL,
    Hardware,
    asked_hardware,
    iso_loss,
    run_cost,
)
from stepline.trainer.plan.effects import repeated_corpus, unwanted_effects
from stepline.trainer.plan.explain import plan_json, show
from stepline.trainer.plan.law_file import named_law
from stepline.trainer.plan.laws import POWER_LINES, STEP_LAW, StepLaw
from stepline.trainer.plan.memory import Layout, Memory, estimate, gigabytes, slow_link_shard
from stepline.trainer.plan.planner import Inputs, Plan, check_range, law_values, make_plan
from stepline.trainer.plan.resolve import (
    Machine,
    auto_micro_batch,
    check_dense_end,
    check_experts,
    check_run,
    config_inputs,
    config_law,
    settle_machine,
)
from stepline.trainer.plan.schedule_text import check_warmup
from stepline.trainer.plan.screen import screen
from stepline.trainer.plan.sync_choice import Choice, Link, asked_layout

CPU_PEAK = 1e13
"""FLOP/s that no CPU reaches, and every GPU with a known peak exceeds."""
BACKWARD_SHARE = 2 / 3
"""Of the FLOPs of a step (models/flops.py)."""


@dataclass(frozen=True)
class Request:
    """The command line."""

    config: str | None
    overrides: list[str]
    params: float | None = None
    tokens: float | None = None
    active_params: float | None = None
    seq_len: int | None = None
    world_size: int | None = None
    micro_batch: int | None = None
    law: str | None = None
    device: str | None = None
    peak_flops: float | None = None
    mfu: float | None = None
    link_mbit: float | None = None
    replicas: int | None = None


def run_plan(ask: Request, as_json: bool) -> None:
    """Plans and prints; raises UserError."""
    for name in ("params", "tokens", "active_params", "seq_len", "world_size", "micro_batch"):
        check_range(name, getattr(ask, name), f"--{name.replace('_', '-')}")
    law = STEP_LAW if ask.law is None else named_law(ask.law)
    config = None
    if ask.config is None:
        if ask.params is None or ask.tokens is None:
            raise UserError("give --params and --tokens, or a config")
        inputs = Inputs(
            ask.params, ask.tokens, ask.active_params, ask.seq_len, ask.world_size, ask.micro_batch,
            optimizer=law.optimizer, sync=law.sync,  # numbers alone tell none: a run as those of the law
        )  # fmt: skip
        flops = 6 * (ask.active_params or ask.params)
        counted = f"6 x {'active N' if inputs.mixture else 'N'} x D, {WEIGHTS_ALONE}"
    else:
        inputs, law, flops, config, notes = from_config(ask, law)
        counted = WHOLE_MODEL
    layout = asked_layout(ask.link_mbit, ask.replicas, config, ask.world_size)
    machine = asked_hardware(ask.device, ask.peak_flops, ask.mfu, inputs.world_size)
    plan = make_plan(inputs, law)
    if config is not None:
        notes += check_warmup(inputs.warmup_steps or 0, plan.steps)
        notes += check_dense_end(config.sparse.dense_fraction, plan.steps)
        plan = replace(plan, warnings=(*plan.warnings, *notes))
    cost = None
    if machine is not None:
        least = POWER_LINES.min_tokens(inputs.tokens, plan.batch_tokens)
        critical = POWER_LINES.critical_batch_tokens(least)
        cost = run_cost(inputs.tokens, flops, machine, critical, inputs.seq_len, counted)
    trade = iso_loss(inputs.tokens, plan.batch_tokens, cost)
    sync = None
    if layout is not None:
        sync = Choice(config, step_link(ask.link_mbit, *layout, plan, flops, machine))
        config.parallel.shard = layout[1]
    memory = None if config is None else step_memory(config, plan)
    if as_json:
        told = None if memory is None else memory[0].json(memory[1])
        more = {"memory": told, "sync": sync and sync.json()}
        print(json.dumps(plan_json(plan, machine, cost, trade) | more))
        return
    console = screen()
    show(plan, machine, cost, trade, console)
    if memory is not None:
        console.print(memory_text(*memory, config), soft_wrap=True, highlight=False)
    if sync is not None:
        sync.show(console)


def step_link(
    mbit: float, replicas: int, shard: int, plan: Plan, flops_per_token: float, machine: Hardware | None
) -> Link:
    """The link, with the compute of a step on all ranks where the device's peak is known."""
    if machine is None:
        return Link(mbit, replicas, shard)
    gpus = replicas * shard
    compute_s = plan.batch_tokens * flops_per_token / (machine.peak * machine.mfu * gpus)
    how = "given" if machine.measured else "assumed"
    said = f"on {gpus:,} x {machine.device} at MFU {machine.mfu:.0%} ({how})"
    backward_s = compute_s * BACKWARD_SHARE / plan.grad_accumulation
    return Link(mbit, replicas, shard, compute_s, backward_s, said, cpu=machine.peak < CPU_PEAK)


def assumed_machine(config: Config, world: int) -> Machine:
    """Ranks on GPUs that compute in bf16, or on CPUs where the config says so."""
    device = "cpu" if config.run.device == "cpu" else "cuda"
    return Machine(world, device, bf16=device == "cuda")


def settle_assumed(config: Config, world: int) -> None:
    """`settle_machine` for ranks that are not there; raises UserError, which says so where it is of them alone."""
    asked = config.model_copy(deep=True)
    try:
        settle_machine(config, {}, assumed_machine(config, world))
    except UserError as error:
        try:
            settle_machine(asked, {}, Machine(world, "cpu", bf16=False))
        except UserError:
            raise error from None
        raise UserError(f"{error} (for GPUs in bf16, which are assumed unless run.device is cpu)") from None


def step_memory(config: Config, plan: Plan) -> tuple[Memory, Layout] | None:
    """What a step takes on each device, sharded over all ranks where the config says `auto`; None when the number
    of ranks is not known."""
    world, micro_batch = plan.inputs.world_size, plan.inputs.micro_batch
    if world is None or micro_batch is None:
        return None
    shard = config.parallel.shard
    if shard == "auto":
        shard = world if config.parallel.sync == "all_reduce" else slow_link_shard(config, world)
        if config.run.device == "cpu":  # on GPUs `train` may take fewer
            check_experts(config, world, shard)
    layout = Layout(world, shard, micro_batch, plan.grad_accumulation)
    return estimate(config, layout), layout


def memory_text(memory: Memory, layout: Layout, config: Config) -> str:
    """The sentence of the memory: of which layout it is, and whether `train` may take another."""
    over = f"all {layout.shard}" if layout.shard == layout.world else f"{layout.shard} of {layout.world}"
    ranks = "not sharded" if layout.shard == 1 else f"sharded over {over} ranks"
    text = f"memory: {gigabytes(memory.total)} on each device at the peak, in the {memory.moment} "
    text += f"({ranks}, micro-batch {layout.micro_batch}, {config.precision.compute})"
    if config.parallel.shard == "auto" and config.run.device == "cuda":
        if config.parallel.sync != "all_reduce":
            text += "; on several nodes train shards over the ranks of each"
        elif 1 < layout.shard == layout.world:
            text += "; train shards over as few ranks as the devices' memory allows"
    return text


def from_config(ask: Request, law: StepLaw) -> tuple[Inputs, StepLaw, float, Config, list[str]]:
    """Inputs, law, FLOPs per token, the config itself and what to say of it; --world-size, --micro-batch and --tokens
    go before it."""
    for name, key in (
        ("params", "the model's shape"),
        ("active_params", "the model's shape"),
        ("seq_len", "data.seq_len"),
    ):
        if getattr(ask, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} does not go with a config: it comes from {key}")
    config, _ = load_config(ask.config, ask.overrides)
    assumed_gpus = config.run.device == "auto"
    if ask.world_size is None:
        check_run(config, None)
    else:
        settle_assumed(config, ask.world_size)
    if ask.tokens is not None:
        config.budget.tokens, config.budget.steps = ask.tokens, None
    if ask.micro_batch is not None:
        config.parallel.micro_batch = ask.micro_batch
    law = law if ask.law is not None else config_law(config)
    corpus, notes = corpus_tokens(config), []
    if ask.world_size is not None and config.parallel.micro_batch == "auto":
        inputs = config_inputs(config, ask.world_size, corpus)
        batch = inputs.batch_tokens or law_values(law, inputs.params, inputs.tokens)[1]
        machine = assumed_machine(config, ask.world_size)
        size = auto_micro_batch(config, batch, machine)
        if assumed_gpus and size != auto_micro_batch(config, batch, replace(machine, device="cpu")):
            notes.append(
                f"the micro-batch of {size}, which the batch is rounded to, is that of GPUs, which are assumed; for "
                "CPUs add run.device=cpu"
            )
        config.parallel.micro_batch = size
    inputs = config_inputs(config, ask.world_size, corpus)
    notes += repeated_corpus(inputs.tokens, corpus) + unwanted_effects(config)
    return inputs, law, flops_per_token(config.model, config.data.seq_len).total, config, notes


def corpus_tokens(config: Config) -> int | None:
    """Training tokens of the prepared data, None where there is none; raises UserError for data that leaves D open."""
    folders = [source.path for source in config.data.folders()]
    given = config.budget.tokens is not None or config.budget.steps is not None
    if given:  # for a note alone: nothing is checked
        try:
            metas = [json.loads((path / "meta.json").read_text(encoding="utf-8")) for path in folders]
            return sum(meta["splits"]["train"]["tokens"] for meta in metas) or None
        except (OSError, ValueError, KeyError, TypeError):
            return None
    from stepline.trainer.data.dataset import load_meta

    metas = [load_meta(path) for path in folders]
    return sum(meta.splits["train"].tokens for meta in metas if "train" in meta.splits) or None
