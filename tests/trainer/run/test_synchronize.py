"""Runs whose replicas are kept together by DeMo, DiLoCo or random-k, through the whole trainer."""

import json
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from stepline.comm.mesh import World, build_mesh
from stepline.trainer.run import loop
from stepline.trainer.run.launch import run_training
from stepline.trainer.run.manifest import complete_checkpoints
from stepline.trainer.run.start import start_job
from stepline.trainer.run.state import Trainee, TrainState
from stepline.trainer.run.stored import stored_names

SYNCS = {
    "demo": ["parallel.sync=demo", "parallel.demo.chunk=8"],
    "delayed": ["parallel.sync=demo", "parallel.demo.chunk=8", "parallel.demo.delay=1"],
    "owners": ["parallel.sync=demo", "parallel.demo.chunk=8", "parallel.demo.owner_reduce_above=1"],
    "gradients": [  # no sign: that of what cancels out is one of rounding
        "parallel.sync=demo", "parallel.demo.chunk=8", "parallel.demo.accumulate=gradients",
        "parallel.demo.version=2", "parallel.demo.phi=identity",
    ],
    "muon": [
        "parallel.sync=demo", "parallel.demo.chunk=8", "parallel.demo.accumulate=gradients",
        "parallel.demo.version=2", "parallel.demo.phi=muon",
        "parallel.demo.beta=0.9",
    ],
    "faithful": ["parallel.sync=demo", "parallel.demo.faithful=true", "parallel.demo.chunk=8", "parallel.demo.kept=2"],
    "diloco": ["parallel.sync=diloco", "parallel.diloco.every=3", "parallel.diloco.fragments=2"],
    "random_k": ["parallel.sync=random_k"],
}  # fmt: skip


def losses(rows: list[dict]) -> torch.Tensor:
    return torch.tensor([r["loss"] for r in rows if "loss" in r], dtype=torch.float64)


@pytest.mark.parametrize("sync", ["demo", "muon", "faithful", "diloco", "random_k"])
def test_the_layout_of_a_replica_does_not_matter_and_training_learns(train, tiny_config, tmp_path, sync):
    """Two replicas of one rank, which hold whole parameters, against two of two ranks, which hold shards.

    Chunks are cut from shards, so that DeMo's differ: it learns alike; what is cut nowhere is the same to the digit.
    """
    options = [*SYNCS[sync], "precision.compute=fp64", "budget.steps=30", "parallel.check_replicas_every=7"]
    whole = train(2, tiny_config, tmp_path / "whole", "parallel.shard=1", *options)
    shards = train(4, tiny_config, tmp_path / "shards", "parallel.shard=2", *options)
    assert losses(whole)[0] == pytest.approx(float(losses(shards)[0]), rel=1e-12)
    if sync == "diloco":
        assert (losses(shards) / losses(whole) - 1).abs().max() < 1e-12
    for rows in (whole, shards):
        assert losses(rows)[-5:].mean() < losses(rows)[0] - 0.7, losses(rows)
    logged = [row for row in whole if "bytes_sent" in row]
    assert sum(row["bytes_sent"] for row in logged) > 0
    if sync != "owners":  # whose packets go twice
        assert logged[-1]["bytes_sent"] == logged[-1]["bytes_received"]


ALIGNED = ["model.hidden_size=32", "model.num_heads=2", "model.ffn_size=64", "model.vocab_size=352"]
"""Widths whose halves are whole chunks of 8."""


