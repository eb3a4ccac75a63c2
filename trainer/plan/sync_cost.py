"""What one rank sends to other replicas in an optimizer step, by `parallel.sync`, and how long a link takes for it.

Bytes are those that the synchronisers of comm/ declare (StepResult), counted from shapes; the network's headers and its
latency are extra. Imports no torch.
"""

import itertools
import math
from dataclasses import dataclass, replace

from stepline.comm.chunking import index_bits, packet_bytes
from stepline.comm.traffic import ring_bytes
from stepline.models.config import ModelConfig
from stepline.trainer.config import Config
from stepline.trainer.plan.demo_memory import batches, fixed_kept
from stepline.trainer.plan.resolve import whole_matrices
from stepline.trainer.plan.sync_measured import CODEC_CPU_S, DECODE_CPU_S, demo_loss
from stepline.trainer.plan.tensors import Shape, block_group, root_group

INT8_CHUNK = 4096
"""Of comm/diloco.py, which imports torch."""
FIRST_FORWARD = 1 / 3
"""Of a step's computing, before which owners have nothing to send on: a forward, without accumulation or recompute."""
HARMLESS = 0.1
"""Share of a step that an exchange may add before another one is worth its price in loss."""


@dataclass(frozen=True)
class Exchange:
    """Bytes between replicas in an optimizer step: means, where not every step sends the same."""

    label: str
    options: tuple[str, ...]
    """Of the config, that choose it."""
    sent: float
    received: float
    overlapped: float = 0.0
    """Of the slower direction, what travels beside the next forward and backward; where there is a message onward,
    beside the first forward of them alone."""
    onward: float = 0.0
    """And what travels beside the rest of them: what owners send on."""
    codec_s: float = 0.0
    """Seconds to encode and to decode on a CPU, beside which nothing else is done."""
    loss_percent: float | None = None
    """Loss above all-reduce's; None where that was not measured."""
    burst: float = 1.0
    """Times the mean that the step sends which sends most."""

    @property
    def slower(self) -> float:
        """Bytes of the direction that takes longer; links carry both at once."""
        return max(self.sent, self.received)

    def seconds(self, mbit: float) -> float:
        """On a link of `mbit` Mbit/s in each direction."""
        return self.slower * 8 / (mbit * 1e6)

    @property
    def _beside(self) -> tuple[tuple[float, float], ...]:
        """(bytes, share of the computing that they travel beside) of each message that does."""
        if self.onward:
            return (self.overlapped, FIRST_FORWARD), (self.onward, 1 - FIRST_FORWARD)
        return ((self.overlapped, 1.0),)

    @property
    def _after(self) -> float:
        return self.slower - self.overlapped - self.onward

    def step_seconds(self, mbit: float, compute_s: float) -> float:
        """Of a step that computes for `compute_s`."""
        rate = mbit * 1e6 / 8
        beside = sum(max(share * compute_s, size / rate) for size, share in self._beside)
        return self.codec_s + self._after / rate + beside

    def harmless_mbit(self, compute_s: float) -> float:
        """Mbit/s from which on a step is at most HARMLESS longer than `compute_s`: where it is for each choice of
        messages that take longer than the computing beside them. Infinite where encoding alone takes longer."""
        if self.codec_s >= HARMLESS * compute_s:
            return math.inf
        beside = self._beside
        choices = [c for n in range(len(beside) + 1) for c in itertools.combinations(beside, n)]
        needed = (
            (self._after + sum(size for size, _ in late))
            / ((HARMLESS + sum(share for _, share in late)) * compute_s - self.codec_s)
            for late in choices
        )
        return max(needed) * 8 / 1e6


