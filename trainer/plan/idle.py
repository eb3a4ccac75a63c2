"""Keys of a config that say nothing, because what they belong to is off. Imports no torch."""

from typing import Any

from stepline.trainer.config import Config
from stepline.trainer.config_io import Origins, dump
from stepline.trainer.config_yaml import flatten

NEEDS: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
    ("model.moe.", "model.ffn", ("moe",)),
    ("model.moe.bias_rate", "model.moe.balance", ("bias",)),
    ("model.moe.bias_rate", "optimizer.only", ("all",)),
    ("model.moe.balance_loss", "model.moe.balance", ("global", "switch")),
    ("model.coupling", "model.blocks", ("revffn",)),
    ("model.revffn.", "model.blocks", ("revffn",)),
    ("model.revffn.iterations", "model.coupling", ("revffn",)),
    ("model.revffn.grid_bits", "model.revffn.streams", ("grid",)),
    ("model.rope_scaling.low_freq_factor", "model.rope_scaling.type", ("llama3",)),
    ("model.rope_scaling.high_freq_factor", "model.rope_scaling.type", ("llama3",)),
    ("model.rope_scaling.original_context", "model.rope_scaling.type", ("llama3",)),
    ("optimizer.momentum", "optimizer.name", ("muon",)),
    ("schedule.decay_fraction", "schedule.name", ("wsd",)),
    ("parallel.zero.", "parallel.backend", ("zero",)),
    ("parallel.deepspeed.", "parallel.backend", ("zero",)),
    ("parallel.deepspeed.allgather_bucket_size", "parallel.zero.stage", (1, 2)),
    ("parallel.deepspeed.sub_group_size", "parallel.zero.stage", (3,)),
    ("parallel.deepspeed.log_trace_cache_warnings", "parallel.zero.stage", (3,)),
    ("parallel.check_replicas_every", "parallel.backend", ("fsdp",)),
    ("parallel.demo.", "parallel.sync", ("demo",)),
    ("parallel.demo.alpha", "parallel.demo.version", (2,)),
    ("parallel.demo.ahead", "parallel.demo.delay", (1,)),
    ("parallel.diloco.", "parallel.sync", ("diloco",)),
    ("parallel.random_k.", "parallel.sync", ("random_k",)),
    ("precision.fp8_scales", "precision.fp8", (True,)),
    ("sparse.forward", "sparse.mode", ("s-ste",)),
    ("sparse.forward", "precision.fp8", (True,)),
    ("sparse.force", "sparse.mode", ("s-ste",)),
    ("sparse.force", "precision.fp8", (True,)),
    ("sparse.grad_weight", "sparse.mode", ("s-ste",)),
    ("sparse.dense_fraction", "sparse.mode", ("s-ste",)),
)
"""A key, or the beginning of some; another one, and the values of that without which it has no effect."""

IDLE_WITH: tuple[tuple[str, str, Any], ...] = (
    *(
        (f"parallel.demo.{key}", "parallel.demo.faithful", True)
        for key in ("accumulate", "ahead", "density", "codec", "owner_reduce_above")
    ),
    *((f"parallel.demo.{key}", "parallel.demo.accumulate", "updates") for key in ("version", "phi", "alpha")),
    ("parallel.demo.ahead", "parallel.demo.accumulate", "gradients"),
    # What is published has no optimizer; beside accumulated gradients AdamW has the vectors, embedding and head.
    *((f"optimizer.{key}", "parallel.demo.faithful", True) for key in ("beta1", "beta2", "eps", "momentum")),
    ("optimizer.momentum", "parallel.demo.accumulate", "gradients"),
    ("parallel.reshard_after_forward", "parallel.zero.stage", 1),
    ("parallel.reshard_after_forward", "parallel.zero.stage", 2),
    ("logging.eval_windows", "logging.eval_every", 0),
    ("logging.project", "logging.wandb", "off"),
)
"""A key, another one, and the value of that with which it has no effect, where that value has one itself.

What idles with a certain number of ranks, or on a certain device, is none of these: one command is for many machines.
"""


def idle_keys(config: Config, origins: Origins) -> list[str]:
    """A sentence for each key of the command line that has no effect."""
    values = flatten(dump(config))
    given = [key for key, origin in origins.items() if origin == "override"]
    return [f"{key} has no effect {why}" for key in given if (why := _why_idle(key, values)) is not None]


def _why_idle(key: str, values: dict[str, Any]) -> str | None:
    """What is missing or in the way, in words; None where the key has an effect."""
    for start, switch, wanted in NEEDS:
        own = key.startswith(start) if start.endswith(".") else key == start
        if own and values.get(switch) not in wanted:
            return f"without {switch}={' or '.join(_yaml(value) for value in wanted)}"
    for idle, switch, value in IDLE_WITH:
        if key == idle and values.get(switch) == value and _why_idle(switch, values) is None:
            return f"with {switch}={_yaml(value)}"
    if key == "parallel.demo.density" and values["parallel.demo.kept"] is not None:
        return "beside parallel.demo.kept"
    return None


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