@pytest.mark.e2e
@pytest.mark.parametrize("sync", ["demo", "delayed", "gradients"])
def test_where_shards_end_as_chunks_do_layout_and_resume_on_another_change_nothing(
    train, tiny_config, tmp_path, sync
):
    """Two replicas of one rank, two of two ranks, and the latter's checkpoint continued by the former."""
    options = [*SYNCS[sync], *ALIGNED, "model.num_layers=1", "precision.compute=fp64", "checkpoint.every=8"]
    whole = train(2, tiny_config, tmp_path / "whole", "parallel.shard=1", *options)
    shards = train(4, tiny_config, tmp_path / "shards", "parallel.shard=2", *options)
    for checkpoint in complete_checkpoints(tmp_path / "shards"):
        if not checkpoint.name.endswith("8"):
            shutil.rmtree(checkpoint)
    again = train(2, tiny_config, tmp_path / "shards", "parallel.shard=1", *options, resume="auto")
    log = (tmp_path / "shards/logs/attempt-2/rank-0.log").read_text()
    assert "step-000008" in log
    for rows in (shards, again):
        assert [row["step"] for row in rows] == [row["step"] for row in whole]
        assert (losses(rows) / losses(whole) - 1).abs().max() < 1e-12
        assert rows[-1]["val_loss"] == pytest.approx(whole[-1]["val_loss"], rel=1e-12)


@pytest.mark.parametrize(
    "sync",
    [
        "demo", "delayed", "owners", "diloco", "random_k",
        *(pytest.param(sync, marks=pytest.mark.e2e) for sync in ("gradients", "muon", "faithful")),
    ],
)  # fmt: skip
def test_resume_is_bitwise_at_the_same_world_size(interrupted, sync):
    options = [
        *SYNCS[sync],
        "model.num_layers=1",
        "parallel.shard=2",
        "budget.steps=12",
        "checkpoint.every=5",
        "logging.eval_every=4",
    ]
    straight, again = interrupted(4, *options)
    keys = ("step", "loss", "grad_norm", "val_loss")
    assert [[r.get(k) for k in keys] for r in again] == [[r.get(k) for k in keys] for r in straight]


@pytest.fixture(scope="module")
def two_by_two(tmp_path_factory):
    """Runs of two replicas of two shards by synchroniser, each trained once; its folder is a copy."""
    trained: dict[str, tuple[list[dict], Path]] = {}

    def copy(train, config: Path, folder: Path, sync: str) -> list[dict]:
        if sync not in trained:
            kept = tmp_path_factory.mktemp("two_by_two") / sync
            trained[sync] = train(4, config, kept, "parallel.shard=2", *SYNCS[sync], *RESIZED), kept
        rows, kept = trained[sync]
        shutil.copytree(kept, folder)
        return rows

    return copy


RESIZED = ["model.num_layers=1", "precision.compute=fp64", "budget.steps=30", "checkpoint.every=20"]


@pytest.mark.parametrize(
    ("sync", "world", "shard"),
    [
        ("demo", 2, 2), ("demo", 4, 1), ("demo", 2, 1), ("delayed", 4, 1), ("owners", 2, 1), ("muon", 2, 1),
        ("diloco", 4, 1), ("diloco", 2, 1), ("random_k", 4, 1),
    ],
)  # fmt: skip
def test_resume_with_other_replicas_or_shards_goes_on(
    train, two_by_two, tiny_config, tmp_path, sync, world, shard
):
    """From two replicas of two shards. At the same number of replicas nothing is lost, up to where chunks are cut, but
    for what owners owe, whose shares are others; the log says so."""
    options = [*SYNCS[sync], *RESIZED]
    straight = two_by_two(train, tiny_config, tmp_path / "run", sync)
    shutil.rmtree(complete_checkpoints(tmp_path / "run")[-1])
    resized = train(world, tiny_config, tmp_path / "run", f"parallel.shard={shard}", *options, resume="auto")
    assert [row["step"] for row in resized] == [row["step"] for row in straight]
    replicas = world // shard
    log = (tmp_path / "run/logs/attempt-2/rank-0.log").read_text()
    assert ("2 replicas became" in log) == (replicas != 2)
    assert ("owed." in log and "begin anew" in log) == (sync == "owners")
    before, after = losses(resized)[15:20].mean(), losses(resized)[-5:].mean()
    assert after < before + 0.02
    if sync == "diloco" and replicas == 2:
        assert (losses(resized) / losses(straight) - 1).abs().max() < 1e-12


