"""DiLoCo: replicas train alone for H steps and average how far they came (arXiv 2311.08105); as fragments of the
model that take turns, Streaming DiLoCo (arXiv 2501.18512).

    p      <- H steps of the inner optimizer, on this replica's gradients
    d      <- anchor - mean of p over the replicas
    m      <- mu m + d
    anchor <- anchor - outer_lr (d + mu m);  p <- anchor

After the last step of a run, what has come only part of its way takes the plain mean: anchor <- anchor - d. An outer
step reaches beyond where the replicas are, which further inner steps make good and nothing does there.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stepline.comm.codec import ChunkCodec
from stepline.comm.exchange import all_gather
from stepline.comm.fsdp import local
from stepline.comm.shared import SharedModel
from stepline.comm.synchronizer import Optimizer, StepResult, Synchronizer
from stepline.comm.traffic import ring_bytes

INT8_CHUNK = 4096  # values with one scale


@dataclass(frozen=True)
class DiLoCoSettings:
    """The defaults are those of the config."""

    every: int = 32
    """H: inner steps between two averages of a parameter."""
    outer_lr: float = 0.7
    outer_momentum: float = 0.9
    fragments: int = 1
    """Parts of the model that are averaged in turns, H / fragments steps apart."""
    codec: str = "fp32"
    """How pseudo-gradients travel: fp32, bf16 or int8."""
    total_steps: int | None = None
    """The step after which all fragments are averaged, those whose turn it is not by their plain mean."""
    weight_decay: float = 0.0


class DiLoCo(Synchronizer):
    """Wraps an inner optimizer. The model that replicas agree on is `anchor`; between two averages the parameters
    are this replica's own."""

    left_behind = (".local.",)

    def __init__(
        self, named_parameters: Mapping[str, nn.Parameter], group: dist.ProcessGroup | None,
        settings: DiLoCoSettings, inner: Optimizer,
    ) -> None:  # fmt: skip
        super().__init__(named_parameters, group)
        self.settings, self.inner = settings, inner
        self.shared = SharedModel(self.parameters)
        self.anchor = self.shared.values
        self.momentum = {n: torch.zeros_like(p.data) for n, p in self.parameters.items()}
        self.steps = torch.zeros((), dtype=torch.int64)
        self.fragments = _cut(self.parameters, settings.fragments)

    @torch.no_grad()
    def step(self, lr: float, skip: Tensor | None = None) -> StepResult:
        """One inner update, and the outer one of the fragment whose turn it is. A skipped step takes its turn too."""
        self.inner.step(lr, self.settings.weight_decay, skip)
        self.steps += 1
        turn = self._turn(int(self.steps))
        rest = [f for f in self.fragments if f not in turn] if self.steps == self.settings.total_steps else []
        num_bytes = sum(self._average(names, self._outer_step) for names in turn)
        num_bytes += sum(self._average(names, self._plain_mean) for names in rest)
        return StepResult(num_bytes, num_bytes, skip, jumped=bool(turn or rest))

    def _turn(self, step: int) -> list[list[str]]:
        """The fragments whose turn it is after `step`."""
        every, count = self.settings.every, len(self.fragments)
        return [f for i, f in enumerate(self.fragments) if (step + i * every // count) % every == 0]

    def _average(self, names: list[str], move: Callable[[str, Tensor], None]) -> int:
        """Moves the anchors of some parameters by d, and the parameters to them; returns the bytes that were sent, and
        as many received."""
        anchors = [local(self.anchor[n]) for n in names]
        sizes = [anchor.numel() for anchor in anchors]
        # one copy of them, into which the mean comes: all of a large model may be averaged at once
        d = anchors[0].new_zeros(self._length(sum(sizes)))
        parts = [p.view_as(a) for p, a in zip(d[: sum(sizes)].split(sizes), anchors, strict=True)]
        for name, anchor, part in zip(names, anchors, parts, strict=True):
            torch.sub(anchor, local(self.parameters[name].data), out=part)
        num_bytes = self._take_mean(d)
        for name, anchor, part in zip(names, anchors, parts, strict=True):
            move(name, part)
            local(self.parameters[name].data).copy_(anchor)
        return num_bytes

    def _outer_step(self, name: str, d: Tensor) -> None:
        m, mu = local(self.momentum[name]), self.settings.outer_momentum
        m.mul_(mu).add_(d)
        local(self.anchor[name]).sub_(d.add_(m, alpha=mu), alpha=self.settings.outer_lr)

    def _plain_mean(self, name: str, d: Tensor) -> None:
        local(self.anchor[name]).sub_(d)

    def _length(self, values: int) -> int:
        """With the zeros that fill up the last chunk."""
        return -(-values // INT8_CHUNK) * INT8_CHUNK if self.settings.codec == "int8" else values

    def _take_mean(self, d: Tensor) -> int:
        """Puts the mean over the replicas in the place of a pseudo-gradient `[n]`; returns the bytes sent."""
        if self.settings.codec == "int8":
            codec = ChunkCodec(len(d) // INT8_CHUNK, INT8_CHUNK, INT8_CHUNK, "int8", d.dtype, indexed=False)
            packet = codec.encode(None, d.view(-1, INT8_CHUNK))[0]
            d.zero_()
            for other in all_gather(packet, self.group).land():
                d += codec.decode(other)[1].view(-1)
            num_bytes = len(packet) * (self.replicas - 1)
        else:
            sent = d.bfloat16() if self.settings.codec == "bf16" else d
            if self.replicas > 1:
                dist.all_reduce(sent, group=self.group)
            d.copy_(sent)
            num_bytes = ring_bytes(sent.numel() * sent.element_size(), self.replicas)
        d.div_(self.replicas)
        return num_bytes

    def adopt(self) -> None:
        """Starts from the parameters as they are."""
        self.shared.take()

    def shared_parameters(self) -> dict[str, Tensor]:
        """The anchors."""
        return dict(self.anchor)

    def shared_model(self) -> AbstractContextManager[None]:
        """The parameters are the anchors within."""
        return self.shared.given()

    def describe(self) -> dict[str, str]:
        """The inner optimizer's words."""
        return {n: f"{words}, diloco" for n, words in self.inner.describe().items()}

    def state_dict(self, replica: int) -> dict[str, Tensor]:
        """This replica's parameters and inner state, and the outer momentum that all share."""
        state = {f"replica{replica}.local.{n}": p.data for n, p in self.parameters.items()}
        state |= {f"replica{replica}.optimizer.{n}": t for n, t in self.inner.state().items()}
        state |= {f"optimizer.{n}.outer_momentum": t for n, t in self.momentum.items()}
        return state | {"optimizer.steps": self.steps}

    @torch.no_grad()
    def resized(self, replicas_before: int, load: Callable[[dict[str, Tensor]], None]) -> str:
        """All replicas continue from the mean of those that were: an early average, without the outer step."""
        for replica in range(replicas_before):
            load({f"replica{replica}.local.{n}": p.data for n, p in self.parameters.items()})
            for name, parameter in self.parameters.items():
                local(self.anchor[name]).lerp_(local(parameter.data), 1 / (replica + 1))
        self.shared.give()
        return (
            f"{replicas_before} replicas became {self.replicas}: all begin at the mean of those that were, with the "
            "inner optimizer's state of a replica that was there"
        )


def _cut(parameters: Mapping[str, nn.Parameter], count: int) -> list[list[str]]:
    """The names in their order, in `count` parts of about as many values each."""
    total, seen = sum(p.numel() for p in parameters.values()), 0
    fragments: list[list[str]] = [[] for _ in range(count)]
    for name, parameter in parameters.items():
        fragments[min(seen * count // total, count - 1)].append(name)
        seen += parameter.numel()
    return [fragment for fragment in fragments if fragment]
