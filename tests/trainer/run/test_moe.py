"""Runs of mixtures of experts: every layout, recompute, compile and synchroniser against one plain rank."""

import shutil

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from stepline.comm.mesh import World, build_mesh
from stepline.models.moe import MoE
from stepline.trainer.run.build import build_model
from stepline.trainer.run.manifest import complete_checkpoints
from stepline.trainer.run.start import start_job
from stepline.trainer.run.state import Trainee, TrainState
from stepline.trainer.run.step import accumulate

MOE = [
    "model.ffn=moe", "model.hidden_size=40", "model.head_dim=12", "model.ffn_size=24", "model.moe.experts=5",
    "model.moe.shared_size=10", "model.moe.bias_rate=0.05",
]  # fmt: skip


TOGETHER = ["data.confine_attention=true", "budget.batch_tokens=512"]


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("world", "options"),
    [
        (2, []),
        (4, ["parallel.shard=4", "optimizer.name=muon"]),
        (4, ["parallel.shard=2", "parallel.micro_batch=1", "run.recompute=full", *TOGETHER]),
        (
            4,
            [
                "parallel.shard=2", "parallel.micro_batch=1", "run.recompute=selective", "optimizer.name=muon",
                "parallel.reshard_after_forward=false", *TOGETHER,
            ],
        ),
    ],
)  # fmt: skip
def test_every_layout_gives_the_curve_of_one_plain_rank(train, tiny_config, tmp_path, world, options, column):
    """In float64 to 1e-12 over 20 steps, the experts' loads to the token."""
    common = [*MOE, "precision.compute=fp64", *(o for o in options if o in TOGETHER or "optimizer" in o)]
    one = train(1, tiny_config, tmp_path / "one", "parallel.micro_batch=16", *common)
    many = train(world, tiny_config, tmp_path / "many", *common, *options)
    assert column(one)[-1] < column(one)[0] - 0.4
    assert (column(many) / column(one) - 1).abs().max() < 1e-12
    steps = [[row for row in rows if "loss" in row] for rows in (many, one)]
    for key in ("expert_load", "router_entropy", "router_bias_range", "experts_dead", "router_loss"):
        for mine, theirs in zip(*steps, strict=True):
            assert torch.allclose(torch.tensor(mine[key]), torch.tensor(theirs[key])), key
    load = torch.tensor(one[5]["expert_load"])
    assert load.mean(1).tolist() == pytest.approx([1, 1], abs=1e-4)


EP = [*MOE, "precision.compute=fp64", "model.moe.experts=8"]


GLOBAL = ["model.moe.balance=global", "budget.batch_tokens=128"]  # one micro-batch, so that its loss is one


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("world", "experts", "options"),
    [
        (2, 8, ["parallel.experts=2"]),
        (4, 8, ["parallel.experts=4", "run.recompute=full"]),
        (2, 8, ["parallel.experts=2", "run.recompute=selective"]),
        (4, 8, ["parallel.experts=2", "optimizer.name=muon"]),
        (4, 6, ["parallel.experts=2", "parallel.reshard_after_forward=false"]),
        (
            4,
            8,
            ["parallel.experts=2", "parallel.shard=2", "parallel.micro_batch=1", *GLOBAL],
        ),
    ],
)
def test_expert_parallelism_gives_the_curve_of_one_plain_rank(
    train, tiny_config, tmp_path, world, experts, options, column
):
    """Alone, with FSDP2 over what is left (by expert, by row where they do not divide), with HSDP."""
    common = [
        *EP,
        f"model.moe.experts={experts}",
        *(o for o in options if o.startswith(("model", "optim", "budget"))),
    ]
    one = train(1, tiny_config, tmp_path / "one", "parallel.micro_batch=6", *common)
    many = train(world, tiny_config, tmp_path / "many", *common, *options)
    assert (column(many) / column(one) - 1).abs().max() < 1e-12
    assert (column(many, "grad_norm") / column(one, "grad_norm") - 1).abs().max() < 1e-10


def gradients(config: str, options: list[str]) -> dict[str, np.ndarray]:
    """Of the first step, whole, by parameter."""
    job = start_job(config, options, "never", World.from_environment())
    mesh = build_mesh(job.device, job.world.size, job.config.parallel.shard)
    state = TrainState.create(job.config, job.device, mesh, job.world.rank, job.fingerprints)
    sync, z_loss = state.synchronizer, job.config.model.z_loss
    accumulate(state.model, next(state.loader), state.device, z_loss, sync.parts, sync.announce, sync.midway)
    state.loader.close()
    made = {name: p.grad for name, p in state.model.named_parameters()}
    return {name: (g.full_tensor() if isinstance(g, DTensor) else g).numpy() for name, g in made.items()}