def test_one_replica_is_said(tiny_config):
    for world, shard, said in ((1, 1, True), (2, 2, True), (2, 1, False)):
        options = ["parallel.sync=demo", f"parallel.shard={shard}"]
        notes = start_job(str(tiny_config), options, "never", World(0, world, 0, world)).notes
        assert any(note.startswith("parallel.sync=demo has one replica") for note in notes) == said


def test_one_replica_needs_no_network(train, tiny_config, tmp_path):
    for sync, options in SYNCS.items():
        rows = train(1, tiny_config, tmp_path / sync, *options, "budget.steps=8")
        assert losses(rows)[-1] < losses(rows)[0]
        assert all(row["bytes_sent"] == row["bytes_received"] == 0 for row in rows if "loss" in row)


def test_validation_and_checkpoint_hold_the_model_that_replicas_agree_on(train, tiny_config, tmp_path):
    """DiLoCo before its first average: the agreed model is still the initial one."""
    options = [
        "parallel.sync=diloco",
        "parallel.shard=1",
        "parallel.diloco.every=100",
        "logging.eval_every=3",
    ]
    rows = train(2, tiny_config, tmp_path / "run", *options, "budget.steps=7", "checkpoint.every=6")
    values = [row["val_loss"] for row in rows if "val_loss" in row]
    assert values[0] == values[1] > values[2]  # the last step averages
    other = train(1, tiny_config, tmp_path / "other", "budget.steps=1", "optimizer.lr=1e-9", "schedule.warmup_steps=0",
        f"run.init_from={complete_checkpoints(tmp_path / 'run')[0]}",
    )  # fmt: skip
    assert other[-1]["val_loss"] == pytest.approx(values[0], rel=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["parallel.sync=demo", "parallel.demo.density=0"], "parallel.demo.density"),
        (["parallel.sync=demo", "parallel.demo.density=1.5"], "parallel.demo.density"),
        (["parallel.sync=random_k", "parallel.random_k.density=2"], "parallel.random_k.density"),
        (["parallel.sync=random_k", "parallel.random_k.density=1e-20"], "parallel.random_k.density"),
        (["parallel.sync=random_k", "parallel.random_k.density=0.7"], "the nearest are 0.5 and 1"),
        (["parallel.sync=demo", "parallel.demo.chunk=1000000"], "parallel.demo.chunk"),
        (
            ["parallel.sync=demo", "parallel.demo.faithful=true", "parallel.demo.codec=int8"],
            "published algorithm",
        ),
        (["parallel.sync=diloco", "parallel.diloco.fragments=40"], "cannot take turns"),
        (["parallel.sync=demmo"], "parallel.sync"),
    ],
)
def test_mistakes_are_said_in_one_sentence(tiny_config, tmp_path, capsys, options, said):
    assert run_training(str(tiny_config), [f"run.folder={tmp_path / 'run'}", *options], "never") == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["kept=3", "density=0.1"], "parallel.demo.density has no effect beside parallel.demo.kept"),
        (
            ["accumulate=gradients", "alpha=0.5"],
            "parallel.demo.alpha has no effect without parallel.demo.version=2",
        ),
        (["density=0.25"], "DeMo sends 252 of every 1008 values of embedding and head, more than a row's"),
        (["density=0.25", "codec=int8"], None),
        (["density=0.037", "chunk=32"], "DeMo sends 37 of every 1008 values of embedding and head"),
        (["density=0.035", "chunk=32"], None),
        ([], None),
    ],
)
def test_settings_without_or_with_an_unwanted_effect_are_said(tiny_config, options, said):
    options = ["parallel.sync=demo", *(f"parallel.demo.{option}" for option in options)]
    notes = start_job(str(tiny_config), options, "never", World(0, 1, 0, 1)).notes
    found = [note for note in notes if "parallel.demo" in note]
    assert [note for note in found if said and said in note] == found
    assert bool(found) == (said is not None)


