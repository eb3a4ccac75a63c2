"""Random-k: all replicas send the same random values of their waiting updates, so that no index travels."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stepline.comm.fsdp import local
from stepline.comm.synchronizer import Optimizer, StepResult, Synchronizer
from stepline.comm.traffic import ring_bytes
from stepline.comm.waiting import MakeOptimizer, Waiting


@dataclass(frozen=True)
class RandomKSettings:
    """The defaults are those of the config."""

    density: float = 1 / 32
    beta: float = 0.999
    bf16: bool = True
    """Values travel as bf16; otherwise as they are."""
    weight_decay: float = 0.0
    seed: int = 0


GOLDEN, FIRST, SECOND = (c - 2**64 for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def splitmix(key: int, counters: Tensor) -> Tensor:
    """Output number `counters` (int64, from 0) of SplitMix64 with the state `key`: int64, 64 random bits each, the same
    on every device (Steele, Lea and Flood, OOPSLA 2014)."""
    z = (counters + 1).mul_(GOLDEN).add_(key)  # overflow keeps the low 64 bits
    for shift, factor in ((30, FIRST), (27, SECOND), (31, 1)):
        z = z.bitwise_xor_((z >> shift).bitwise_and_(2 ** (64 - shift) - 1)).mul_(factor)
    return z


def random_places(numel: int, density: float, key: int, device: torch.device | None = None) -> Tensor:
    """One place (int64) at random in each run of 1 / density of `numel` values: distinct, each value equally likely.

    key: 64 bits, signed. The host knows without asking the device whether the last run, which may be shorter, has one.
    """
    length = max(1, round(1 / density))

    def place(runs: Tensor) -> Tensor:
        high = (splitmix(key, runs) >> 32).bitwise_and_(2**32 - 1)
        return high.mul_(length).bitwise_right_shift_(32).add_(runs * length)

    count = -(-numel // length)
    if count and int(place(torch.tensor(count - 1))) >= numel:
        count -= 1
    return place(torch.arange(count, device=device))


class RandomK(Synchronizer):
    """Matrices and embeddings by random places of their waiting updates, whose mean over the replicas is applied;
    vectors by their mean gradient and `dense`. What a rank receives does not grow with the replicas."""

    left_behind = (".delta",)

    def __init__(
        self, named_parameters: Mapping[str, nn.Parameter], group: dist.ProcessGroup | None,
        settings: RandomKSettings, *, decayed: set[str] = frozenset(), dense: Optimizer | None = None,
        make_optimizer: MakeOptimizer,
    ) -> None:  # fmt: skip
        super().__init__(named_parameters, group)
        self.settings, self.decayed, self.dense = settings, decayed, dense
        self.vectors = [n for n, p in self.parameters.items() if p.ndim < 2]
        matrices = {n: p for n, p in self.parameters.items() if n not in self.vectors}
        self.waiting = Waiting(matrices, make_optimizer, settings.beta)
        self.updates = torch.zeros((), dtype=torch.int64)
        """Steps that were not skipped: the number of the places' draw."""

    @torch.no_grad()
    def step(self, lr: float, skip: Tensor | None = None) -> StepResult:
        """One update; `skip` is read by the host."""
        if skip is not None and bool(skip):
            return StepResult(0, 0, skip)
        self.waiting.accumulate(lr)
        self.updates += 1
        deltas = {n: t.view(-1) for n, t in self.waiting.local().items()}
        places = self._places(deltas)
        values = [deltas[n][places[n]] for n in deltas] + [self.gradient(n).reshape(-1) for n in self.vectors]
        sent = torch.cat(values)
        wide, sizes = sent.dtype, [len(v) for v in values]
        sent = sent.bfloat16() if self.settings.bf16 else sent
        # What was rounded off stays in delta and goes another time.
        for name, own in zip(deltas, sent.to(wide).split(sizes)[: len(deltas)], strict=True):
            deltas[name][places[name]] -= own
        if self.replicas > 1:
            dist.all_reduce(sent, group=self.group)
        means = (sent.to(wide) / self.replicas).split(sizes)
        for name, mean in zip(deltas, means[: len(deltas)], strict=True):
            p = local(self.parameters[name].data)
            if name in self.decayed:
                p.mul_(1 - lr * self.settings.weight_decay)
            p.view(-1)[places[name]] += mean
        for name, mean in zip(self.vectors, means[len(deltas) :], strict=True):
            self.set_gradient(name, mean)
        if self.vectors:
            self.dense.step(lr, self.settings.weight_decay)
        num_bytes = ring_bytes(sent.numel() * sent.element_size(), self.replicas)
        return StepResult(num_bytes, num_bytes, skip)

    def _places(self, deltas: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those of this update by name, on the deltas' device; every device draws the same."""
        keys = (hash((self.settings.seed, int(self.updates), i)) for i in itertools.count())
        return {
            n: random_places(d.numel(), self.settings.density, next(keys), d.device)
            for n, d in deltas.items()
        }

    def describe(self) -> dict[str, str]:
        """The waiting updates' optimizer, or the dense one's words."""
        kinds = self.waiting.describe("random-k", self.decayed)
        return kinds | (self.dense.describe() if self.vectors else {})

    def state_dict(self, replica: int) -> dict[str, Tensor]:
        """Waiting updates of this replica, and the vectors' optimizer."""
        state = {f"replica{replica}.optimizer.{n}": t for n, t in self.waiting.state_dict().items()}
        if self.dense is not None:
            state |= {f"optimizer.{n}": t for n, t in self.dense.state().items()}
        return state | {"optimizer.updates": self.updates}

    def resized(self, replicas_before: int, load: Callable[[dict[str, Tensor]], None]) -> str:
        """The sentence for the log."""
        return (
            f"{replicas_before} replicas became {self.replicas}: updates that waited to be sent, which each replica "
            "has of its own, are dropped"
        )