@pytest.mark.parametrize(("world", "degree"), [(2, 2), (4, 4), (4, 2)])
def test_gradients_of_dealt_experts_are_those_of_a_whole_layer(pool, tiny_config, tmp_path, world, degree):
    """In fp32, to 1e-6 of the largest of each parameter."""
    options = [*MOE, "model.moe.experts=8", f"run.folder={tmp_path / 'run'}"]
    (whole,) = pool.run(1, gradients, str(tiny_config), [*options, "parallel.micro_batch=6"])
    dealt = pool.run(world, gradients, str(tiny_config), [*options, f"parallel.experts={degree}"])[0]
    assert dealt.keys() == whole.keys()
    for name, expected in whole.items():
        assert np.abs(dealt[name] - expected).max() <= 1e-6 * np.abs(expected).max(), name


@pytest.mark.parametrize("sync", ["all_reduce", "demo"])
def test_global_balance_is_of_all_ranks_or_across_slow_links_of_a_replica(pool, tiny_config, tmp_path, sync):
    options = [*MOE, "model.moe.balance=global", f"run.folder={tmp_path / 'run'}", "parallel.shard=2"]
    ranks = pool.run(4, shared_load, str(tiny_config), [*options, f"parallel.sync={sync}"])
    assert ranks == ([[10, 10]] * 4 if sync == "all_reduce" else [[3, 3], [3, 3], [7, 7], [7, 7]])


def shared_load(config: str, options: list[str]) -> list[int]:
    """What each layer takes for the load where rank r has sent r + 1 tokens."""
    job = start_job(config, options, "never", World.from_environment())
    model = build_model(job.config, job.device, build_mesh(job.device, 4, job.config.parallel.shard))
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    return [int(layer.sum_ranks(torch.tensor(job.world.rank + 1))) for layer in layers]


@pytest.mark.e2e
def test_resume_with_other_ranks_for_the_experts(train, tiny_config, tmp_path, column):
    """4 processes that share experts two by two, then 2 that all hold all, then 4 by fours."""
    options = [*EP, "checkpoint.every=4", "checkpoint.keep=9"]
    straight = train(1, tiny_config, tmp_path / "one", *options)
    folder = tmp_path / "resized"
    train(4, tiny_config, folder, *options, "parallel.experts=2")
    for world, degree, keep_until in ((2, 1, 4), (4, 4, 8)):
        for path in complete_checkpoints(folder):
            if int(path.name.removeprefix("step-")) > keep_until:
                shutil.rmtree(path)
        layout = [f"parallel.experts={degree}", "parallel.shard=auto"]
        rows = train(world, tiny_config, folder, *options, *layout, resume="auto")
    assert (column(rows) / column(straight) - 1).abs().max() < 1e-12


@pytest.mark.e2e
def test_compiled_attention_gives_the_same_curve(train, tiny_config, tmp_path, column):
    options = [*MOE, "model.num_layers=1"]
    plain = train(1, tiny_config, tmp_path / "plain", *options)
    compiled = train(
        2, tiny_config, tmp_path / "compiled", "run.compile=true", "run.recompute=full", *options
    )
    assert (column(compiled) / column(plain) - 1).abs().max() < 1e-5


@pytest.mark.e2e
@pytest.mark.parametrize("balance", ["global", "switch"])
def test_balance_losses_even_the_load(train, tiny_config, tmp_path, balance, column):
    """`global` sees the micro-batches of all ranks: on two ranks it is what one rank with both sees."""
    options = [*MOE, "precision.compute=fp64", "budget.batch_tokens=128", f"model.moe.balance={balance}"]
    options += ["model.moe.balance_loss=0.1", "budget.steps=40"]
    two = train(2, tiny_config, tmp_path / "two", *options, "parallel.micro_batch=2")
    one = train(1, tiny_config, tmp_path / "one", *options, "parallel.micro_batch=4")
    without = train(2, tiny_config, tmp_path / "none", *options, "model.moe.balance=none")
    gap = (column(two) / column(one) - 1).abs().max()
    assert gap < 1e-12 if balance == "global" else gap > 1e-9
    tail = [column(rows, "router_balance")[-10:].mean() for rows in (two, without)]
    assert 1 <= tail[0] < tail[1]


