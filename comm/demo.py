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
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stepline.comm.dct import Chunking, dct, dct_basis, inverse_dct, inverse_dct_of
from stepline.comm.exchange import Flight, PacketExchange
from stepline.comm.fsdp import local
from stepline.comm.packets import Batch, Chosen, PacketFormat, largest, make_batches, scattered
from stepline.comm.synchronizer import Optimizer, StepResult, Synchronizer
from stepline.comm.waiting import MakeOptimizer, Waiting

SPARSE_INVERSE = 3
"""How many times fewer values than height + width make outer products cheaper than two dense ones (measured)."""
Direction = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class DeMoSettings:
    """How DeMo works; the defaults are those of the config."""

    accumulate: str = "updates"
    """What waits to be sent: `updates` of the optimizer, or `gradients` as published."""
    version: int = 1
    faithful: bool = False
    """The published algorithm: divisor chunks, every parameter transformed."""
    chunk: int = 32
    density: float = 1 / 50
    kept: int | None = None
    """Coefficients of a chunk, instead of the density."""
    beta: float = 0.999
    alpha: float = 1.0
    """Version 2: how much of what was sent leaves the momentum."""
    phi: str = "sign"
    codec: str = "sign"
    delay: int = 0
    """Steps by which the update lags, so that the exchange overlaps the next forward and backward."""
    owner_reduce_above: int = 8
    """Replicas beyond which owners reduce, so that what a rank receives no longer grows."""
    weight_decay: float = 0.0