@dataclass(frozen=True)
class Packet:
    """The size of DeMo's packets (comm/packets.py): (chunks, elements, kept) of each batch, and dense values."""

    batches: tuple[tuple[int, int, int], ...]
    dense: int
    codec: str
    item: int
    """Bytes of a parameter's element."""

    def num_bytes(self, share: int, shares: int) -> int:
        """Of the packet for owner number `share` of `shares`."""
        lengths = [chunks * (share + 1) // shares - chunks * share // shares for chunks, _, _ in self.batches]
        dense = self.dense * (share + 1) // shares - self.dense * share // shares
        parts = zip(lengths, self.batches, strict=True)
        return sum(self._chunks(n, elements, kept) for n, (_, elements, kept) in parts) + self._dense(dense)

    def total(self, shares: int) -> int:
        """Of the packets for all owners: of a batch's shares `longer` have one chunk more than the others."""
        size = self._dense(self.dense)
        for chunks, elements, kept in self.batches:
            length, longer = divmod(chunks, shares)
            size += longer * self._chunks(length + 1, elements, kept)
            size += (shares - longer) * self._chunks(length, elements, kept)
        return size

    def _dense(self, values: int) -> int:
        return values * (self.item if self.codec == "fp32" else 2)

    def _chunks(self, chunks: int, elements: int, kept: int) -> int:
        """Indices packed to the bit, values, and scales."""
        return sum(packet_bytes(chunks, kept, index_bits(elements), self.codec, self.item))


class SyncBytes:
    """Bytes of rank `rank` of replica `replica`, of `replicas` that `shard` ranks hold each.

    Rank 0 holds the most rows of its replica, and the last replica owns the largest share.
    """

    def __init__(self, config: Config, shard: int, replicas: int, rank: int = 0, replica: int = -1) -> None:
        self.parallel, self.replicas, self.replica = config.parallel, replicas, replica % replicas
        self.item = 8 if config.precision.compute == "fp64" else 4
        self.whole = trained_parameters(config)
        self.local = [(local_shape(shape, config, shard, rank), end) for shape, end in self.whole]
        self.sizes = [math.prod(shape) for shape, _ in self.local]

    def every(self) -> list[Exchange]:
        """All methods; those with settings, by the settings of the config."""
        return [
            self.all_reduce(self.item),
            self.all_reduce(2),
            self.demo(),
            self.random_k(),
            self.diloco(),
        ]

    def all_reduce(self, item: int) -> Exchange:
        """Of every gradient, in `item` bytes; in bf16 it loses nothing that was seen (benchmarks/RESULTS.md)."""
        name = {2: "bf16", 4: "fp32", 8: "fp64"}[item]
        size = ring_bytes(sum(self.sizes) * item, self.replicas)
        options = ("parallel.sync=all_reduce", *(["precision.reduce=bf16"] if item == 2 else []))
        return Exchange(f"all-reduce {name}", options, size, size, loss_percent=0.0)

    def random_k(self) -> Exchange:
        """One value of each run of 1 / density, of the last run of a parameter on average."""
        setting = self.parallel.random_k
        length = max(1, round(1 / setting.density))
        local = zip(self.local, self.sizes, strict=True)
        values = sum(size / length if len(shape) > 1 else size for (shape, _), size in local)
        size = ring_bytes(values * (2 if setting.codec == "bf16" else self.item), self.replicas)
        label = f"random-k {setting.codec}, {share(setting.density)}"
        return Exchange(label, ("parallel.sync=random_k",), size, size)

    def diloco(self) -> Exchange:
        """A fragment after another, each once in `every` steps; the run's last step sends all of them again."""
        setting, sent = self.parallel.diloco, 0
        fragments = [0] * setting.fragments
        total, seen = sum(math.prod(shape) for shape, _ in self.whole), 0
        for (shape, _), size in zip(self.whole, self.sizes, strict=True):
            fragments[min(seen * len(fragments) // total, len(fragments) - 1)] += size
            seen += math.prod(shape)
        for values in fragments:
            if setting.codec == "int8":
                sent += -(-values // INT8_CHUNK) * (INT8_CHUNK + 2) * (self.replicas - 1)
            else:
                sent += ring_bytes(values * (2 if setting.codec == "bf16" else self.item), self.replicas)
        label = f"diloco {setting.codec}, H = {setting.every}"
        mean = sent / setting.every
        return Exchange(label, ("parallel.sync=diloco",), mean, mean, burst=setting.every)

    def demo(self) -> Exchange:
        """Packets gathered by all, or reduced by owners beyond `owner_reduce_above` replicas (comm/exchange.py)."""
        setting, packet, others = self.parallel.demo, self.packet(), self.replicas - 1
        kept = fixed_kept(setting)
        label = f"demo {packet.codec}, {share(kept / setting.side**2 if kept else setting.density)}"
        options = ("parallel.sync=demo",)
        codec_s = (CODEC_CPU_S + (DECODE_CPU_S if setting.looks_ahead else 0)) * sum(self.sizes)
        if setting.faithful or self.replicas <= setting.owner_reduce_above:
            size = others * packet.num_bytes(0, 1)
            beside = size if setting.delay else 0
            return Exchange(label, options, size, size, beside, 0, codec_s, demo_loss(setting))
        own = packet.num_bytes(self.replica, self.replicas)
        gathered = others * packet.num_bytes(self.replicas - 1, self.replicas)  # padded to the largest
        sent, received = packet.total(self.replicas) - own, others * own
        beside = (max(sent, received), gathered) if setting.delay else (0, 0)
        return Exchange(f"{label}, owners", options, sent + gathered, received + gathered, *beside, codec_s)

    def packet(self) -> Packet:
        """DeMo's, of this rank."""
        setting = self.parallel.demo
        found = tuple((b.chunks, b.height * b.width, b.kept) for b in batches(self.local, setting, self.item))
        vectors = 0 if setting.faithful else sum(math.prod(s) for s, _ in self.local if len(s) < 2)
        return Packet(found, vectors, "fp32" if setting.faithful else setting.codec, self.item)


def link_bytes(config: Config, shard: int, replicas: int) -> list[Exchange]:
    """What the ranks of one replica exchange together, over the link that they share; seconds are the first rank's,
    which holds the most."""
    # A parameter's rows end in one rank: those before hold equal parts, those after nothing.
    edges = {0, shard}
    for shape, _ in trained_parameters(config):
        parts = config.parallel.experts if len(shape) > 2 else 1
        last = shape[0] // parts // -(-shape[0] // shard)
        edges |= {min(last * parts, shard), min((last + 1) * parts, shard)}
    alike = [(end - start, start) for start, end in itertools.pairwise(sorted(edges))]
    found = [(number, SyncBytes(config, shard, replicas, rank).every()) for number, rank in alike]

    def whole(i: int, way: str) -> float:
        return sum(number * getattr(every[i], way) for number, every in found)

    ways = ("sent", "received", "overlapped", "onward")
    first = found[0][1]
    return [replace(exchange, **{way: whole(i, way) for way in ways}) for i, exchange in enumerate(first)]


def trained_parameters(config: Config) -> list[tuple[Shape, bool]]:
    """The `model_parameters` of a config: those that have a gradient to exchange."""
    return model_parameters(config.model, adapters_alone=config.optimizer.only == "adapters")


def model_parameters(model: ModelConfig, adapters_alone: bool = False) -> list[tuple[Shape, bool]]:
    """(shape, whether it is embedding or head) of each parameter that is trained, in the model's order."""
    root = [(shape, len(shape) > 1) for shape in root_group(model, adapters_alone).trained.shapes]
    block = [(shape, False) for shape in block_group(model, adapters_alone).trained.shapes]
    return [*root[:1], *(block * model.num_layers), *root[1:]]


def local_shape(shape: Shape, config: Config, shard: int, rank: int) -> Shape:
    """What a rank of `shard` holds: chunks of ceil(rows / shard), the last ones shorter or empty (FSDP2).

    Stacks of experts are dealt to `parallel.experts` ranks first, and then cut into matrices, or by row where that
    alone comes out even (comm/fsdp.py).
    """
    if len(shape) > 2:
        parts = config.parallel.experts
        shard, rank, shape = shard // parts, rank // parts, (shape[0] // parts, *shape[1:])
        if shape[0] % shard and shape[1] % shard == 0 and not whole_matrices(config):
            return (shape[0], shape[1] // shard, *shape[2:])
    rows = -(-shape[0] // shard)
    return (max(0, min(rows, shape[0] - rank * rows)), *shape[1:])


def share(density: float) -> str:
    """`1/128`."""
    return f"1/{1 / density:.4g}"
