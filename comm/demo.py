"""DeMo: replicas exchange the largest DCT coefficients of what they would tell each other (arXiv 2411.19870).

With the letters of the paper, for each parameter and replica, `accumulate: gradients`, version 1:

    delta <- beta delta + lr g
    q     <- the largest coefficients of DCT(delta), chunk by chunk
    delta <- delta - IDCT(q)
    Q     <- mean of q over the replicas that sent an index
    p     <- p - lr (sign(IDCT(Q)) + wd p)

Version 2: `delta <- beta delta + (1 - beta) g`, `delta <- delta - alpha IDCT(q)`, `p <- p - lr (phi(IDCT(Q)) + wd p)`.

`accumulate: updates`, the default, keeps what the sign throws away: what waits are the updates of this replica's own
optimizer, and they are applied as they arrive.

    delta <- beta delta + update(g);  delta <- delta - IDCT(q)
    p     <- p - lr wd p + IDCT(mean of q over all replicas)

A step late (`delay`) the mean is applied after the next step's gradients have been taken. With `ahead` a replica takes
them where the parameters are about to be as far as it knows: at p + IDCT(q), with its own update in the mean's place.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stepline.comm.chunking import Chunking
from stepline.comm.chunks import Chunks, Rule
from stepline.comm.codec import dequantise
from stepline.comm.demo_settings import DeMoSettings
from stepline.comm.exchange import Flight, PacketExchange
from stepline.comm.fsdp import local, shard_slice
from stepline.comm.packets import Batch, PacketFormat, Quantised, make_batches
from stepline.comm.shared import SharedModel
from stepline.comm.synchronizer import Optimizer, StepResult, Synchronizer
from stepline.comm.waiting import MakeOptimizer, Waiting

Direction = Callable[[dict[str, Tensor]], dict[str, Tensor]]


class DeMo(Synchronizer):
    """Vectors by their mean gradient and `dense`; matrices by DeMo; those of `untransformed` (embedding, head), whose
    rows without a gradient a transform and a sign would move, by the largest values of their waiting updates.

    decayed: names to which weight decay applies. dense: updates the vectors. make_optimizer: over what waits.
    direction: with phi muon, the orthogonalised updates of decoded momenta by name (this rank's rows).
    kernels: of comm/chunks.py, for a device that has some.
    """

    left_behind = (".delta", ".owed.", ".own", ".looked")
    optional = (".landed", ".own", ".looked")

    def __init__(
        self, named_parameters: Mapping[str, nn.Parameter], group: dist.ProcessGroup | None, settings: DeMoSettings,
        *, decayed: set[str] = frozenset(), untransformed: set[str] = frozenset(), dense: Optimizer | None = None,
        make_optimizer: MakeOptimizer | None = None, direction: Direction | None = None,
        kernels: ModuleType | None = None,
    ) -> None:  # fmt: skip
        super().__init__(named_parameters, group)
        self.settings, self.decayed, self.dense, self.direction = settings, decayed, dense, direction
        names, faithful = list(self.parameters), settings.faithful
        self.vectors = [n for n in names if self.parameters[n].ndim < 2 and not faithful]
        matrices = [n for n in names if n not in self.vectors]
        plain = [n for n in matrices if n in untransformed and not faithful]
        published = [
            n for n in matrices if n not in plain and (faithful or settings.accumulate == "gradients")
        ]
        self.momentum = {n: torch.zeros_like(self.parameters[n].data) for n in published}
        waiting = {n: self.parameters[n] for n in matrices if n not in self.momentum}
        self.waiting = Waiting(waiting, make_optimizer, settings.beta)
        self.batches = self._cut(plain)
        sample = self.sample = local(next(iter(self.parameters.values())).data)
        self.chunks = Chunks(self.batches, settings.codec, sample, kernels)

        shares = self.replicas if self.replicas > settings.owner_reduce_above else 1
        dense_values = sum(local(self.parameters[n]).numel() for n in self.vectors)
        self.form = PacketFormat(
            self.batches, dense_values, settings.codec, sample.dtype, shares, self.chunks.packing
        )
        slices = [(n, *shard_slice(p)) for n, p in self.parameters.items()]
        cut = f"{zlib.crc32(repr(slices).encode()):08x}"
        self.exchange = PacketExchange(self.form, group, sample, self.chunks, cut)
        self.flight: Flight | None = None
        self.pending: dict[str, Tensor] = {}
        """Decoded updates that the next step applies (delay 1); vectors: their mean gradient."""
        if settings.delay:
            self.pending = {n: torch.zeros_like(p.data) for n, p in self.parameters.items()}
        self.landed = torch.zeros((), dtype=torch.int64)
        """Whether `pending` holds an update: the first step has none to apply, not one of zeros, which would count as
        a step of `dense` and take from its moments."""
        self.shared = SharedModel(self.parameters) if settings.ahead else None
        self.looked = torch.zeros((), dtype=torch.int64)
        """Of a checkpoint: whether it holds this replica's own parameters."""

    def _cut(self, plain: list[str]) -> list[Batch]:
        """Batches of the momenta's chunks, of the waiting updates' and of those that are not transformed."""
        settings, limit = self.settings, self.settings.chunk
        shapes = {n: tuple(local(p).shape) for n, p in self.parameters.items()}
        momenta = {n: Chunking.of(shapes[n], limit, divisors=settings.faithful) for n in self.momentum}
        waiting = {n: Chunking.of(shapes[n], limit) for n in self.waiting.parameters if n not in plain}
        flat = {n: Chunking.flat(shapes[n], limit * limit) for n in plain}
        size = (settings.density, settings.kept)
        return [
            *make_batches(momenta, *size, transformed=True, published=True),
            *make_batches(waiting, *size, transformed=True, published=False),
            *make_batches(flat, *size, transformed=False, published=False),
        ]

    def step(self, lr: float, skip: Tensor | None = None) -> StepResult:
        """One update; `skip` is read by the host, as a packet must not leave with what is skipped."""
        if skip is not None and bool(skip):
            return StepResult(0, 0, skip)
        if self.shared is not None:
            self.shared.give()
        sent, packets = self._encode(lr)
        before, self.flight = self.flight, None
        if before is not None:
            before.land()
        flight = self.exchange.send(packets)
        if not self.settings.delay:
            self._land(flight, lr)
        else:
            if before is not None:
                self._land(before, lr)
            elif self.landed:
                self._apply({n: local(update) for n, update in self.pending.items()}, lr)
            self.flight = flight
        if self.shared is not None:
            self.shared.take()
            self._look_ahead(sent)
        return StepResult(*self.exchange.num_bytes, skip)

    @torch.no_grad()
    def midway(self) -> None:
        """Owners reduce the first message of the step before and send the second, beside the rest of this one."""
        if self.flight is not None:
            self.flight = self.exchange.pass_on(self.flight)

    @torch.no_grad()
    def _look_ahead(self, sent: Sequence[Quantised]) -> None:
        """Adds to the parameters what this replica has sent, in the place of the mean that is under way."""
        parameters = {n: local(p.data) for n, p in self.parameters.items()}
        for batch, (indices, numbers, scale) in zip(self.batches, sent, strict=True):
            own = indices[None], dequantise(numbers, scale, self.sample.dtype)[None]
            self.chunks.apply(batch, own, parameters, lambda _: Rule())

    @torch.no_grad()
    def _encode(self, lr: float) -> tuple[list[Quantised], list[Tensor]]:
        """Takes the gradients into what waits, and what is sent out of it; returns a packet for each share, and before
        them, to look ahead, what was sent."""
        settings = self.settings
        gain = lr if settings.version == 1 else 1 - settings.beta
        for name, delta in self.momentum.items():
            local(delta).mul_(settings.beta).add_(self.gradient(name), alpha=gain)
        self.waiting.accumulate(lr)

        delta = {n: local(t) for n, t in self.momentum.items()} | self.waiting.local()
        sent = []
        for batch in self.batches:
            alpha = settings.alpha if batch.published and settings.version == 2 else 1.0
            sent.append(self.chunks.encode(batch, delta, alpha))
        vectors = torch.cat([self.sample.new_zeros(0), *(self.gradient(n).reshape(-1) for n in self.vectors)])
        return ([] if self.shared is None else sent), self.form.write_all(sent, vectors)

    def _decoded(self, flight: Flight) -> dict[str, Tensor]:
        """What has arrived, for all parameters: decoded updates, and the vectors' mean gradients."""
        arrived, dense = self.exchange.receive(flight)
        like = {n: local(p.data) for n, p in self.parameters.items()}
        found: dict[str, Tensor] = {}
        for batch, own in zip(self.batches, arrived, strict=True):
            found |= self.chunks.decode(batch, own, like)
        return found | self._dense(dense)

    def _dense(self, mean: Tensor) -> dict[str, Tensor]:
        sizes = [local(self.parameters[n]).numel() for n in self.vectors]
        return dict(zip(self.vectors, mean.split(sizes), strict=True)) if self.vectors else {}

    @torch.no_grad()
    def _land(self, flight: Flight, lr: float) -> None:
        """What has arrived is applied."""
        if self.settings.phi == "muon" and self.momentum:  # whose matrices meet in other batches
            self._apply(self._decoded(flight), lr)
            return
        arrived, dense = self.exchange.receive(flight)
        parameters = {n: local(p.data) for n, p in self.parameters.items()}
        for batch, own in zip(self.batches, arrived, strict=True):
            self.chunks.apply(batch, own, parameters, lambda name: self._rule(name, lr))
        self._step_vectors(self._dense(dense), lr)

    @torch.no_grad()
    def _apply(self, updates: dict[str, Tensor], lr: float) -> None:
        """The same of decoded updates."""
        if self.settings.phi == "muon" and self.momentum:
            # a rank without rows of a matrix decodes nothing for it
            momenta = {n: updates.get(n, torch.zeros_like(local(d))) for n, d in self.momentum.items()}
            updates = updates | self.direction(momenta)
        for name, update in updates.items():
            if name not in self.vectors:
                p = local(self.parameters[name].data)
                self._rule(name, lr).apply(p, update.view_as(p))
        self._step_vectors({n: updates[n] for n in self.vectors}, lr)

    def _rule(self, name: str, lr: float) -> Rule:
        """How a parameter moves; the identity of version 1 holds the learning rate."""
        decay = 1 - lr * self.settings.weight_decay if name in self.decayed else 1.0
        if name in self.waiting.parameters:
            return Rule(decay)
        phi, version = self.settings.phi, self.settings.version
        return Rule(decay, -1.0 if phi == "identity" and version == 1 else -lr, phi == "sign")

    def _step_vectors(self, gradients: dict[str, Tensor], lr: float) -> None:
        for name, gradient in gradients.items():
            self.set_gradient(name, gradient)
        if gradients:
            self.dense.step(lr, self.settings.weight_decay)

    def describe(self) -> dict[str, str]:
        """`demo`, the waiting updates' optimizer, or the dense one's words."""
        kinds = {n: f"demo, {'' if n in self.decayed else 'not '}decayed" for n in self.momentum}
        kinds |= self.waiting.describe("demo", self.decayed)
        return kinds | (self.dense.describe() if self.vectors else {})

    @torch.no_grad()
    def state_dict(self, replica: int) -> dict[str, Tensor]:
        """What waits in this replica, and what all share: the vectors' optimizer and, with a delay, the next update."""
        if self.flight is not None:  # completed: its updates do not depend on how many replicas read them
            for name, update in self._decoded(self.flight).items():
                local(self.pending[name]).copy_(update.view_as(local(self.pending[name])))
            self.flight = None
            self.landed.fill_(1)
        own = {f"{n}.delta": t for n, t in self.momentum.items()}
        own |= self.waiting.state_dict() | self.exchange.state_dict()
        if self.settings.delay:
            own["landed"] = self.landed
        if self.shared is not None:
            own |= {f"{n}.own": p.data for n, p in self.parameters.items()} | {"looked": self.looked.fill_(1)}
        state = {f"replica{replica}.optimizer.{n}": t for n, t in own.items()}
        if self.dense is not None:
            state |= {f"optimizer.{n}": t for n, t in self.dense.state().items()}
        return state | {f"optimizer.{n}.pending": t for n, t in self.pending.items()}

    def to_load(self, replicas_before: int) -> dict[str, Tensor]:
        """As above; a checkpoint that does not tell whether an update has landed holds one, and one without this
        replica's own parameters is taken for the shared model."""
        state = super().to_load(replicas_before)
        self.landed.fill_(1)
        self.looked.zero_()
        return state

    def loaded(self) -> None:
        """Goes on from the shared model where the checkpoint has none of this replica's own."""
        if self.shared is not None and not self.looked:
            self.shared.give()

    def adopt(self) -> None:
        """The parameters as they are become the shared model."""
        if self.shared is not None:
            self.shared.take()

    def shared_parameters(self) -> dict[str, Tensor]:
        """Without what a replica has added to look ahead."""
        return super().shared_parameters() if self.shared is None else dict(self.shared.values)

    def shared_model(self) -> AbstractContextManager[None]:
        """The parameters are those within."""
        return super().shared_model() if self.shared is None else self.shared.given()

    def resized(self, replicas_before: int, load: Callable[[dict[str, Tensor]], None]) -> str:
        """The sentence for the log."""
        return (
            f"{replicas_before} replicas became {self.replicas}: what waited to be sent, which each replica has of its "
            "own, is dropped"
        )
