"""The trainer's own step where a synchroniser keeps the replicas together: layouts, and NaN in one of them."""

import math
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from stepline.comm.fsdp import local
from stepline.comm.mesh import build_mesh
from stepline.models.config import ModelConfig
from stepline.models.init import init_model
from stepline.models.transformer import Transformer
from stepline.trainer.config import Config
from stepline.trainer.data.loader import Batch
from stepline.trainer.run import step as step_module
from stepline.trainer.run.state import Trainee
from stepline.trainer.run.step import train_step

# Keys, values and their norms have two rows: of four ranks that shard them two hold nothing.
SHAPE = {
    "vocab_size": 33, "hidden_size": 12, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 2,
    "qk_norm": True, "ffn_size": 10, "z_loss": 1e-3,
}  # fmt: skip
STEPS, WINDOWS, DECAY = 3, 8, 0.1


def trainee(sync: dict, shard: int, clip: float = 1.0) -> Trainee:
    config = Config(model=ModelConfig(**SHAPE), parallel=sync | {"shard": shard})
    config.run.compile, config.precision.compute = False, "fp64"
    config.optimizer.weight_decay, config.optimizer.grad_clip, config.budget.steps = DECAY, clip, 100
    cpu = torch.device("cpu")
    return Trainee.build(config, cpu, build_mesh(cpu, dist.get_world_size(), shard))


