"""DeMo on gloo processes: nothing is lost, and replicas stay alike. Its numbers: test_demo_equations.py."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from stepline.comm.demo import DeMo, DeMoSettings
from stepline.trainer.optim.build import AdamW, Optimizer

SHAPES = {"square": (8, 12), "odd": (7, 10), "prime": (13, 5), "vector": (9,)}
LR = 0.01


def gradient(step: int, replica: int, name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + 10 * replica + list(SHAPES).index(name))
    return torch.randn(SHAPES[name], generator=generator, dtype=torch.float64)


def start(name: str) -> torch.Tensor:
    return gradient(999, 0, name)


def parameters() -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(start(name)) for name in SHAPES}


class Listening(DeMo):
    """Keeps the packets that it sends."""

    def _encode(self, lr):
        sent, self.packets = super()._encode(lr)
        return sent, self.packets


def waiting_adamw(parameters: dict[str, nn.Parameter]) -> Optimizer:
    return Optimizer(AdamW(parameters, set()), None)


def conservation(codec: str, owner_reduce_above: int, accumulate: str) -> float:
    """The largest |delta_after + own decoded - delta before what was sent left it| over some steps.

    Of gradients: beta delta + lr g; of updates: beta delta + AdamW's update, by an AdamW of its own.
    """
    named = parameters()
    alone = {n: nn.Parameter(torch.zeros_like(p)) for n, p in named.items()}
    adamw, dense = AdamW(alone, set()), AdamW({"vector": named["vector"]}, set())
    settings = DeMoSettings(
        chunk=4, density=0.2, codec=codec, owner_reduce_above=owner_reduce_above, accumulate=accumulate
    )
    sync = Listening(
        named, dist.group.WORLD, settings, untransformed={"prime"}, dense=dense, make_optimizer=waiting_adamw
    )
    worst = 0.0
    for step in range(4):
        for name, parameter in named.items():
            parameter.grad = gradient(step, dist.get_rank(), name)
            alone[name].grad = parameter.grad.clone()
        gradients = {n: p.grad.clone() for n, p in named.items()}
        moved = {n: p.detach().clone() for n, p in alone.items()}
        adamw.step(LR, 0.0)
        updates = {n: p.detach() - moved[n] for n, p in alone.items()}
        before = {n: d.clone() for n, d in (sync.momentum | sync.waiting.local()).items()}
        sync.step(LR)
        after = sync.momentum | sync.waiting.local()
        shares = [sync.form.read(share, packet)[0] for share, packet in enumerate(sync.packets)]
        for i, batch in enumerate(sync.batches):
            indices = torch.cat([share[i][0] for share in shares])
            values = torch.cat([share[i][1] for share in shares])
            own = torch.zeros(batch.chunks, batch.elements, dtype=torch.float64).scatter_(1, indices, values)
            own = own.view(-1, batch.height, batch.width)
            if batch.transformed:
                own = sync.chunks.basis[batch.height] @ own @ sync.chunks.basis[batch.width].T
            for name, decoded in batch.join(own).items():
                added = LR * gradients[name] if name in sync.momentum else updates[name]
                expected = settings.beta * before[name] + added
                worst = max(worst, float((after[name] + decoded.view_as(added) - expected).abs().max()))
    return worst


@pytest.mark.parametrize("codec", ["fp32", "int8", "sign"])
@pytest.mark.parametrize("owner_reduce_above", [8, 1])
@pytest.mark.parametrize("accumulate", ["updates", "gradients"])
def test_nothing_is_lost_between_what_waits_and_the_packet(pool, codec, owner_reduce_above, accumulate):
    assert max(pool.run(3, conservation, codec, owner_reduce_above, accumulate)) < 1e-14


def replicas_alike(settings: dict, steps: int) -> list:
    named = parameters()
    sync = DeMo(
        named, dist.group.WORLD, DeMoSettings(chunk=4, density=0.1, **settings),
        untransformed={"prime"}, dense=waiting_adamw({"vector": named["vector"]}), make_optimizer=waiting_adamw,
    )  # fmt: skip
    assert sorted(sync.describe()) == sorted(named)  # every parameter is updated by exactly one
    sizes = []
    for step in range(steps):
        for name, parameter in named.items():
            parameter.grad = gradient(step, dist.get_rank(), name)
        result = sync.step(LR)
        sizes.append((result.bytes_sent, result.bytes_received))
    assert sync.first_difference() is None
    shared = sync.shared_parameters()
    if dist.get_rank() == 1:
        shared["odd"][3, 3] += 1e-10
        shared["odd"][3, 4] -= 1e-10
    moved = {n: (p - start(n)).abs().max().item() for n, p in shared.items()}
    return [moved, sizes, sync.first_difference()]


@pytest.mark.parametrize("delay", [0, 1])
@pytest.mark.parametrize("owner_reduce_above", [8, 1])
def test_replicas_stay_bit_identical_and_a_difference_is_named(pool, delay, owner_reduce_above):
    for moved, _, difference in pool.run(
        4, replicas_alike, {"delay": delay, "ahead": bool(delay), "owner_reduce_above": owner_reduce_above}, 5
    ):
        assert difference == "odd"
        assert all(value > LR for value in moved.values()), moved