def test_state_in_a_checkpoint_is_that_of_each_replica(train, tiny_config, tmp_path):
    train(2, tiny_config, tmp_path / "run", *SYNCS["demo"], "parallel.shard=1")
    (checkpoint,) = complete_checkpoints(tmp_path / "run")
    names = stored_names(checkpoint)
    for replica in (0, 1):
        own = {n for n in names if n.startswith(f"replica{replica}.optimizer.layers.0.ffn.w1.weight.")}
        assert {n.split(".")[-1] for n in own} == {"delta", "exp_avg_sq", "step"}  # no first moment
    assert json.loads((checkpoint / "state.json").read_text())["replicas"] == 2


def test_gradients_summed_in_bf16_cost_half_the_bytes(train, tiny_config, tmp_path):
    whole = train(2, tiny_config, tmp_path / "fp32", "parallel.shard=1")
    half = train(2, tiny_config, tmp_path / "bf16", "parallel.shard=1", "precision.reduce=bf16")
    assert half[0]["bytes_sent"] == whole[0]["bytes_sent"] / 2 > 0
    relative = (losses(half) / losses(whole) - 1).abs()
    assert 0 < relative.max() < 0.01  # other numbers, the same course


def one_replica_differs(config: str, options: list[str], at: int) -> int:
    """Rank 1's model is changed by one bit before step `at` is made; 0: before the first comparison."""
    create, step = TrainState.create, loop.train_step

    def spoil(state: TrainState) -> TrainState:
        if dist.get_rank() == 1:
            list(state.model.parameters())[3].data.view(-1)[5].mul_(1 + 2**-23)
        return state

    def spoiled_step(state, batch, lr):
        return step(spoil(state) if state.step + 1 == at else state, batch, lr)

    def spoiled_start(*arguments):
        return spoil(create(*arguments)) if at == 0 else create(*arguments)

    with (
        mock.patch.object(loop, "train_step", spoiled_step),
        mock.patch.object(TrainState, "create", spoiled_start),
    ):
        return run_training(config, options, "never")


@pytest.mark.parametrize(
    ("at", "options", "code", "said"),
    [
        (0, [], 2, "start from different weights"),
        (2, ["parallel.check_replicas_every=4"], 1, "at step 4 the replicas"),
        (3, ["budget.steps=5"], 1, "at step 5 the replicas"),  # the last
        (2, ["checkpoint.every=3"], 1, "at step 3 the replicas"),  # before it is on disk
        (1, ["checkpoint.ephemeral_minutes=1e-9"], 1, "at step 1 the replicas"),
    ],
)
def test_replicas_that_differ_end_the_run(pool, tiny_config, tmp_path, at, options, code, said):
    folder = tmp_path / "run"
    options = [f"run.folder={folder}", *SYNCS["demo"], "parallel.shard=1", *options]
    assert pool.run(2, one_replica_differs, str(tiny_config), options, at, init=False) == [code] * 2
    message = json.loads((folder / "outcome.json").read_text())["message"]
    assert said in message
    assert "layers.0." in message
    assert complete_checkpoints(folder) == []


def frozen_difference(config: str) -> tuple[str | None, str | None]:
    job = start_job(config, [*SYNCS["demo"], "parallel.shard=1"], "never", World.from_environment())
    trainee = Trainee.build(job.config, job.device, build_mesh(job.device, 2, 1))
    frozen = trainee.model.layers[0].ffn.w1.weight.requires_grad_(False)
    del trainee.synchronizer.parameters["layers.0.ffn.w1.weight"]
    before = trainee.first_difference()
    if dist.get_rank() == 1:
        frozen.data[0, 0] += 1e-3
    return before, trainee.first_difference()


def test_frozen_weights_are_compared_too(pool, tiny_config):
    found = pool.run(2, frozen_difference, str(tiny_config))
    assert found == [(None, "layers.0.ffn.w1.weight")] * 2


def test_replicas_are_not_compared_where_that_is_not_wanted(pool, tiny_config, tmp_path):
    options = [f"run.folder={tmp_path / 'run'}", *SYNCS["demo"], "parallel.shard=1", "budget.steps=5"]
    options += ["parallel.check_replicas_every=0"]
    assert pool.run(2, one_replica_differs, str(tiny_config), options, 3, init=False) == [0] * 2
