"""Bytes that a training step needs on one device, and the layout that fits. Imports no torch.

`estimate` replays a step from shapes (replay.py) and takes the moment that needs most. Not in it, as they lie
outside of torch's allocator or of the step: the CUDA context, NCCL's buffers, what the allocator cannot use for
fragmentation, batches read ahead and the copy that a checkpoint is written from (both in host memory), and
validation, which needs less than a step. `MARGIN` is for them. float64 on CUDA is not covered: its attention
keeps whole matrices of scores.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from stepline.trainer.config import Config
from stepline.trainer.errors import DoesNotFit
from stepline.trainer.plan.replay import Replay
from stepline.trainer.plan.zero_memory import ZeroReplay

PARTS = ("parameters", "gradients", "optimizer", "activations", "logits", "all-gather", "fixed")
MARGIN = {"cuda": 0.1, "cpu": 0.25}
"""Share of a device's memory that is left free; on CPUs the process and the page cache of the data need more."""


@dataclass(frozen=True)
class Layout:
    """How a global batch is spread."""

    world: int
    shard: int
    """Ranks that share one replica."""
    micro_batch: int
    """Windows of one forward-backward on one rank."""
    accumulation: int

    @classmethod
    def of(cls, config: Config, world: int) -> "Layout":
        """The layout of a resolved config."""
        windows = config.budget.batch_tokens // config.data.seq_len
        micro_batch = config.parallel.micro_batch
        return cls(world, config.parallel.shard, micro_batch, math.ceil(windows / (world * micro_batch)))


@dataclass(frozen=True)
class Memory:
    """Of one device, in bytes."""

    parts: dict[str, int]
    """PARTS at the peak: their sum is the peak. `optimizer` includes an update's temporaries, `gradients` those
    of a whole block before they are reduced, `all-gather` the buffers of the reductions too."""
    largest: dict[str, int]
    """Each part at its own largest, which is seldom at the peak."""
    moment: str
    """When the peak is."""

    @property
    def total(self) -> int:
        """The peak."""
        return sum(self.parts.values())

    def json(self, layout: Layout, device_bytes: int | None = None) -> dict[str, Any]:
        """For `--json`; layout: what it is the memory of."""
        told = {"total": self.total, "device_bytes": device_bytes, "layout": asdict(layout)}
        return asdict(self) | told


def estimate(config: Config, layout: Layout) -> Memory:
    """The step of a config with device, compute dtype and compile settled; ValueError where they are `auto`."""
    kind = ZeroReplay if config.parallel.backend == "zero" else Replay
    replay = kind(config, layout.world, layout.shard, layout.micro_batch, layout.accumulation)
    replay.run()
    tally = replay.tally
    return Memory({p: tally.peak[p] for p in PARTS}, {p: tally.largest[p] for p in PARTS}, tally.peak_moment)


def usable(memory_bytes: int, device: str) -> int:
    """What of a device's memory a step may take."""
    return int(memory_bytes * (1 - MARGIN[device]))


def fit_layout(
    config: Config, world: int, micro_batch: int, batch_windows: int, memory_bytes: int | None, node: int = 1
) -> tuple[int, int, list[str]]:
    """(shard, micro-batch, warnings) that fit a device of `memory_bytes`, for what the config leaves `auto`.

    shard: on CUDA the fewest ranks with which `micro_batch`, the largest that is useful, fits, since the replicas
    then exchange gradients only; all ranks on CPUs and where the memory is not known; where replicas do not exchange
    gradients (parallel.sync), the `node` ranks of a node, and on one node 1. When that is not enough, the micro-batch
    is cut into more equal pieces; the global batch of `batch_windows` windows stays.
    Raises DoesNotFit when not even one window fits.
    """
    parallel, device = config.parallel, config.run.device
    auto_shard, auto_micro_batch = parallel.shard == "auto", parallel.micro_batch == "auto"
    shards = [world] if auto_shard else [parallel.shard]
    slow_links = auto_shard and parallel.sync != "all_reduce"
    if slow_links:
        shards = [slow_link_shard(config, world, node)]
    if memory_bytes is None:
        return shards[-1], micro_batch, []
    if auto_shard and device == "cuda" and not slow_links:
        shards = [
            n for n in range(parallel.experts, world + 1) if world % n == 0 and n % parallel.experts == 0
        ]
    share = math.ceil(batch_windows / world)

    def need(shard: int, windows: int, config: Config = config) -> int:
        return estimate(config, Layout(world, shard, windows, math.ceil(share / windows))).total

    limit = usable(memory_bytes, device)
    for shard in shards:
        if need(shard, micro_batch) <= limit:
            return shard, micro_batch, []
    shard = shards[-1]
    if auto_micro_batch:
        sizes = sorted({math.ceil(share / pieces) for pieces in range(1, share + 1)}, reverse=True)
        for windows in sizes:
            if windows < micro_batch and need(shard, windows) <= limit:
                return shard, windows, []
        micro_batch = 1
    advice = ["start more ranks"] if shard == world else ["shard over more ranks (parallel.shard)"]
    if not auto_micro_batch and micro_batch > 1:
        advice.insert(0, "lower parallel.micro_batch")
    if (
        config.run.recompute != "full" and config.model.blocks == "standard"
    ):  # reversible blocks recompute as it is
        full = config.model_copy(update={"run": config.run.model_copy(update={"recompute": "full"})})
        if need(shard, micro_batch, full) <= limit:
            advice.insert(0, "set run.recompute=full")
    sentence = (
        f"a step of {micro_batch} x {config.data.seq_len} tokens needs an estimated "
        f"{gigabytes(need(shard, micro_batch))} on each device, which has {gigabytes(memory_bytes)} "
        f"({MARGIN[device]:.0%} of it stay free); {' or '.join(advice)}"
    )
    if auto_micro_batch:
        raise DoesNotFit(f"{sentence}, or set parallel.micro_batch=1 to try it all the same")
    return shard, micro_batch, [sentence]


def slow_link_shard(config: Config, world: int, node: int = 1) -> int:
    """Ranks of a replica where replicas do not exchange gradients: those of a node, on one node 1, and enough for the
    parts that experts are dealt to."""
    return math.lcm(config.parallel.experts, math.gcd(world, node) if node < world else 1)


def gigabytes(size: float) -> str:
    """`12.34 GB`, with more digits where there is little."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e9:.4f} GB"


def memory_table(memory: Memory, layout: Layout, device_bytes: int | None) -> list[str]:
    """Lines of `stepline train --dry-run`."""
    lines = [
        f"memory of one device: {layout.world} ranks, shard {layout.shard}, micro-batch {layout.micro_batch}",
        f"{'':14}{'at the peak':>16}{'own largest':>16}",
    ]
    for part in PARTS:
        lines.append(f"{part:14}{gigabytes(memory.parts[part]):>16}{gigabytes(memory.largest[part]):>16}")
    has = "" if device_bytes is None else f", of {gigabytes(device_bytes)} that the device has"
    return [*lines, f"{'total':14}{gigabytes(memory.total):>16}  in the {memory.moment}{has}"]
