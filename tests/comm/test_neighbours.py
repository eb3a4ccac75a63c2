"""DiLoCo and random-k on gloo processes against a version of one process, float64 and plain, from the equations."""

import math
import runpy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from stepline.comm.diloco import INT8_CHUNK, DiLoCo, DiLoCoSettings
from stepline.comm.random_k import RandomK, RandomKSettings, random_places, splitmix

SGD = runpy.run_path(str(Path(__file__).with_name("plain_sgd.py")))["SGD"]
SHAPES = {"first": (40, 70), "second": (31, 90), "vector": (9,)}
LR, STEPS = 0.05, 8


def draw(step: int, replica: int, name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + 10 * replica + list(SHAPES).index(name))
    return torch.randn(SHAPES[name], generator=generator, dtype=torch.float64)


def run(method: str, settings: dict) -> list[dict[str, torch.Tensor]]:
    """The parameters of this rank after each step."""
    named = {name: nn.Parameter(draw(999, 0, name)) for name in SHAPES}
    if method == "diloco":
        sync = DiLoCo(named, dist.group.WORLD, DiLoCoSettings(weight_decay=0.1, **settings), SGD(named))
    else:
        vectors = {n: p for n, p in named.items() if p.ndim < 2}
        sync = RandomK(
            named, dist.group.WORLD, RandomKSettings(weight_decay=0.1, seed=7, **settings), decayed={"first"},
            dense=SGD(vectors), make_optimizer=SGD,
        )  # fmt: skip
    seen = []
    for step in range(STEPS):
        for name, parameter in named.items():
            parameter.grad = draw(step, dist.get_rank(), name)
        sync.step(LR)
        seen.append({n: p.detach().clone() for n, p in named.items()})
    return seen


def as_sent(d: torch.Tensor, codec: str) -> torch.Tensor:
    """What receivers read of a pseudo-gradient `[n]`; int8: round(d / s) s, with s of each run of values."""
    if codec == "bf16":
        return d.bfloat16()
    if codec == "fp32":
        return d
    parts = []
    for part in d.split(INT8_CHUNK):
        scale = (part.abs().max() / 127).bfloat16().double()
        parts.append((part / scale).round().clamp(-127, 127) * scale)
    return torch.cat(parts)


