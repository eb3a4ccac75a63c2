"""DeMo on gloo processes against a version of one process, float64 and plain loops, written from the equations."""

import math

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
        self.packets = super()._encode(lr)
        return self.packets


def waiting_adamw(parameters: dict[str, nn.Parameter]) -> Optimizer:
    return Optimizer(AdamW(parameters, set()), None)


def run(settings: dict, steps: int, weight_decay: float) -> list:
    """By step: parameters, momenta, and the indices and values that this rank sent for each batch."""
    named = parameters()
    adamw = AdamW({n: p for n, p in named.items() if p.ndim < 2}, set())
    sync = Listening(
        named, dist.group.WORLD, DeMoSettings(weight_decay=weight_decay, **settings),
        decayed=set(named), dense=None if settings.get("faithful") else adamw, make_optimizer=waiting_adamw,
    )  # fmt: skip
    seen = []
    for step in range(steps):
        for name, parameter in named.items():
            parameter.grad = gradient(step, dist.get_rank(), name)
        sync.step(LR)
        chosen, _ = sync.form.read(0, sync.packets[0])
        batches = [
            {part.name: (i[part.span], v[part.span]) for part in batch.parts}
            for batch, (i, v) in zip(sync.batches, chosen, strict=True)
        ]
        sent = {name: value for batch in batches for name, value in batch.items()}
        seen.append(
            (
                {n: p.detach().clone() for n, p in named.items()},
                {n: d.clone() for n, d in sync.momentum.items()},
                sent,
            )
        )
    return seen


def divisor(size: int, limit: int) -> int:
    return max(d for d in range(1, limit + 1) if size % d == 0)


def coefficient(size: int, n: int, k: int) -> float:
    scale = math.sqrt((1 if k == 0 else 2) / size)
    return scale * math.cos(math.pi * (2 * n + 1) * k / (2 * size))


def naive_chunks(matrix: list[list[float]], h: int, w: int):
    for top in range(0, len(matrix), h):
        for left in range(0, len(matrix[0]), w):
            yield top, left, [row[left : left + w] for row in matrix[top : top + h]]


def naive_dct(x: list[list[float]]) -> list[float]:
    h, w = len(x), len(x[0])
    return [
        sum(coefficient(h, n, k) * x[n][m] * coefficient(w, m, j) for n in range(h) for m in range(w))
        for k in range(h)
        for j in range(w)
    ]


def naive_inverse(y: list[float], h: int, w: int) -> list[list[float]]:
    return [
        [
            sum(
                coefficient(h, n, k) * y[k * w + j] * coefficient(w, m, j) for k in range(h) for j in range(w)
            )
            for m in range(w)
        ]
        for n in range(h)
    ]


def naive(
    world: int, steps: int, *, chunk: int, kept: int, beta: float, weight_decay: float, version=1, alpha=1.0
):
    """The published algorithm for every tensor: a list by step of (parameters, momenta by replica, sent by replica)."""
    p = {name: start(name).reshape(1, -1) if len(s) == 1 else start(name) for name, s in SHAPES.items()}
    delta = [{name: torch.zeros_like(t) for name, t in p.items()} for _ in range(world)]
    seen = []
    for step in range(steps):
        sent: list[dict] = [{} for _ in range(world)]
        for name, parameter in p.items():
            rows, cols = parameter.shape
            h, w = divisor(rows, chunk), divisor(cols, chunk)
            k = min(kept, h * w)
            update = torch.zeros_like(parameter)
            contributions: dict[tuple, list[float]] = {}
            for r in range(world):
                g = gradient(step, r, name).reshape(rows, cols)
                d = beta * delta[r][name] + (LR if version == 1 else 1 - beta) * g
                sent[r][name] = []
                for top, left, x in naive_chunks(d.tolist(), h, w):
                    y = naive_dct(x)
                    top_k = sorted(range(len(y)), key=lambda i, y=y: -abs(y[i]))[:k]
                    sent[r][name].append({i: y[i] for i in top_k})
                    own = naive_inverse([y[i] if i in top_k else 0.0 for i in range(len(y))], h, w)
                    d[top : top + h, left : left + w] -= alpha * torch.tensor(own, dtype=torch.float64)
                    for i in top_k:
                        contributions.setdefault((top, left, i), []).append(y[i])
                delta[r][name] = d
            for top, left, _ in naive_chunks(parameter.tolist(), h, w):
                y = [0.0] * (h * w)
                for i in range(h * w):
                    values = contributions.get((top, left, i), [])
                    if values:
                        y[i] = sum(values) / len(values)
                update[top : top + h, left : left + w] = torch.tensor(
                    naive_inverse(y, h, w), dtype=torch.float64
                )
            p[name] = parameter * (1 - LR * weight_decay) - LR * update.sign()
        seen.append(({n: t.clone() for n, t in p.items()}, [dict(d) for d in delta], sent))
    return seen


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("version", [1, 2])
def test_faithful_is_the_published_algorithm(pool, world, version):
    options = {"chunk": 5, "kept": 3, "beta": 0.9, "version": version, "alpha": 0.2 if version == 2 else 1.0}
    expected = naive(world, 4, weight_decay=0.1, **options)
    ranks = pool.run(world, run, {"faithful": True, "codec": "fp32", **options}, 4, 0.1)
    for rank, seen in enumerate(ranks):
        for (p, delta, sent), (p_ref, delta_ref, sent_ref) in zip(seen, expected, strict=True):
            for name in SHAPES:
                indices, values = sent[name]
                for chunk, reference in enumerate(sent_ref[rank][name]):
                    assert set(indices[chunk].tolist()) == set(reference)  # identical indices
                    for i, v in zip(indices[chunk].tolist(), values[chunk].tolist(), strict=True):
                        assert v == pytest.approx(reference[i], abs=1e-12)
                assert (delta[name].reshape(-1) - delta_ref[rank][name].reshape(-1)).abs().max() < 1e-12
                assert (p[name].reshape(-1) - p_ref[name].reshape(-1)).abs().max() < 1e-12


def test_every_coefficient_kept_is_sign_sgd_of_the_mean_gradient(pool):
    """The momentum empties each step: no sign-momentum (facts of the algorithm)."""
    for p, delta, _ in pool.run(2, run, {"faithful": True, "codec": "fp32", "kept": 64, "chunk": 8}, 1, 0.0)[
        0
    ]:
        for name in SHAPES:
            mean = (gradient(0, 0, name) + gradient(0, 1, name)) / 2
            assert delta[name].abs().max() < 1e-15
            assert (p[name] - (start(name) - LR * mean.sign())).abs().max() < 1e-12


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
    if dist.get_rank() == 1:
        named["odd"].data[3, 3] += 1e-10
        named["odd"].data[3, 4] -= 1e-10
    moved = {n: (p.detach() - start(n)).abs().max().item() for n, p in named.items()}
    return [moved, sizes, sync.first_difference()]


@pytest.mark.parametrize("delay", [0, 1])
@pytest.mark.parametrize("owner_reduce_above", [8, 1])
def test_replicas_stay_bit_identical_and_a_difference_is_named(pool, delay, owner_reduce_above):
    for moved, _, difference in pool.run(
        4, replicas_alike, {"delay": delay, "owner_reduce_above": owner_reduce_above}, 5
    ):
        assert difference == "odd"
        assert all(value > LR for value in moved.values()), moved