class DeMo(Synchronizer):
    """Vectors by their mean gradient and `dense`; matrices by DeMo; those of `untransformed` (embedding, head), whose
    rows without a gradient a transform and a sign would move, by the largest values of their waiting updates.

    decayed: names to which weight decay applies. dense: updates the vectors. make_optimizer: over what waits.
    direction: with phi muon, the orthogonalised updates of decoded momenta by name (this rank's rows).
    """

    left_behind = (".delta", ".owed.")

    def __init__(
        self, named_parameters: Mapping[str, nn.Parameter], group: dist.ProcessGroup | None, settings: DeMoSettings,
        *, decayed: set[str] = frozenset(), untransformed: set[str] = frozenset(), dense: Optimizer | None = None,
        make_optimizer: MakeOptimizer | None = None, direction: Direction | None = None,
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
        sides = {side for b in self.batches if b.transformed for side in (b.height, b.width)}
        self.basis = {side: dct_basis(side, sample.dtype, sample.device) for side in sides}

        shares = self.replicas if self.replicas > settings.owner_reduce_above else 1
        dense_values = sum(local(self.parameters[n]).numel() for n in self.vectors)
        self.form = PacketFormat(self.batches, dense_values, settings.codec, sample.dtype, shares)
        self.exchange = PacketExchange(self.form, group, sample)
        self.flight: Flight | None = None
        self.pending: dict[str, Tensor] = {}
        """Decoded updates that the next step applies (delay 1); vectors: their mean gradient."""
        if settings.delay:
            self.pending = {n: torch.zeros_like(p.data) for n, p in self.parameters.items()}

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
        packets = self._encode(lr)
        before, self.flight = self.flight, None
        if before is not None:
            before.land()
        flight = self.exchange.send(packets)
        if not self.settings.delay:
            self._apply(self._arrived(flight), lr)
        else:
            held = {n: local(update) for n, update in self.pending.items()}
            self._apply(iter([held]) if before is None else self._arrived(before), lr)
            self.flight = flight
        return StepResult(*self.exchange.num_bytes, skip)

    @torch.no_grad()
    def _encode(self, lr: float) -> list[Tensor]:
        """Takes the gradients into what waits, and what is sent out of it; returns a packet for each share."""
        settings, form = self.settings, self.form
        gain = lr if settings.version == 1 else 1 - settings.beta
        for name, delta in self.momentum.items():
            local(delta).mul_(settings.beta).add_(self.gradient(name), alpha=gain)
        self.waiting.accumulate(lr)

        delta = {n: local(t) for n, t in self.momentum.items()} | self.waiting.local()
        chosen = []
        for batch in self.batches:
            chunks = batch.split(delta)
            if batch.transformed:
                chunks = dct(chunks, *self._bases(batch))
            chosen.append(largest(chunks.view(batch.chunks, -1), batch.kept))
        vectors = torch.cat([self.sample.new_zeros(0), *(self.gradient(n).reshape(-1) for n in self.vectors)])
        written = [form.write(s, *self._share(s, chosen, vectors)) for s in range(form.shares)]
        for i, batch in enumerate(self.batches):
            own = (chosen[i][0], torch.cat([sent[i] for _, sent in written]))
            alpha = settings.alpha if batch.published and settings.version == 2 else 1.0
            for name, part in self._own(batch, own).items():
                delta[name].sub_(part.view_as(delta[name]), alpha=alpha)
        return [packet for packet, _ in written]

    def _bases(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.basis[batch.height], self.basis[batch.width]

    def _share(self, share: int, chosen: Sequence[Chosen], dense: Tensor) -> tuple[list[Chosen], Tensor]:
        """What of a whole step belongs to one owner."""
        spans = [self.form.span(batch.chunks, share) for batch in self.batches]
        parts = [(indices[s], values[s]) for (indices, values), s in zip(chosen, spans, strict=True)]
        return parts, dense[self.form.span(len(dense), share)]

    def _own(self, batch: Batch, sent: Chosen) -> dict[str, Tensor]:
        """What this replica has sent, decoded: tensors of the parameters in the batch."""
        if batch.transformed and batch.kept < (batch.height + batch.width) / SPARSE_INVERSE:
            return batch.join(inverse_dct_of(*sent, *self._bases(batch)))
        return self._decode(batch, scattered(sent, batch.elements))

    def _decode(self, batch: Batch, flat: Tensor) -> dict[str, Tensor]:
        """Tensors of the parameters in the batch, of `[chunks, elements]` as they were chosen."""
        chunks = flat.view(batch.chunks, batch.height, batch.width)
        return batch.join(inverse_dct(chunks, *self._bases(batch)) if batch.transformed else chunks)

    def _arrived(self, flight: Flight) -> Iterator[dict[str, Tensor]]:
        """Decoded updates by parameter, batch by batch; the vectors' mean gradients at the end."""
        means, dense = self.exchange.receive(flight)
        for batch, mean in zip(self.batches, means, strict=True):
            yield self._decode(batch, mean)
        sizes = [local(self.parameters[n]).numel() for n in self.vectors]
        yield dict(zip(self.vectors, dense.split(sizes), strict=True)) if self.vectors else {}

    @torch.no_grad()
    def _apply(self, updates: Iterator[dict[str, Tensor]], lr: float) -> None:
        """What arrived is applied; every parameter comes once."""
        wd, version, phi = self.settings.weight_decay, self.settings.version, self.settings.phi
        if phi == "muon" and self.momentum:  # whose matrices meet in other batches
            every = {n: torch.zeros_like(local(d)) for n, d in self.momentum.items()}
            every |= {name: update for batch in updates for name, update in batch.items()}
            updates = iter([every | self.direction({n: every[n] for n in self.momentum})])
        for batch in updates:
            for name, update in batch.items():
                if name in self.vectors:
                    self.set_gradient(name, update)
                    continue
                p = local(self.parameters[name].data)
                if name in self.decayed:
                    p.mul_(1 - lr * wd)
                update = update.view_as(p)
                if name in self.waiting.parameters:
                    p.add_(update)
                elif phi == "sign":
                    p.sub_(update.sign(), alpha=lr)
                else:  # the identity of version 1 holds the learning rate
                    p.sub_(update, alpha=1.0 if phi == "identity" and version == 1 else lr)
        if self.vectors:
            self.dense.step(lr, wd)

    def describe(self) -> dict[str, str]:
        """`demo`, the waiting updates' optimizer, or the dense one's words."""
        kinds = {n: f"demo, {'' if n in self.decayed else 'not '}decayed" for n in self.momentum}
        kinds |= self.waiting.describe("demo", self.decayed)
        return kinds | (self.dense.describe() if self.vectors else {})

    @torch.no_grad()
    def state_dict(self, replica: int) -> dict[str, Tensor]:
        """What waits in this replica, and what all share: the vectors' optimizer and, with a delay, the next update."""
        if self.flight is not None:  # completed: its updates do not depend on how many replicas read them
            for updates in self._arrived(self.flight):
                for name, update in updates.items():
                    local(self.pending[name]).copy_(update.view_as(local(self.pending[name])))
            self.flight = None
        own = {f"{n}.delta": t for n, t in self.momentum.items()}
        own |= self.waiting.state_dict() | self.exchange.state_dict()
        state = {f"replica{replica}.optimizer.{n}": t for n, t in own.items()}
        if self.dense is not None:
            state |= {f"optimizer.{n}": t for n, t in self.dense.state().items()}
        return state | {f"optimizer.{n}.pending": t for n, t in self.pending.items()}

    def resized(self, replicas_before: int) -> str:
        """The sentence for the log."""
        return (
            f"{replicas_before} replicas became {self.replicas}: what waited to be sent, which each replica has of its "
            "own, is dropped"
        )