def naive_diloco(world: int, codec: str, every: int, fragments: list[list[str]]) -> list[list[dict]]:
    """After the last step what is not in turn takes the replicas' mean as it is."""
    mu, outer = 0.9, 0.7
    own = [{name: draw(999, 0, name) for name in SHAPES} for _ in range(world)]
    anchor, momentum = dict(own[0]), {name: torch.zeros(shape).double() for name, shape in SHAPES.items()}
    seen = []
    for step in range(1, STEPS + 1):
        for r, p in enumerate(own):
            for name in SHAPES:
                p[name] = p[name] - LR * (draw(step - 1, r, name) + 0.1 * p[name])
        for i, names in enumerate(fragments):
            turn = (step + i * every // len(fragments)) % every == 0
            if not turn and step != STEPS:
                continue
            flat = [torch.cat([(anchor[n] - p[n]).flatten() for n in names]) for p in own]
            total = as_sent(flat[0], codec)
            for other in flat[1:]:
                total = total + as_sent(other, codec)
            sizes = [anchor[n].numel() for n in names]
            for name, mean in zip(names, (total.double() / world).split(sizes), strict=True):
                d = mean.reshape(SHAPES[name])
                if turn:
                    momentum[name] = mu * momentum[name] + d
                anchor[name] = anchor[name] - (outer * (d + mu * momentum[name]) if turn else d)
                for p in own:
                    p[name] = anchor[name]
        seen.append([dict(p) for p in own])
    return seen


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("fragments", [1, 2])
@pytest.mark.parametrize("world", [2, 4])
def test_diloco_averages_how_far_replicas_came(pool, codec, fragments, world):
    settings = {"every": 4, "fragments": fragments, "codec": codec, "total_steps": STEPS}
    ranks = pool.run(world, run, "diloco", settings)
    parts = [list(SHAPES)] if fragments == 1 else [["first"], ["second", "vector"]]
    # Sums of four bf16 numbers in bf16 are rounded in their order: three times by 2^-9 of at most 2, a quarter of which
    # the outer step takes 1.33 times, twice in this run.
    tolerance = 1e-2 if codec == "bf16" and world > 2 else 1e-12
    for step, expected in enumerate(naive_diloco(world, codec, 4, parts)):
        for rank, p in zip(ranks, expected, strict=True):
            for name in SHAPES:
                torch.testing.assert_close(rank[step][name], p[name], rtol=0, atol=tolerance)
    assert all(torch.equal(ranks[0][-1][name], other[-1][name]) for other in ranks for name in SHAPES)


@pytest.mark.parametrize("key", [1234567, -1, 2**63 - 1, hash((7, 3, 0))])
def test_places_are_drawn_by_splitmix64(key):
    """Against whole numbers in Python; the first outputs of 1234567 are those that its authors' C code gives."""

    def output(n: int) -> int:
        z = (key + (n + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    if key == 1234567:
        assert [output(n) for n in range(3)] == [
            6457827717110365317,
            3203168211198807973,
            9817491932198370423,
        ]
    counters = torch.arange(1000)
    assert [z % 2**64 for z in splitmix(key, counters).tolist()] == [output(n) for n in range(1000)]
    assert counters.tolist() == list(range(1000))
    wanted = [10 * n + (output(n) >> 32) * 10 // 2**32 for n in range(100)]
    for numel in (991, 995, 999, 1000):
        assert random_places(numel, 0.1, key).tolist() == [p for p in wanted if p < numel]
    assert random_places(0, 0.1, key).tolist() == []


def resize(before: int) -> dict[str, dict[str, torch.Tensor]]:
    """Parameters and anchor of a replica that loads the state of `before` others."""
    named = {name: nn.Parameter(draw(999, 0, name)) for name in SHAPES}
    sync = DiLoCo(named, dist.group.WORLD, DiLoCoSettings(), SGD(named))
    saved = {f"replica{r}.local.{name}": draw(5, r, name) for r in range(before) for name in SHAPES}

    def load(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            tensor.copy_(saved[name])

    assert f"{before} replicas became 2" in sync.resized(before, load)
    return {"p": {n: p.detach() for n, p in named.items()}, "anchor": sync.shared_parameters()}


@pytest.mark.parametrize("before", [1, 3, 4])
def test_diloco_on_another_number_of_replicas_begins_at_their_mean(pool, before):
    for rank in pool.run(2, resize, before):
        for name in SHAPES:
            mean = torch.stack([draw(5, r, name) for r in range(before)]).mean(0)
            torch.testing.assert_close(rank["p"][name], mean, rtol=0, atol=1e-14)
            assert torch.equal(rank["anchor"][name], rank["p"][name])


def test_every_value_is_as_likely_to_be_sent():
    """Those of a last, shorter run too."""
    numel, draws = 19, 4000
    seen = torch.zeros(numel)
    for key in range(draws):
        places = random_places(numel, 1 / 8, key)
        assert (places // 8).tolist() == list(range(len(places)))
        seen[places] += 1
    assert ((seen / draws - 1 / 8).abs() < 5 * math.sqrt(1 / 8 * 7 / 8 / draws)).all()


@pytest.mark.parametrize("bf16", [False, True])
def test_what_random_k_rounds_off_waits_on(bf16):
    """delta_after + sent = beta delta + update, to the bit of what is sent."""
    parameter = torch.nn.Parameter(torch.zeros(4, 16, dtype=torch.float64))
    sync = RandomK(
        {"w": parameter}, None, RandomKSettings(density=1 / 8, beta=0.5, bf16=bf16), make_optimizer=SGD
    )
    (delta,) = sync.waiting.local().values()
    for step in range(3):
        before, p = delta.clone(), parameter.detach().clone()
        parameter.grad = draw(step, 0, "first").flatten()[:64].view(4, 16)
        sync.step(LR)
        sent = parameter.detach() - p
        assert (sent != 0).sum() == 8
        torch.testing.assert_close(
            delta.view(4, 16) + sent, 0.5 * before.view(4, 16) - LR * parameter.grad, rtol=0, atol=1e-15
        )
        kept = delta.view(4, 16)[sent != 0]
        assert (kept != 0).any() == bf16


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("world", [2, 4])
def test_random_k_sends_random_places_of_what_waits(pool, world, bf16):
    density, beta = 1 / 8, 0.9
    ranks = pool.run(world, run, "random_k", {"density": density, "beta": beta, "bf16": bf16})
    p = {name: draw(999, 0, name) for name in SHAPES}
    delta = [
        {name: torch.zeros(shape).double().flatten() for name, shape in SHAPES.items()} for _ in range(world)
    ]
    rounded = (lambda t: t.bfloat16()) if bf16 else (lambda t: t)
    for step in range(STEPS):
        for i, name in enumerate(("first", "second")):
            places = random_places(p[name].numel(), density, hash((7, step + 1, i)))
            assert (
                len(set(places.tolist())) == len(places) in (p[name].numel() // 8, -(-p[name].numel() // 8))
            )
            sent = []
            for r in range(world):
                delta[r][name] = beta * delta[r][name] - LR * draw(step, r, name).flatten()
                sent.append(rounded(delta[r][name][places]))
                delta[r][name][places] -= sent[-1].double()
            if name == "first":
                p[name] = p[name] * (1 - LR * 0.1)
            flat = p[name].flatten().clone()
            flat[places] += sum(s.double() for s in sent) / world
            p[name] = flat.reshape(SHAPES[name])
        mean = sum(rounded(draw(step, r, "vector")).double() for r in range(world)) / world
        p["vector"] = p["vector"] - LR * (mean + 0.1 * p["vector"])
        for rank in ranks:
            for name in SHAPES:
                # Sums of bf16 numbers in bf16 are rounded in their order.
                tolerance = 2e-2 * world * LR if bf16 else 1e-12
                torch.testing.assert_close(rank[step][name], p[name], rtol=0, atol=tolerance)
    assert all(torch.equal(ranks[0][-1][name], other[-1][name]) for other in ranks for name in SHAPES)
