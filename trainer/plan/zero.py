"""What `parallel.backend: zero` needs and what it cannot do, before the first step. Imports no torch."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from stepline.trainer.config import Config
from stepline.trainer.errors import UserError

if TYPE_CHECKING:
    from stepline.trainer.plan.resolve import Machine

Settle = Callable[[str, str, object, str], bool]
"""Sets a section's key to a value of some origin where it is open; whether it did (`resolve.settler`)."""
BUCKET = 5 * 10**8
"""Elements of DeepSpeed's own reduce_bucket_size, which it allocates in full."""


def reduce_bucket(config: Config, elements: int) -> int:
    """Elements of the buffer that gradients are reduced through: of a small model of `elements`, no more than those."""
    return config.parallel.deepspeed.reduce_bucket_size or min(BUCKET, elements)


def settle_zero(config: Config, machine: "Machine", settle: Settle) -> None:
    """Fills what DeepSpeed leaves no choice for; raises UserError for what it cannot do on this machine."""
    parallel, world = config.parallel, machine.world_size
    settle("run", "compile", False, "DeepSpeed's hooks")
    settle("parallel", "shard", world, "ZeRO shards over all ranks")
    if parallel.shard != world:
        raise UserError(
            f"parallel.shard is {parallel.shard} and ZeRO shards over all {world} ranks; set parallel.shard to auto, "
            "or parallel.backend to fsdp for several replicas"
        )
    check_machine(config, machine)


def check_zero(config: Config) -> None:
    """Raises UserError for what DeepSpeed cannot do on any machine."""
    parallel, compute = config.parallel, config.precision.compute
    for key, given, only in (
        ("parallel.sync", parallel.sync, "all_reduce"),
        ("parallel.experts", parallel.experts, 1),
        ("optimizer.name", config.optimizer.name, "adamw"),
        ("optimizer.only", config.optimizer.only, "all"),
        ("sparse.mode", config.sparse.mode, "none"),
        ("precision.fp8", config.precision.fp8, False),
        ("run.compile", config.run.compile, False),
    ):
        if given not in (only, "auto"):
            given, only = (str(value).lower() for value in (given, only))
            raise UserError(
                f"parallel.backend=zero has no {key}={given}: set it to {only}, or parallel.backend to fsdp"
            )
    if compute == "fp64":
        raise UserError(
            "DeepSpeed has no float64; set precision.compute to fp32, or parallel.backend to fsdp"
        )
    if compute == "bf16" and parallel.zero.stage == 1:
        raise UserError("ZeRO stage 1 sums gradients in bf16 here; set parallel.zero.stage to 2")
    _check_stage(config)


def _beyond_zero(given: dict[str, object]) -> list[str]:
    """Of the keys given of parallel.deepspeed, those that switch a part of ZeRO++ on."""
    return [key for key in given if key.startswith("zero_") and (given[key] is True or given[key] > 1)]


def _check_stage(config: Config) -> None:
    """Raises UserError for keys of parallel.zero and parallel.deepspeed that do not fit each other."""
    zero, given = config.parallel.zero, config.parallel.deepspeed.given()
    if zero.offload == "all" and zero.stage < 3:
        raise UserError(
            f"parallel.zero.offload=all moves weights, which stage {zero.stage} does not cut; set it to optimizer, or "
            "parallel.zero.stage to 3"
        )
    cut = [key for key in given if key.startswith("stage3_")] + _beyond_zero(given)
    if cut and zero.stage < 3:
        raise UserError(
            f"parallel.deepspeed.{cut[0]} is of stage 3; leave it out, or set parallel.zero.stage to 3"
        )


def check_machine(config: Config, machine: "Machine") -> None:
    """Raises UserError for keys of parallel.deepspeed that do not fit the machine."""
    given = config.parallel.deepspeed.given()
    quantized = [key for key in _beyond_zero(given) if "quantized" in key]
    if quantized and machine.device != "cuda":
        raise UserError(f"parallel.deepspeed.{quantized[0]} needs GPUs; leave it out on the {machine.device}")
    if "zero_quantized_gradients" in quantized and machine.node_ranks >= machine.world_size:
        raise UserError(
            "parallel.deepspeed.zero_quantized_gradients is for gradients between nodes, and there is one; leave it out"
        )
    copies = given.get("zero_hpz_partition_size", 1)
    if machine.world_size % copies:
        raise UserError(
            f"parallel.deepspeed.zero_hpz_partition_size {copies} does not divide the {machine.world_size} ranks; "
            "choose a divisor"
        )