@pytest.mark.e2e
@pytest.mark.parametrize(
    "sync",
    [
        ["demo", "parallel.demo.chunk=8"],
        ["demo", "parallel.demo.chunk=8", "optimizer.name=muon"],
        ["diloco", "parallel.diloco.every=3"],
        ["random_k"],
    ],
)
def test_replicas_across_slow_links(interrupted, sync, column):
    """Bit-identical replicas (they are compared in every step), biases alike, a bitwise resume; the numbers:
    test_demo_models.py."""
    options = [*MOE, f"parallel.sync={sync[0]}", *sync[1:], "parallel.shard=2"]
    options += ["parallel.check_replicas_every=1", "checkpoint.every=10"]
    straight, again = interrupted(4, *options)
    assert column(straight)[-3:].mean() < column(straight)[0] - 0.1
    for key in ("loss", "grad_norm", "router_bias_range", "expert_load"):
        assert [r.get(key) for r in again] == [r.get(key) for r in straight], key


ALL_SENT = [
    "parallel.sync=demo",
    "parallel.demo.chunk=8",
    "parallel.demo.density=1",
    "parallel.demo.codec=fp32",
]


@pytest.mark.e2e
@pytest.mark.parametrize(
    "sync",
    [
        ALL_SENT,
        [*ALL_SENT, "parallel.demo.owner_reduce_above=1", "parallel.demo.delay=1"],
        ["parallel.sync=diloco", "parallel.diloco.every=3"],
        ["parallel.sync=random_k", "parallel.random_k.density=1", "parallel.random_k.codec=fp32"],
    ],
    ids=["demo", "owners late", "diloco", "random_k"],
)
def test_dealt_experts_across_slow_links(train, tiny_config, tmp_path, sync, column):
    """Two replicas of two ranks; all is sent, so that it does not matter where chunks are cut."""
    options = [*MOE, "model.moe.experts=6", *sync, "parallel.shard=2", "precision.compute=fp64"]
    options += ["parallel.check_replicas_every=1", "budget.steps=12"]
    whole, dealt = (
        train(4, tiny_config, tmp_path / f"{parts}", *options, f"parallel.experts={parts}")
        for parts in (1, 2)
    )
    assert column(whole)[-1] < column(whole)[0] - 0.1
    assert (column(dealt) / column(whole) - 1).abs().max() < 1e-11


@pytest.mark.e2e
def test_resume_with_other_ranks(train, tiny_config, tmp_path, column):
    """2 -> 4 processes: biases and experts go on where they were."""
    straight = train(
        2, tiny_config, tmp_path / "straight", *MOE, "checkpoint.every=10", "precision.compute=fp64"
    )
    for checkpoint in complete_checkpoints(tmp_path / "straight")[1:]:
        shutil.rmtree(checkpoint)
    options = [*MOE, "checkpoint.every=10", "precision.compute=fp64", "parallel.shard=2"]
    again = train(4, tiny_config, tmp_path / "straight", *options, resume="auto")
    assert (column(again) / column(straight) - 1).abs().max() < 1e-12
    assert again[-1].get("val_loss") == pytest.approx(straight[-1].get("val_loss"), rel=1e-12)


def test_the_choice_of_frozen_layers_stays(tiny_config):
    """As while adapters are trained: the bias belongs to what is frozen."""
    job = start_job(str(tiny_config), MOE, "never", World(0, 1, 0, 1))
    trainee = Trainee.build(job.config, job.device, None)
    first, *others = (module for module in trainee.model.modules() if isinstance(module, MoE))
    first.router.requires_grad_(False)
    for layer in (first, *others):
        layer.load[0] = 10
    trainee.balance.step(torch.tensor(0.0))
    assert not first.router.balance_bias.any()
    assert all(layer.router.balance_bias.any() for layer in others)
    assert others


def test_one_expert_of_weight_one_does_not_train_the_router(tiny_config):
    """Which is said."""
    for renormalise in (True, False):
        options = [*MOE, "model.moe.top_k=1", f"model.moe.renormalise={renormalise}"]
        notes = start_job(str(tiny_config), options, "never", World(0, 1, 0, 1)).notes
        assert renormalise == any("does not train the router" in note for note in notes)
    notes = start_job(str(tiny_config), [*MOE, "model.moe.top_k=2"], "never", World(0, 1, 0, 1)).notes
    assert not any("router" in note for note in notes)
