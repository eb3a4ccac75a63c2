"""Weights that FSDP2 gathers in FP8: the same numbers as gathered whole and cast afterwards, in fewer bytes."""

import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather

from stepline.comm.fsdp import local
from stepline.comm.mesh import World, build_mesh
from stepline.kernels.sparse24 import soft_threshold
from stepline.models.sparse_linear import SparseLinear
from stepline.trainer.data.loader import Batch
from stepline.trainer.plan.replay import Replay
from stepline.trainer.run import sparsity
from stepline.trainer.run.launch import run_training
from stepline.trainer.run.start import start_job
from stepline.trainer.run.state import Trainee
from stepline.trainer.run.step import train_step
from stepline.trainer.watch.metrics import read_metrics

SPARSE = ["sparse.mode=s-ste", "precision.fp8=true"]
ROWS = ["precision.fp8=true", "precision.fp8_scales=row"]
SHAPE = ["model.hidden_size=32", "model.num_heads=2", "model.ffn_size=48", "model.num_layers=2"]
MOE = ["model.ffn=moe", "model.moe.experts=4", "model.moe.shared_size=16"]


def trained(config: str, options: list[str], gather: bool, steps: int = 3) -> dict:
    """Losses, this rank's parameters and the bytes of its all-gathers in some steps."""
    world = World.from_environment()
    job = start_job(config, [*SHAPE, *options], "never", world)
    mesh = build_mesh(job.device, world.size, job.config.parallel.shard)
    sent: list[int] = []
    real = DefaultAllGather.__call__

    def counted(self, output_tensor, input_tensor, *args, **kwargs):
        sent.append(input_tensor.numel() * input_tensor.element_size())
        return real(self, output_tensor, input_tensor, *args, **kwargs)

    torch.manual_seed(0)
    real_gather = sparsity.Fp8Gather
    gathers = real_gather if gather else lambda _, config: real_gather(nn.Module(), config)
    with (
        mock.patch.object(sparsity, "Fp8Gather", gathers),
        mock.patch.object(DefaultAllGather, "__call__", counted),
    ):
        state = Trainee.build(job.config, job.device, mesh)
        layers = [m for m in state.model.modules() if isinstance(m, SparseLinear)]
        held: set[int] = set()
        layers[0].register_forward_pre_hook(lambda m, _: held.add(m.weight.untyped_storage().nbytes()))
        draw, losses = torch.Generator().manual_seed(world.rank), []
        for step in range(steps):
            tokens = torch.randint(0, 331, (2, 2, 33), generator=draw)
            state.sparsity.begin(step, watched=True)
            batch = Batch(tokens[..., :-1].contiguous(), tokens[..., 1:].contiguous(), None, {})
            losses.append(train_step(state, batch, 1e-2).loss.item())
    return {
        "losses": losses,
        "parameters": [local(p.detach()).clone() for p in state.model.parameters()],
        "cast": sum(cast.shard.numel() for cast in state.sparsity.fp8.casts),
        "flushed": state.sparsity.row().get("fp8_flushed"),
        "sent": sum(sent),
        "held": held,
        "gathered": sum(layer.gathered is not None for layer in layers) / len(layers),
        "shards": sum(local(layer.weight).numel() for layer in layers),
    }


def planned(config: str, options: list[str], world: int) -> int:
    """Bytes of cast shards that the planner adds to a rank's parameters."""
    settled = start_job(config, [*SHAPE, *options], "never", World(0, world, 0, world)).config
    settled.precision.compute = "bf16" if "precision.compute=bf16" in options else "fp32"
    held = []
    for settled.precision.fp8 in (True, False):
        replayed = Replay(settled, world, 2 if "parallel.shard=2" in options else world, 2, 2)
        replayed.hold()
        held.append(replayed.tally.live["parameters"])
    return held[0] - held[1]


@pytest.mark.parametrize("steps", [3, pytest.param(20, marks=pytest.mark.e2e)])
@pytest.mark.parametrize(
    ("world", "options"),
    [
        (2, [*SPARSE, "sparse.grad_weight=mvue"]),
        (3, ["precision.fp8=true"]),  # 48 rows are dealt evenly, 32 are not
        (4, [*SPARSE, "parallel.shard=2", "precision.compute=bf16", "parallel.reshard_after_forward=false"]),
        (2, [*SPARSE, "model.blocks=revffn", "sparse.dense_fraction=0.9"]),
        (2, [*SPARSE, *MOE, "run.recompute=full", "optimizer.name=muon"]),
        (2, [*SPARSE, "parallel.shard=1", "parallel.sync=demo", "precision.compute=bf16"]),
        (1, [*SPARSE, "parallel.shard=1", "precision.compute=bf16"]),
        (3, [*ROWS, *MOE]),
        (4, [*ROWS, "parallel.shard=2", "parallel.reshard_after_forward=false", "model.blocks=revffn"]),
        (2, [*ROWS, "parallel.shard=1", "parallel.sync=demo", "precision.compute=bf16"]),
    ],
)
def test_the_numbers_are_those_of_whole_weights(pool, tiny_config, world, options, steps):
    width = 2 if "precision.compute=bf16" in options else 4
    times = steps * 2 * (1 if "parallel.reshard_after_forward=false" in options else 2)
    ours = pool.run(world, trained, str(tiny_config), options, True, steps)
    theirs = pool.run(world, trained, str(tiny_config), options, False, steps)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["gathered"] == 1
        assert other["gathered"] == 0
        assert mine["losses"] == other["losses"]
        assert mine["flushed"] == ours[0]["flushed"] < 0.1
        assert all(torch.equal(a, b) for a, b in zip(mine["parameters"], other["parameters"], strict=True))
        assert mine["held"] == {width}  # one value, whatever the weight's shape
        if "parallel.shard=1" not in options:
            assert max(rank["cast"] for rank in ours) == planned(str(tiny_config), options, world)
            padded = max(rank["shards"] for rank in ours)
            assert other["sent"] - mine["sent"] == times * padded * (width - 1)


