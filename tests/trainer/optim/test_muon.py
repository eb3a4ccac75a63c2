"""Muon: a naive float64 reference, torch.optim.Muon, and every sharding against one process."""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from stepline.trainer.optim import muon as muon_module
from stepline.trainer.optim.muon import Muon, newton_schulz, shard_rows

# Rows that divide by no number of ranks, fewer rows than ranks, counts that do not divide, tall and wide.
SHAPES = ((10, 6), (6, 10), (10, 6), (7, 5), (3, 8), (10, 6), (1, 4), (9, 9), (10, 6), (7, 5), (10, 6))
LR, DECAY, STEPS = 0.02, 0.1, 4


def value(kind, index, shape):
    return np.random.default_rng([kind, index]).standard_normal(shape)


def reference(index, shape, momentum, nesterov, ns_steps=5):
    """The update rule, one matrix at a time, in numpy's float64."""
    weight, buffer = value(0, index, shape), np.zeros(shape)
    for step in range(STEPS):
        grad = value(step + 1, index, shape)
        buffer = momentum * buffer + (1 - momentum) * grad
        x = (1 - momentum) * grad + momentum * buffer if nesterov else buffer
        x = x / np.linalg.norm(x)
        for _ in range(ns_steps):
            gram = x @ x.T
            x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
        weight = weight - LR * DECAY * weight - LR * 0.2 * np.sqrt(max(shape)) * x
    return weight, buffer


def run(wrap, dtype, momentum=0.95, nesterov=True):
    params = {
        f"m{i}": nn.Parameter(wrap(torch.from_numpy(value(0, i, s)).to(dtype))) for i, s in enumerate(SHAPES)
    }
    optimizer = Muon(params, momentum=momentum, nesterov=nesterov)
    for step in range(STEPS):
        for i, (p, shape) in enumerate(zip(params.values(), SHAPES, strict=True)):
            p.grad = wrap(torch.from_numpy(value(step + 1, i, shape)).to(dtype))
        optimizer.step(LR, DECAY)
    tensors = params | optimizer.state()
    return {k: (t.full_tensor() if isinstance(t, DTensor) else t).detach() for k, t in tensors.items()}


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.95, True), (0.9, False), (0.3, True)])
def test_equals_the_formula(momentum, nesterov):
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 2e-5)):
        got = run(lambda t: t.clone(), dtype, momentum, nesterov)
        for i, shape in enumerate(SHAPES):
            weight, buffer = reference(i, shape, momentum, nesterov)
            np.testing.assert_allclose(got[f"m{i}"].numpy(), weight, rtol=0, atol=tolerance)
            np.testing.assert_allclose(got[f"m{i}.momentum"].numpy(), buffer, rtol=0, atol=tolerance)


def test_agrees_with_torch_optim_muon():
    """Loosely: torch's Newton-Schulz runs in bf16."""
    params = [nn.Parameter(torch.from_numpy(value(0, i, s)).float()) for i, s in enumerate(SHAPES)]
    starts = [p.detach().clone() for p in params]
    theirs = torch.optim.Muon(params, lr=LR, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")
    for step in range(STEPS):
        for i, (p, shape) in enumerate(zip(params, SHAPES, strict=True)):
            p.grad = torch.from_numpy(value(step + 1, i, shape)).float()
        theirs.step()
    ours = run(lambda t: t.clone(), torch.float32)
    for i, (p, start) in enumerate(zip(params, starts, strict=True)):
        moved = (p.detach() - start).norm()
        assert (ours[f"m{i}"] - p).norm() < 0.03 * moved


def test_orthogonalises():
    """Singular vectors stay, singular values come near 1 (the quintic's band is about 0.7 to 1.2)."""
    matrices = torch.from_numpy(value(0, 0, (3, 40, 24)))
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    inner = u.mT @ newton_schulz(matrices, steps=5) @ vh.mT
    diagonal = inner.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(inner, torch.diag_embed(diagonal), rtol=0, atol=1e-12)
    assert (s / s.amax(-1, keepdim=True)).min() > 0.05
    assert diagonal.min() > 0.65
    assert diagonal.max() < 1.25
    assert torch.equal(newton_schulz(torch.zeros(1, 3, 4)), torch.zeros(1, 3, 4))


def test_the_update_has_the_rms_of_adamw():
    for shape in ((64, 64), (48, 192), (192, 48)):
        weight = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        weight.grad = torch.from_numpy(value(0, 1, shape))
        Muon({"w": weight}).step(lr=1.0, weight_decay=0.0)
        assert weight.detach().square().mean().sqrt().item() == pytest.approx(0.2, rel=0.25)


@given(rows=st.integers(1, 40), ranks=st.integers(1, 9))
def test_shard_rows_are_those_of_torch_chunk(rows, ranks):
    chunks = [len(c) for c in torch.zeros(rows).chunk(ranks)]
    assert shard_rows(rows, ranks) == chunks + [0] * (ranks - len(chunks))


@given(
    shapes=st.lists(st.tuples(st.integers(1, 64), st.integers(1, 64)), min_size=1, max_size=40),
    ranks=st.integers(1, 8),
)
def test_the_work_is_dealt_evenly(shapes, ranks):
    cost = np.array([r * c * min(r, c) for r, c in shapes])
    load = np.bincount(muon_module._deal(shapes, ranks), weights=cost, minlength=ranks)
    assert load.max() - load.min() <= cost.max()


def sharded_job(mesh_shape, placements, dtype, bucket_elements):
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicate", "shard")[-len(mesh_shape) :])
    with mock.patch.object(muon_module, "BUCKET_ELEMENTS", bucket_elements):
        first = run(lambda t: distribute_tensor(t, mesh, placements), dtype)
        again = run(lambda t: distribute_tensor(t, mesh, placements), dtype)
    assert all(torch.equal(t, again[k]) for k, t in first.items())
    return first


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_sharding_equals_one_process(pool, dtype):
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    expected = run(lambda t: t.clone(), dtype)
    layouts = [
        ((2,), (Shard(0),), 1 << 28),
        ((4,), (Shard(0),), 1 << 28),
        ((4,), (Shard(0),), 30),  # several buckets
        ((2, 2), (Replicate(), Shard(0)), 1 << 28),
        ((2,), (Replicate(),), 1 << 28),
    ]
    for mesh_shape, placements, bucket_elements in layouts:
        ranks = pool.run(
            int(np.prod(mesh_shape)), sharded_job, mesh_shape, placements, dtype, bucket_elements
        )
        for got in ranks:
            assert got.keys() == expected.keys()
            for key, tensor in expected.items():
                torch.testing.assert_close(got[key], tensor, rtol=0, atol=tolerance)
            assert all(torch.equal(t, ranks[0][key]) for key, t in got.items())


def columns_job():
    mesh = init_device_mesh("cpu", (2,))
    weight = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(1)]))
    with pytest.raises(ValueError, match="Muon needs w sharded by rows"):
        Muon({"w": weight})


def test_refusals(pool):
    pool.run(2, columns_job)
    with pytest.raises(ValueError, match=r"Muon updates matrices; w has shape \(3,\)"):
        Muon({"w": nn.Parameter(torch.ones(3))})
    with pytest.raises(RuntimeError, match="parameter w has no gradient"):
        Muon({"w": nn.Parameter(torch.ones(3, 3))}).step(0.1, 0.1)
