"""AdamW and the split of the parameters: float64 formulas, torch.optim, shards, skipping, resuming."""

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from stepline.trainer.errors import UserError
from stepline.trainer.optim.build import build_optimizer

LRS = (0.01, 0.02, 0.005)


class Toy(nn.Module):
    def __init__(self, tied=False, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6, dtype=dtype)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"w": nn.Linear(6, 10, dtype=dtype), "norm": nn.RMSNorm(6, dtype=dtype)})
            for _ in range(2)
        )
        self.small = nn.Linear(6, 3, bias=False, dtype=dtype)  # fewer rows than four ranks
        self.head = nn.Linear(6, 11, bias=False, dtype=dtype)
        if tied:
            self.head.weight = self.embed.weight


def gradient(name, shape, step):
    seed = sum(name.encode()) * 1000 + step
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(tuple(shape)))


def set_gradients(model, step):
    for name, p in model.named_parameters():
        grad = gradient(name, p.shape, step).to(p.dtype)
        p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if isinstance(p, DTensor) else grad


def full(tensors):
    return {
        k: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for k, t in tensors.items()
    }


def snapshot(model, optimizer):
    return full(dict(model.named_parameters()) | optimizer.state())


def train(model, optimizer, skips=(0, 0, 0), first=0):
    for step, (lr, skip) in enumerate(zip(LRS, skips, strict=True), first):
        set_gradients(model, step)
        optimizer.step(lr, 0.1, torch.tensor(float(skip)))
    return snapshot(model, optimizer)


def test_equals_the_formula_in_float64():
    model = Toy(dtype=torch.float64)
    start = full(dict(model.named_parameters()))
    optimizer = build_optimizer(dict(model.named_parameters()), beta1=0.8, beta2=0.9, eps=1e-6)
    end = train(model, optimizer)
    for name, p in start.items():
        p, m, v = p.numpy(), 0.0, 0.0
        decay = 0.1 if name.endswith(("w.weight", "small.weight", "head.weight")) else 0.0
        for t, lr in enumerate(LRS, 1):
            g = gradient(name, p.shape, t - 1).numpy()
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
            p = p * (1 - lr * decay)
            p = p - lr * (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + 1e-6)
        np.testing.assert_allclose(end[name].numpy(), p, rtol=0, atol=1e-13)
        np.testing.assert_allclose(end[f"{name}.exp_avg"].numpy(), m, rtol=0, atol=1e-13)
        assert end[f"{name}.step"].item() == 3


def test_equals_torch_adamw_bitwise():
    model, other = Toy(), Toy()
    optimizer = build_optimizer(dict(model.named_parameters()))
    plain = [p for n, p in other.named_parameters() if p.ndim < 2 or n == "embed.weight"]
    decayed = [p for n, p in other.named_parameters() if not (p.ndim < 2 or n == "embed.weight")]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    train(model, optimizer)
    for step, lr in enumerate(LRS):
        set_gradients(other, step)
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_without_a_first_moment_is_a_beta1_of_0_without_its_state(name):
    model, other = Toy(), Toy()
    optimizer = build_optimizer(dict(model.named_parameters()), name=name, beta1=None)
    reference = build_optimizer(dict(other.named_parameters()), name=name, beta1=0.0)
    end, expected = (train(m, o, skips=(0, 1, 0)) for m, o in ((model, optimizer), (other, reference)))
    assert {n for n in expected if n.endswith(".exp_avg")} == expected.keys() - end.keys() != set()
    assert all(torch.equal(tensor, expected[n]) for n, tensor in end.items())
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_skip_changes_nothing_even_with_nan(name):
    model = Toy()
    optimizer = build_optimizer(dict(model.named_parameters()), name=name)
    train(model, optimizer)
    before = snapshot(model, optimizer)
    for bad in (float("nan"), float("inf")):
        for p in model.parameters():
            p.grad = torch.full_like(p, bad)
        optimizer.step(0.1, 0.1, torch.tensor(1.0))
    after = snapshot(model, optimizer)
    assert all(torch.equal(t, after[key]) for key, t in before.items())
    # and the next update is the one that would have come without them
    other = Toy()
    untouched = build_optimizer(dict(other.named_parameters()), name=name)
    train(other, untouched)
    expected, got = train(other, untouched, first=3), train(model, optimizer, first=3)
    assert all(torch.equal(t, got[key]) for key, t in expected.items())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_is_there_from_the_start_and_loads_in_place(name):
    model = Toy()
    optimizer = build_optimizer(dict(model.named_parameters()), name=name)
    assert all(t.count_nonzero() == 0 for t in optimizer.state().values())
    train(model, optimizer)
    saved, saved_weights = full(optimizer.state()), full(dict(model.named_parameters()))
    expected = train(model, optimizer, first=3)

    resumed = Toy()
    fresh = build_optimizer(dict(resumed.named_parameters()), name=name)
    assert fresh.state().keys() == saved.keys()
    with torch.no_grad():
        for key, tensor in fresh.state().items():
            tensor.copy_(saved[key])
        for key, p in resumed.named_parameters():
            p.copy_(saved_weights[key])
    got = train(resumed, fresh, first=3)
    assert all(torch.equal(t, got[key]) for key, t in expected.items())


