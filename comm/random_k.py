"""Random-k: all replicas send the same random values of their waiting updates, so that no index travels."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stepline.comm.fsdp import local
from stepline.comm.host_copy import to_device
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


def random_places(numel: int, density: float, generator: torch.Generator) -> Tensor:
    """One place (int64) at random in each run of 1 / density of `numel` values: distinct, each value equally likely."""
    length = max(1, round(1 / density))
    starts = torch.arange(0, numel, length)
    places = starts + torch.randint(length, (len(starts),), generator=generator)
    return places[places < numel]


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
        """Those of this update by name, on the deltas' device; drawn on the host, so that every device has the same."""
        generator = torch.Generator().manual_seed(hash((self.settings.seed, int(self.updates))))
        drawn = [random_places(d.numel(), self.settings.density, generator) for d in deltas.values()]
        together = to_device(torch.cat(drawn), next(iter(deltas.values())).device)
        return dict(zip(deltas, together.split([len(places) for places in drawn]), strict=True))

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
