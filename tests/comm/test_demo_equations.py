"""DeMo on gloo processes against a version of one process, float64 and plain loops, written from the equations."""

import runpy
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

from stepline.comm.demo import DeMo, DeMoSettings
from stepline.comm.fsdp import local
from stepline.comm.mesh import build_mesh
from stepline.trainer.optim.muon import Orthogonalizer

naive = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("naive_demo.py"))))
SGD = runpy.run_path(str(Path(__file__).with_name("plain_sgd.py")))["SGD"]
SHAPES, DECAYED, STEPS, DECAY = naive.SHAPES, naive.DECAYED, naive.STEPS, naive.DECAY
draw, rate, start, Reference = naive.draw, naive.rate, naive.start, naive.Reference


class Listening(DeMo):
    """Keeps the packets that it sends, and the indices that it receives from owners, by parameter."""

    def _encode(self, lr):
        sent, self.packets = super()._encode(lr)
        return sent, self.packets

    def listen(self) -> list[dict[str, list]]:
        receive, landed = self.exchange.receive, []

        def heard(flight):
            arrived, dense = receive(flight)
            chosen = zip(self.batches, arrived, strict=True)
            landed.append({p.name: i[0][p.span].tolist() for batch, (i, _) in chosen for p in batch.parts})
            return arrived, dense

        self.exchange.receive = heard
        return landed

    def sent(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Indices and values by parameter."""
        shares = [self.form.read(share, packet)[0] for share, packet in enumerate(self.packets)]
        found = {}
        for batch, parts in zip(self.batches, zip(*shares, strict=True), strict=True):
            indices, values = (torch.cat(whole) for whole in zip(*parts, strict=True))
            found |= {part.name: (indices[part.span], values[part.span]) for part in batch.parts}
        return found


def run(shard: int, settings: dict) -> tuple[list, list, dict]:
    """By step: shared parameters, what waits, what was sent, own parameters; the indices of all that landed; what is
    still to be applied.

    All of this rank alone.
    """
    mesh = build_mesh(torch.device("cpu"), dist.get_world_size(), shard)
    replicas, replica = mesh["replicate"].size(), mesh["replicate"].get_local_rank()

    def placed(t):
        return distribute_tensor(t, mesh["shard"], [Shard(0)], src_data_rank=None) if shard > 1 else t

    named = {name: nn.Parameter(placed(start(name))) for name in SHAPES}
    orthogonal = Orthogonalizer({n: p for n, p in named.items() if p.ndim > 1 and n != "rows"})
    sync = Listening(
        named, mesh["replicate"].get_group() if replicas > 1 else None, DeMoSettings(weight_decay=DECAY, **settings),
        decayed=DECAYED, untransformed={"rows"}, make_optimizer=SGD,
        dense=None if settings.get("faithful") else SGD({"vector": named["vector"]}),
        direction=lambda momenta: dict(orthogonal.updates(momenta.__getitem__)),
    )  # fmt: skip
    landed, seen = sync.listen(), []
    for step in range(STEPS):
        for name, parameter in named.items():
            parameter.grad = placed(draw(step, replica, name))
        sync.midway()
        sync.step(rate(step))
        waiting = {n: local(t) for n, t in sync.momentum.items()} | sync.waiting.local()
        shared, own = (
            {n: local(t).clone() for n, t in tensors.items()}
            for tensors in (sync.shared_parameters(), {n: p.data for n, p in named.items()})
        )
        seen.append((shared, {n: t.clone() for n, t in waiting.items()}, sync.sent(), own))
    sync.state_dict(0)  # with a delay, what is under way lands
    return seen, landed, {n: local(t) for n, t in sync.pending.items()}


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def compare(ranks: list, replicas: int, shard: int, settings: dict) -> None:
    for i in range(shard):

        def rows(t, i=i):
            size = -(-len(t) // shard)
            return t[i * size : (i + 1) * size]

        reference, mine = Reference(replicas, settings, rows), ranks[i::shard]
        for step in range(STEPS):
            reference.step(step, mine[0][1][step])
            for replica, (seen, _, _) in enumerate(mine):
                p, delta, sent, own = seen[step]
                for name in SHAPES:
                    close(p[name], reference.p[name])
                    ahead = settings.get("ahead") and name != "vector"
                    close(own[name], reference.p[name] + (reference.ahead[replica][name] if ahead else 0))
                for name, waits in delta.items():
                    close(waits, reference.delta[replica][name])
                    expected = reference.sent[replica][name]
                    assert (name in sent) == bool(expected)
                    for indices, values, own in zip(*sent.get(name, ((), ())), expected, strict=True):
                        assert set(indices.tolist()) == set(own)  # identical indices
                        for place, value in zip(indices.tolist(), values.tolist(), strict=True):
                            assert value == pytest.approx(own[place], rel=0, abs=1e-12)
        for _, _, pending in mine:
            for name, update in pending.items():
                close(update, reference.late[0][name])


OWNERS = {"owner_reduce_above": 1}
AHEAD = {"delay": 1, "ahead": True}
V1 = {"accumulate": "gradients", "version": 1}
V2 = {"accumulate": "gradients", "version": 2, "alpha": 0.2}
FAITHFUL = {"faithful": True, "codec": "fp32", "kept": 3, "chunk": 5}
CASES = {
    "updates": {"codec": "fp32"},
    "updates, int8, late": {"codec": "int8", **AHEAD},
    "updates, fp32, late, not ahead": {"codec": "fp32", "delay": 1},
    "updates, sign": {"codec": "sign"},
    "updates, owners": {"codec": "fp32", **OWNERS},
    "updates, sign, owners, late": {"codec": "sign", **OWNERS, **AHEAD},
    "identity": {**V1, "phi": "identity", "codec": "fp32"},
    "identity, sign, owners": {**V1, "phi": "identity", "codec": "sign", **OWNERS},
    "identity 2, int8, late": {**V2, "phi": "identity", "codec": "int8", "delay": 1},
    "identity 2, int8, owners, late": {**V2, "phi": "identity", "codec": "int8", **OWNERS, "delay": 1},
    "signs, int8": {**V1, "phi": "sign", "codec": "int8"},
    "signs 2, fp32, late": {**V2, "phi": "sign", "codec": "fp32", "delay": 1},
    "muon": {**V1, "phi": "muon", "codec": "fp32"},
    "muon 2, sign, late": {**V2, "phi": "muon", "codec": "sign", "delay": 1},
    "muon 2, int8, owners": {**V2, "phi": "muon", "codec": "int8", **OWNERS},
    "faithful": {**FAITHFUL, "phi": "sign"},
    "faithful 2": {**FAITHFUL, "phi": "sign", "version": 2, "alpha": 0.2},
    "faithful identity": {**FAITHFUL, "phi": "identity"},
    "faithful identity 2, late": {**FAITHFUL, "phi": "identity", "version": 2, "alpha": 0.2, "delay": 1},
}


def settings_of(case: str) -> dict:
    return {"chunk": 4, "density": 0.25, "beta": 0.9} | CASES[case]


@pytest.mark.parametrize("replicas", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_replicas_move_by_the_equations(pool, case, replicas):
    compare(pool.run(replicas, run, 1, settings_of(case)), replicas, 1, settings_of(case))


@pytest.mark.parametrize(("replicas", "shard"), [(1, 4), (2, 2)])
@pytest.mark.parametrize(
    "case",
    [
        "updates, int8, late",
        "updates, sign, owners, late",
        "identity 2, int8, owners, late",
        "faithful identity",
    ],
)
def test_each_shard_moves_by_the_equations_the_empty_ones_too(pool, case, replicas, shard):
    """Of `one` and the stack some ranks hold nothing."""
    compare(pool.run(replicas * shard, run, shard, settings_of(case)), replicas, shard, settings_of(case))


def test_matrices_whose_rows_some_ranks_lack_are_orthogonalised_whole(pool):
    """All coefficients are kept, so that it does not matter where chunks are cut."""
    settings = settings_of("muon") | V2 | {"density": 1.0, "delay": 1}
    ranks, reference = pool.run(4, run, 4, settings), Reference(1, settings)
    for step in range(STEPS):
        reference.step(step, {})
        for name in SHAPES:
            close(torch.cat([seen[step][0][name] for seen, _, _ in ranks]), reference.p[name])


@pytest.mark.parametrize("replicas", [2, 4])
def test_every_coefficient_kept_is_sign_sgd_of_the_mean_gradient(pool, replicas):
    """The momentum empties each step: no sign-momentum (facts of the algorithm)."""
    ranks = pool.run(replicas, run, 1, {"faithful": True, "codec": "fp32", "kept": 64, "chunk": 8})
    expected = {name: start(name) for name in SHAPES}
    for step in range(STEPS):
        for name, p in expected.items():
            mean = sum(draw(step, r, name) for r in range(replicas)) / replicas
            decay = rate(step) * DECAY if name in DECAYED else 0.0
            expected[name] = (1 - decay) * p - rate(step) * mean.sign()
            for seen, _, _ in ranks:
                close(seen[step][0][name], expected[name])
                assert seen[step][1][name].abs().max() < 1e-15


def owed_names(cut: tuple[int, int]) -> list[str]:
    with mock.patch("stepline.comm.demo.shard_slice", lambda p: (tuple(p.shape), cut)):
        named = {"w": nn.Parameter(torch.zeros(8, 8, dtype=torch.float64))}
        settings = DeMoSettings(chunk=4, owner_reduce_above=1)
        sync = DeMo(named, dist.group.WORLD, settings, make_optimizer=SGD)
    return list(sync.exchange.state_dict())


def test_what_is_owed_belongs_to_the_values_that_a_rank_holds(pool):
    """Other experts may have the same shapes at the same rank, once they are dealt in another way."""
    first, again, other = (pool.run(2, owed_names, cut) for cut in ((0, 0), (0, 0), (8, 0)))
    assert first == again
    assert all(mine and not set(mine) & set(theirs) for mine, theirs in zip(first, other, strict=True))