@pytest.mark.parametrize("options", [SPARSE, ["precision.fp8=true"], ROWS])
def test_the_share_of_values_that_8_bits_lose(tiny_config, options):
    job = start_job(str(tiny_config), [*SHAPE, *options], "never", World(0, 1, 0, 1))
    state = Trainee.build(job.config, job.device, None)
    layers = [m for m in state.model.modules() if isinstance(m, SparseLinear)]
    with torch.no_grad():
        layers[0].weight[0, 0] = 1e6 * layers[0].weight.abs().max()  # beside which others are nothing
    state.sparsity.begin(0, watched=True)
    there = lost = 0
    for layer in layers:
        w = soft_threshold(layer.weight.detach()) if layer.sparse else layer.weight.detach()
        there += int((w != 0).sum())
        most = w.abs().amax(1, keepdim=True) if options is ROWS else w.abs().max()
        lost += int(((w != 0) & (w.abs() / most * 448 < 2**-10)).sum())  # half of the least number
    if options is ROWS:  # the other values of its row
        assert layers[0].in_features - 1 <= lost < 2 * layers[0].in_features
    else:
        assert lost > layers[0].weight.numel() / 4
    assert state.sparsity.row()["fp8_flushed"] == pytest.approx(lost / there, abs=1e-3)


def whole_run(config: str, options: list[str], gather: bool) -> tuple[int, list[dict]]:
    """Exit code and rows of a whole run."""
    sys.argv = ["stepline"]
    folder, real = next(o for o in options if o.startswith("run.folder=")), sparsity.Fp8Gather
    gathers = real if gather else lambda _, config: real(nn.Module(), config)
    with mock.patch.object(sparsity, "Fp8Gather", gathers):
        code = run_training(config, options, "never")
    return code, read_metrics(Path(folder.removeprefix("run.folder=")) / "metrics.jsonl")


@pytest.mark.e2e
@pytest.mark.parametrize("sync", ["all_reduce", "diloco"])
def test_validation_sees_the_weights_of_its_step(pool, tiny_config, tmp_path, sync):
    """Which are newer than the cast shards of the step before, and with DiLoCo not even the replica's own."""
    common = [*SHAPE, *SPARSE, f"parallel.sync={sync}", "parallel.micro_batch=1", "budget.steps=4"]
    common += [
        "logging.eval_every=2",
        "logging.eval_windows=8",
        "optimizer.lr=0.05",
        "precision.compute=bf16",
        "run.compile=false",
    ]
    rows = []
    for gather in (True, False):
        options = [*common, f"run.folder={tmp_path / str(gather)}"]
        answers = pool.run(2, whole_run, str(tiny_config), options, gather, init=False, timeout=300)
        assert [code for code, _ in answers] == [0, 0]
        rows.append(answers[0][1])
    values = [[r["val_loss"] for r in some if "val_loss" in r] for some in rows]
    assert len(values[0]) == 2
    assert values[0] == values[1]
    assert values[0][0] != values[0][1]


@pytest.mark.parametrize("options", [["run.recompute=selective"], ["run.recompute=full"]])
@pytest.mark.parametrize("layers", [[*SPARSE, "sparse.grad_weight=mvue"], ROWS])
def test_recompute_draws_and_rounds_the_same(pool, tiny_config, layers, options):
    common = [*layers, "model.num_layers=1"]
    plain = pool.run(2, trained, str(tiny_config), common, True)
    again = pool.run(2, trained, str(tiny_config), [*common, *options], True)
    for one, other in zip(plain, again, strict=True):
        assert one["losses"] == other["losses"]
        assert all(torch.equal(a, b) for a, b in zip(one["parameters"], other["parameters"], strict=True))


def test_what_was_not_cast_is_not_gathered(pool, tiny_config):
    with pytest.raises(Exception, match="before its shards were cast"):
        pool.run(2, forgotten, str(tiny_config))


def forgotten(config: str) -> None:
    job = start_job(config, [*SHAPE, *SPARSE], "never", World.from_environment())
    state = Trainee.build(job.config, job.device, build_mesh(job.device, 2, 2))
    state.model(torch.zeros(1, 4, dtype=torch.int64))