def test_groups():
    model = Toy()
    optimizer = build_optimizer(dict(model.named_parameters()), name="muon")
    said = optimizer.describe()
    assert said == {
        "embed.weight": "adamw, not decayed",
        "layers.0.w.weight": "muon, decayed",
        "layers.0.w.bias": "adamw, not decayed",
        "layers.0.norm.weight": "adamw, not decayed",
        "layers.1.w.weight": "muon, decayed",
        "layers.1.w.bias": "adamw, not decayed",
        "layers.1.norm.weight": "adamw, not decayed",
        "small.weight": "adamw, decayed",
        "head.weight": "adamw, decayed",
    }
    adam = build_optimizer(dict(model.named_parameters())).describe()
    assert adam["layers.0.w.weight"] == "adamw, decayed"
    assert adam.keys() == said.keys()


def test_a_tied_embedding_is_updated_once_and_not_decayed():
    model = Toy(tied=True)
    named = dict(model.named_parameters(remove_duplicate=False))
    backwards = dict(reversed(named.items()))
    assert build_optimizer(named).describe()["embed.weight"] == "adamw, not decayed"
    said = build_optimizer(backwards).describe()
    assert said["head.weight"] == "adamw, not decayed"
    assert "embed.weight" not in said


def test_zero_grad_frozen_and_missing_gradients():
    model = Toy()
    model.small.weight.requires_grad_(False)
    optimizer = build_optimizer(dict(model.named_parameters()))
    assert "small.weight" not in optimizer.describe()
    set_gradients(model, 0)
    optimizer.zero_grad()
    assert all(p.grad is None for n, p in model.named_parameters() if n != "small.weight")
    before = snapshot(model, optimizer)
    optimizer.step(0.1, 0.1)
    assert all(torch.equal(t, before[key]) for key, t in snapshot(model, optimizer).items())


def test_refusals():
    with pytest.raises(
        UserError, match=r"optimizer.name 'adam' is not one of adamw, muon; did you mean 'adamw'"
    ):
        build_optimizer({}, name="adam")
    with torch.device("meta"):
        model = Toy()
    with pytest.raises(ValueError, match=r"embed.weight is on the meta device"):
        build_optimizer(dict(model.named_parameters()))


def sharded(mesh_shape, name, dtype):
    names = ("replicate", "shard")[-len(mesh_shape) :]
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    model = Toy(dtype=dtype)
    for layer in model.layers:
        fully_shard(layer["w"], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, build_optimizer(dict(model.named_parameters()), name=name)


def sharded_job(mesh_shape, name, dtype, skips):
    model, optimizer = sharded(mesh_shape, name, dtype)
    local = [
        k for k, t in optimizer.state().items() if not k.endswith(".step") and not isinstance(t, DTensor)
    ]
    return train(model, optimizer, skips) | {"local": local}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_any_sharding_equals_one_process(pool, name):
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        model = Toy(dtype=dtype)
        skips = (0, 1, 0)
        expected = train(model, build_optimizer(dict(model.named_parameters()), name=name), skips)
        assert expected["embed.weight.step"].item() == 2
        for mesh_shape in ((1,), (2,), (4,), (2, 2), (4, 1)):
            ranks = pool.run(int(np.prod(mesh_shape)), sharded_job, mesh_shape, name, dtype, skips)
            for got in ranks:
                assert got.pop("local") == []
                assert got.keys() == expected.keys()
                for key, tensor in expected.items():
                    torch.testing.assert_close(
                        got[key], tensor, rtol=0, atol=tolerance, msg=f"{mesh_shape} {key}"
                    )


def save_job(folder, name):
    model, optimizer = sharded((2,), name, torch.float32)
    train(model, optimizer)
    dcp.save(dict(model.named_parameters()) | optimizer.state(), checkpoint_id=folder)


def load_job(folder, name, mesh_shape):
    model, optimizer = sharded(mesh_shape, name, torch.float32)
    dcp.load(dict(model.named_parameters()) | optimizer.state(), checkpoint_id=folder)
    return train(model, optimizer, first=3)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_checkpoint_of_two_ranks_continues_on_any_number(pool, name, tmp_path):
    model = Toy()
    optimizer = build_optimizer(dict(model.named_parameters()), name=name)
    train(model, optimizer)
    expected = train(model, optimizer, first=3)
    pool.run(2, save_job, str(tmp_path), name)
    for mesh_shape in ((1,), (4,), (2, 2)):
        for got in pool.run(int(np.prod(mesh_shape)), load_job, str(tmp_path), name, mesh_shape):
            for key, tensor in expected.items():
                torch.testing.assert_close(got[key], tensor, rtol=0, atol=1e-6, msg=f"{mesh_shape} {key}")
