"""DeMo: replicas exchange the fast-moving part of their momentum alone (arXiv 2411.19870).

With the letters of the paper, for each parameter and replica (version 1):

    delta <- beta delta + lr g
    q     <- the largest coefficients of DCT(delta), chunk by chunk
    delta <- delta - IDCT(q)
    Q     <- mean of q over the replicas that sent an index
    p     <- p - lr (sign(IDCT(Q)) + wd p)

Version 2: `delta <- beta delta + (1 - beta) g`, `delta <- delta - alpha IDCT(q)`, `p <- p - lr (phi(IDCT(Q)) + wd p)`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stepline.comm.dct import Chunking, dct, dct_basis, inverse_dct, inverse_dct_of
from stepline.comm.exchange import Flight, all_gather, to_owners
from stepline.comm.fsdp import local
from stepline.comm.packets import (
    Batch,
    Chosen,
    PacketFormat,
    contributors_mean,
    largest,
    make_batches,
    replicas_mean,
    scattered,
)
from stepline.comm.residual import Residual
from stepline.comm.synchronizer import Optimizer, StepResult, Synchronizer

SPARSE_INVERSE = 3
"""How many times fewer values than height + width make outer products cheaper than two dense ones (measured)."""
Direction = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class DeMoSettings:
    """How DeMo works; the defaults are those of the config."""

    version: int = 1
    faithful: bool = False
    """The published algorithm: divisor chunks, every parameter transformed."""
    chunk: int = 64
    density: float = 1 / 128
    kept: int | None = None
    """Coefficients of a chunk, instead of the density."""
    beta: float = 0.999
    alpha: float = 1.0
    """Version 2: how much of what was sent leaves the momentum."""
    phi: str = "sign"
    codec: str = "int8"
    delay: int = 0
    """Steps by which the update lags, so that the exchange overlaps the next forward and backward."""
    owner_reduce_above: int = 8
    """Replicas beyond which owners reduce, so that what a rank receives no longer grows."""
    weight_decay: float = 0.0
    beta2: float = 0.95
    eps: float = 1e-8


class DeMo(Synchronizer):
    """Matrices by DeMo; vectors by their mean gradient and `dense`; `untransformed` ones (embedding, head), whose
    rows without a gradient a transform and a sign would move, by the largest values of their update themselves.

    decayed: names to which weight decay applies. dense: updates the vectors from their mean gradients. direction:
    with phi muon, the orthogonalised update of a dict of decoded momenta (this rank's rows).
    """

    def __init__(
        self, named_parameters: Mapping[str, nn.Parameter], group: dist.ProcessGroup | None, settings: DeMoSettings,
        *, decayed: set[str] = frozenset(), untransformed: set[str] = frozenset(), dense: Optimizer | None = None,
        direction: Direction | None = None,
    ) -> None:  # fmt: skip
        super().__init__(named_parameters, group)
        self.settings, self.decayed, self.dense, self.direction = settings, decayed, dense, direction
        names, faithful = list(self.parameters), settings.faithful
        self.vectors = [n for n in names if self.parameters[n].ndim < 2 and not faithful]
        self.residual = Residual(
            {n: self.parameters[n] for n in names if n in untransformed and not faithful},
            settings.beta, settings.beta2, settings.eps,
        )  # fmt: skip
        self.transformed = [n for n in names if n not in self.vectors and n not in self.residual.parameters]
        self.delta = {n: torch.zeros_like(self.parameters[n].data) for n in self.transformed}

        shapes = {n: tuple(local(self.parameters[n]).shape) for n in names}
        limit = settings.chunk
        cut = {n: Chunking.of(shapes[n], limit, divisors=faithful) for n in self.transformed}
        flat = {n: Chunking.flat(shapes[n], limit * limit) for n in self.residual.parameters}
        self.batches = make_batches(cut, settings.density, settings.kept)
        self.dct_batches = len(self.batches)
        self.batches += make_batches(flat, settings.density, settings.kept)
        sample = local(next(iter(self.parameters.values())))
        self.bases = [
            (
                dct_basis(b.height, sample.dtype, sample.device),
                dct_basis(b.width, sample.dtype, sample.device),
            )
            for b in self.batches[: self.dct_batches]
        ]
        self.owners = self.replicas > settings.owner_reduce_above
        self.format = PacketFormat(
            self.batches, sum(local(self.parameters[n]).numel() for n in self.vectors), settings.codec,
            sample.dtype, shares=self.replicas if self.owners else 1,
        )  # fmt: skip
        self.owed = [sample.new_zeros(c.chunks, c.elements) for c in self._own_codecs()]
        """What this owner has cut off from its share of the reduced chunks, and sends later."""
        self.flight: Flight | None = None
        self.pending: dict[str, Tensor] = {}
        """Decoded updates that the next step applies (delay 1); vectors: their mean gradient."""
        if settings.delay:
            self.pending = {n: torch.zeros_like(p.data) for n, p in self.parameters.items()}

    def step(self, lr: float, skip: Tensor | None = None) -> StepResult:
        """One update; `skip` is read by the host, as a packet must not leave with what is skipped."""
        if skip is not None and bool(skip):
            return StepResult(0, 0, skip)
        packets = self._encode(lr)
        before, self.flight = self.flight, None
        if before is not None:
            before.land()
        flight = self._send(packets)
        if not self.settings.delay:
            self._apply(self._arrived(flight), lr)
        else:
            updates = self._pending_updates() if before is None else self._arrived(before)
            self._apply(updates, lr)
            self.flight = flight
        return StepResult(*self.bytes_per_step(), skip)

    def _encode(self, lr: float) -> list[Tensor]:
        """Takes the gradients into the momentum, and what is sent out of it; returns a packet for each share."""
        settings = self.settings
        gain = lr if settings.version == 1 else 1 - settings.beta
        for name in self.transformed:
            local(self.delta[name]).mul_(settings.beta).add_(self.gradient(name), alpha=gain)
        self.residual.accumulate(self.gradient, lr)

        momenta = self._momenta()
        chosen = []
        for i, batch in enumerate(self.batches):
            chunks = batch.split(momenta)
            if i < self.dct_batches:
                chunks = dct(chunks, *self.bases[i])
            chosen.append(largest(chunks.view(batch.chunks, -1), batch.kept))
        dense = [self.gradient(name).reshape(-1) for name in self.vectors]
        dense = torch.cat(dense) if dense else self.format_zeros()
        packets, sent = [], []
        for share in range(self.format.shares):
            packet, decoded = self.format.write(share, *self._share(share, chosen, dense))
            packets.append(packet)
            sent.append(decoded)
        for i, batch in enumerate(self.batches):
            own = (chosen[i][0], torch.cat([decoded[i] for decoded in sent]))
            alpha = settings.alpha if settings.version == 2 and i < self.dct_batches else 1.0
            for name, part in self._own(i, batch, own).items():
                momenta[name].sub_(part.view_as(momenta[name]), alpha=alpha)
        return packets

    def _own(self, i: int, batch: Batch, sent: Chosen) -> dict[str, Tensor]:
        """What this replica has sent, decoded: tensors of the parameters in batch i."""
        if i < self.dct_batches and batch.kept < (batch.height + batch.width) / SPARSE_INVERSE:
            return batch.join(inverse_dct_of(*sent, *self.bases[i]))
        return self._chunks_to_tensors(i, batch, scattered(sent, batch.height * batch.width))

    def _momenta(self) -> dict[str, Tensor]:
        """This rank's part of what packets are taken from, in place."""
        return {n: local(t) for n, t in (self.delta | self.residual.delta).items()}

    def format_zeros(self) -> Tensor:
        """No value, of the parameters' type and device."""
        return local(next(iter(self.parameters.values()))).new_zeros(0)

    def _share(self, share: int, chosen: Sequence[Chosen], dense: Tensor) -> tuple[list[Chosen], Tensor]:
        """What of a whole step belongs to one owner."""
        spans = [self.format.span(batch.chunks, share) for batch in self.batches]
        parts = [(indices[s], values[s]) for (indices, values), s in zip(chosen, spans, strict=True)]
        return parts, dense[self.format.span(len(dense), share)]

    def _chunks_to_tensors(self, i: int, batch: Batch, flat: Tensor) -> dict[str, Tensor]:
        """Tensors of the parameters in batch i, from values in the domain in which they were chosen."""
        chunks = flat.view(batch.chunks, batch.height, batch.width)
        return batch.join(inverse_dct(chunks, *self.bases[i]) if i < self.dct_batches else chunks)

    def _send(self, packets: list[Tensor]) -> Flight:
        if self.owners:
            return to_owners(packets, self.format.num_bytes(self.replica), self.group)
        return all_gather(packets[0], self.group)

    def bytes_per_step(self) -> tuple[int, int]:
        """(sent, received) by this rank."""
        sizes = [self.format.num_bytes(share) for share in range(self.format.shares)]
        others = self.replicas - 1
        if not self.owners:
            return others * sizes[0], others * sizes[0]
        gathered = others * max(sizes)
        return sum(sizes) - sizes[self.replica] + gathered, others * sizes[self.replica] + gathered

    def _means(self, share: int, packets: list[Tensor]) -> tuple[Iterator[Tensor], Tensor]:
        """(mean of each batch's chunks `[chunks, elements]`, mean of the vectors' gradients) of one share."""
        read = [self.format.read(share, packet) for packet in packets]
        dense = read[0][1].clone()
        for _, other in read[1:]:
            dense += other

        def means() -> Iterator[Tensor]:
            for i, batch in enumerate(self.batches):
                contributions, elements = [chosen[i] for chosen, _ in read], batch.height * batch.width
                if i < self.dct_batches:
                    yield contributors_mean(contributions, elements, zeros_count=self.settings.faithful)
                else:
                    yield replicas_mean(contributions, elements)

        return means(), dense / len(read)

    def _arrived(self, flight: Flight) -> Iterator[dict[str, Tensor]]:
        """Decoded updates by parameter, batch by batch; the vectors' mean gradients at the end."""
        means, dense = self._means(self.replica if self.owners else 0, flight.land())
        if self.owners:
            means, dense = self._reduce(means, dense)
        for i, (batch, mean) in enumerate(zip(self.batches, means, strict=True)):
            yield self._chunks_to_tensors(i, batch, mean)
        sizes = [local(self.parameters[n]).numel() for n in self.vectors]
        yield dict(zip(self.vectors, dense.split(sizes), strict=True)) if self.vectors else {}

    def _own_codecs(self) -> list:
        return self.format.codecs(self.replica) if self.owners else []

    def _reduce(self, means: Iterator[Tensor], dense: Tensor) -> tuple[Iterator[Tensor], Tensor]:
        """The owner's part: adds what it owes, sends the largest values again, and owes the rest."""
        chosen = []
        for owed, mean, batch in zip(self.owed, means, self.batches, strict=True):
            owed.add_(mean)
            chosen.append(largest(owed, batch.kept))
        packet, sent = self.format.write(self.replica, chosen, dense)
        for owed, (indices, _), values in zip(self.owed, chosen, sent, strict=True):
            owed.scatter_add_(1, indices, -values)
        sizes = [self.format.num_bytes(share) for share in range(self.replicas)]
        padded = packet.new_zeros(max(sizes))
        padded[: len(packet)] = packet
        packets = all_gather(padded, self.group).land()
        read = [self.format.read(share, packet) for share, packet in enumerate(packets)]

        def whole() -> Iterator[Tensor]:
            for i, batch in enumerate(self.batches):
                parts = [scattered(part[i], batch.height * batch.width) for part, _ in read]
                yield torch.cat(parts)

        return whole(), torch.cat([part for _, part in read])

    def _pending_updates(self) -> Iterator[dict[str, Tensor]]:
        yield {name: local(update) for name, update in self.pending.items()}

    @torch.no_grad()
    def _apply(self, updates: Iterator[dict[str, Tensor]], lr: float) -> None:
        """p <- p - lr (phi(update) + wd p) with what arrived."""
        wd, version, phi = self.settings.weight_decay, self.settings.version, self.settings.phi
        if phi == "muon":  # whose matrices meet in other batches
            every = {n: torch.zeros_like(local(d)) for n, d in self.delta.items() if not local(d).numel()}
            every |= {name: update for batch in updates for name, update in batch.items()}
            updates = iter([every | self.direction({n: every[n] for n in self.delta})])
        for batch in updates:
            for name, update in batch.items():
                if name in self.vectors:
                    self.set_gradient(name, update)
                    continue
                p = local(self.parameters[name].data)
                if name in self.decayed:
                    p.mul_(1 - lr * wd)
                step = update.sign() if phi == "sign" and name in self.delta else update
                # The learning rate is inside the momentum of version 1 and of what is not transformed.
                inside = name not in self.delta or (phi == "identity" and version == 1)
                p.sub_(step.view_as(p), alpha=1.0 if inside else lr)
        if self.vectors:
            self.dense.step(lr, wd)

    def describe(self) -> dict[str, str]:
        """`demo`, `top-k` (untransformed) or the dense optimizer's words."""
        kinds = {n: f"demo, {'' if n in self.decayed else 'not '}decayed" for n in self.transformed}
        kinds |= {n: f"top-k, {'' if n in self.decayed else 'not '}decayed" for n in self.residual.parameters}
        return kinds | (self.dense.describe() if self.vectors else {})

    @torch.no_grad()
    def state_dict(self, replica: int) -> dict[str, Tensor]:
        """Momenta of this replica, and what all share: the vectors' optimizer and, with a delay, the next update."""
        if self.flight is not None:  # completed: its updates do not depend on how many replicas read them
            for updates in self._arrived(self.flight):
                for name, update in updates.items():
                    local(self.pending[name]).copy_(update.view_as(local(self.pending[name])))
            self.flight = None
        own = {f"{n}.delta": t for n, t in self.delta.items()} | self.residual.state_dict()
        if self.owners:  # its shares are of this layout alone
            layout = f"{self.replicas}x{dist.get_world_size() // self.replicas}.rank{dist.get_rank()}"
            own |= {f"owed.{layout}.{i}": t for i, t in enumerate(self.owed) if t.numel()}
        state = {f"replica{replica}.optimizer.{n}": t for n, t in own.items()}
        if self.dense is not None:
            state |= {f"optimizer.{n}": t for n, t in self.dense.state().items()}
        state |= {f"optimizer.{n}.pending": t for n, t in self.pending.items()}
        return state | {"optimizer.updates": self.residual.updates}

    def to_load(self, replicas_before: int) -> dict[str, Tensor]:
        """Momenta belong to the replicas that were: they begin anew when their number changes."""
        if replicas_before == self.replicas:
            return self.state_dict(self.replica)
        state = self.state_dict(self.replica % replicas_before)
        return {n: t for n, t in state.items() if not n.endswith(".delta") and ".owed." not in n}

    def resized(self, replicas_before: int) -> str:
        """The sentence for the log."""
        return (
            f"{replicas_before} replicas became {self.replicas}: DeMo's momentum, which each replica has of its own, "
            "begins anew"
        )