def windows(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of a global batch; the later a window stands, the fewer of its tokens carry loss."""
    draw = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, SHAPE["vocab_size"], (WINDOWS, 13), generator=draw)
    targets = tokens[:, 1:].clone()
    for i in range(WINDOWS):
        targets[i, :i] = -100
    return tokens[:, :-1], targets


def batch(step: int) -> Batch:
    """This rank's share of the windows, two at a time."""
    share = slice(dist.get_rank() * WINDOWS // dist.get_world_size(), None)
    parts = [t[share][: WINDOWS // dist.get_world_size()].unflatten(0, (-1, 2)) for t in windows(step)]
    return Batch(*parts, None, {})


def run(sync: dict, shard: int, lr: float, clip: float) -> list[dict[str, torch.Tensor]]:
    """The whole parameters after each step."""
    state, seen = trainee(sync, shard, clip), []
    for step in range(STEPS):
        train_step(state, batch(step), lr)
        parameters = state.synchronizer.shared_parameters().items()
        seen.append({n: t.full_tensor() if hasattr(t, "full_tensor") else t.clone() for n, t in parameters})
    return seen


def close(seen: list[dict], expected: list[dict], tolerance: float) -> None:
    """Relative to the largest value of a parameter."""
    for mine, other in zip(seen, expected, strict=True):
        assert mine.keys() == other.keys()
        for name, value in mine.items():
            assert (value - other[name]).abs().max() <= tolerance * other[name].abs().max(), name


def sgd(lr: float) -> list[dict[str, torch.Tensor]]:
    """p <- p - lr (g + wd p) of the mean over all tokens with loss, in one model."""
    config = ModelConfig(**SHAPE)
    model = Transformer(config).double()
    init_model(model, config, Config(model=config).run.seed)
    seen = []
    for step in range(STEPS):
        inputs, targets = windows(step)
        sums = model(inputs, targets)
        model.zero_grad()
        ((sums.nll + config.z_loss * sums.z) / (targets != -100).sum()).backward()
        for p in model.parameters():
            p.data -= lr * (p.grad + DECAY * p.data)
        seen.append({n: p.detach().clone() for n, p in model.named_parameters()})
    return seen


def test_demo_that_sends_all_is_sgd_of_the_global_batch_on_every_layout(pool):
    """Replicas have other numbers of tokens with loss, and their mean is still that over all tokens."""
    demo = {"faithful": True, "chunk": 8, "kept": 100_000, "phi": "identity", "beta": 0}
    expected = sgd(0.5)
    for world, shard in ((1, 1), (2, 1), (4, 2), (4, 1), (4, 4)):
        for seen in pool.run(world, run, {"sync": "demo", "demo": demo}, shard, 0.5, 1e9):
            close(seen, expected, 1e-13)


ALL_SENT = {"chunk": 8, "density": 1, "codec": "fp32"}
MUON = {"accumulate": "gradients", "version": 2, "phi": "muon", "beta": 0.9}


@pytest.mark.parametrize(
    "sync",
    [
        {"sync": "demo", "demo": {**ALL_SENT, "delay": 1}},
        {"sync": "demo", "demo": ALL_SENT | MUON},
        {"sync": "diloco", "diloco": {"every": 2, "fragments": 2}},
        {"sync": "random_k", "random_k": {"density": 1, "codec": "fp32"}},
    ],
    ids=["late", "muon", "diloco", "random_k"],
)
def test_ranks_that_hold_nothing_of_a_parameter_change_nothing(pool, sync):
    """One replica of one rank and of four; all is sent, so that it does not matter where chunks are cut."""
    (expected,) = pool.run(1, run, sync, 1, 5e-3, 1.0)
    assert (expected[0]["norm.weight"] - expected[-1]["norm.weight"]).abs().max() > 1e-3
    for seen in pool.run(4, run, sync, 4, 5e-3, 1.0):
        close(seen, expected, 1e-11)


def broken(state: Trainee, kind: str) -> float:
    """A step in which a layer of rank 2, in the second of two replicas, gives NaN; whether it was skipped."""

    def spoil(module, inputs, output):
        if kind == "loss":
            return output * math.nan
        output.register_hook(lambda gradient: gradient * math.nan)
        return None

    handle = state.model.layers[0].register_forward_hook(spoil) if dist.get_rank() == 2 else None
    skipped = train_step(state, batch(99), 5e-3).skipped.item()
    if handle is not None:
        handle.remove()
    return skipped


def saved(state: Trainee) -> dict[str, torch.Tensor]:
    """What a checkpoint holds, this rank's part; how often the guard skipped left out."""
    found = state.synchronizer.state_dict(state.synchronizer.replica)
    found |= {f"model.{n}": p for n, p in state.synchronizer.shared_parameters().items()}
    found |= {f"guard.{n}": t for n, t in state.guard.state().items() if "skipped" not in n}
    return {n: local(t).clone() for n, t in found.items()}


def with_and_without(sync: dict, shard: int) -> tuple[list[float], list[str]]:
    """Whether broken steps among others were skipped, and the names of states that they have changed."""
    straight, state, skipped = trainee(sync, shard), trainee(sync, shard), []
    for step in range(4):
        if step in (0, 2, 3):
            skipped.append(broken(state, "loss" if step == 2 else "gradient"))
        for each in (straight, state):
            assert train_step(each, batch(step), 5e-3).skipped.item() == 0
    assert int(state.guard.skipped_total) == len(skipped)
    assert state.synchronizer.first_difference() is None
    expected, found = saved(straight), saved(state)
    assert expected.keys() == found.keys()
    return skipped, [n for n, t in found.items() if not torch.equal(t, expected[n])]


@pytest.mark.parametrize(
    "sync",
    [
        {"sync": "demo", "demo": {"chunk": 8, "density": 0.1}},
        {"sync": "demo", "demo": {"chunk": 8, "density": 0.1, "delay": 1}},
        {"sync": "demo", "demo": {"chunk": 8, "density": 0.1, "owner_reduce_above": 1}},
        {"sync": "demo", "demo": {"chunk": 8, "density": 0.1, "owner_reduce_above": 1, "delay": 1}},
        {"sync": "demo", "demo": {"faithful": True, "chunk": 8, "kept": 2}},
        {"sync": "random_k"},
    ],
    ids=["demo", "late", "owners", "owners late", "faithful", "random_k"],
)
def test_a_step_that_is_nan_in_one_replica_never_was(pool, sync):
    assert pool.run(4, with_and_without, sync, 2) == [([1.0] * 3, [])] * 4


def around(good: int) -> tuple[float, list[dict], list[dict]]:
    """DiLoCo before and after a broken step that follows `good` others: what is saved, and the parameters."""
    state, seen = trainee({"sync": "diloco", "diloco": {"every": 2}}, 2), []
    for step in range(good):
        train_step(state, batch(step), 5e-3)
    seen.append(saved(state))
    skipped = broken(state, "gradient")
    return skipped, [*seen, saved(state)]


@pytest.mark.parametrize("due", [False, True])
def test_diloco_skips_the_inner_step_alone(pool, due):
    """m <- .9 m + d; anchor <- anchor - .7 (d + .9 m), of the parameters as they were."""
    ranks = pool.run(4, around, 3 if due else 2)
    for rank, (skipped, (before, after)) in enumerate(ranks):
        assert skipped == 1
        assert after["optimizer.steps"] == before["optimizer.steps"] + 1
        changed = {n for n in after if not torch.equal(after[n], before[n])}
        names = [n.removeprefix("model.") for n in after if n.startswith("model.")]
        if not due:
            assert changed == {"optimizer.steps"}
            continue
        assert not any("exp_avg" in n for n in changed)
        assert {n for n in changed if n.startswith("guard.")} == {"guard.accepted"}
        assert after["guard.accepted"] == 0  # the outer step ends the history
        for name in names:
            own = [ranks[rank % 2 + 2 * r][1][0][f"replica{r}.local.{name}"] for r in (0, 1)]
            d = before[f"model.{name}"] - (own[0] + own[1]) / 2
            m = 0.9 * before[f"optimizer.{name}.outer_momentum"] + d
            anchor = before[f"model.{name}"] - 0.7 * (d + 0.9 * m)
            assert d.numel() == 0 or d.abs().max() > 0
            for key, value in (
                (f"optimizer.{name}.outer_momentum", m),
                (f"model.{name}", anchor),
                (f"replica{rank // 2}.local.{name}", anchor),
            ):
                torch.testing.assert_close(after[key], value, rtol=0, atol=1e-14)


def differently_summed() -> str | None:
    """Steps that are clipped by a norm whose last bits the second replica sums differently, as NCCL may."""
    state, honest = trainee({"sync": "all_reduce"}, 2, clip=0.01), step_module.sum_of_squares

    def otherwise(parts: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        return honest(parts, dtype) * (1 + 1e-15 * (dist.get_rank() // 2))

    with mock.patch.object(step_module, "sum_of_squares", otherwise):
        for i in range(STEPS):
            train_step(state, batch(i), 1e-2)
    return state.synchronizer.first_difference()


def test_replicas_clip_by_the_same_norm(pool):
    assert pool.run(4, differently_summed) == [None] * 4
