"""Runs of reversible blocks: every layout, compile, mixture and synchroniser against one plain rank."""

import functools

import pytest
import torch

from stepline.comm.mesh import World
from stepline.trainer.errors import UserError
from stepline.trainer.run.start import start_job
from stepline.trainer.watch.metrics import read_metrics

REVFFN = ["model.blocks=revffn", "model.hidden_size=48", "model.num_layers=3", "model.ffn_size=48"]
MOE = ["model.ffn=moe", "model.ffn_size=24", "model.moe.experts=6", "model.moe.shared_size=8"]


COMMON = ("optimizer", "data.", "budget", "model", "run.seed")


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("world", "options"),
    [
        (2, []),
        (2, ["parallel.reshard_after_forward=false", "optimizer.name=muon"]),
        (
            4,
            [
                "parallel.shard=2", "parallel.micro_batch=1", "data.confine_attention=true", "budget.batch_tokens=512",
                "model.revffn.anchor_every=2", *MOE,
            ],
        ),
        (
            4,
            ["parallel.shard=2", "parallel.micro_batch=1", "data.confine_attention=true", "budget.batch_tokens=512"],
        ),
        (2, ["parallel.reshard_after_forward=false", *MOE]),
        (
            4,
            [
                "parallel.shard=4", "parallel.experts=2", "model.revffn.adapters=true", "optimizer.name=muon", *MOE,
                "model.moe.experts=8",
            ],
        ),
        (
            2,
            [
                "model.coupling=revffn", "model.qk_norm=false", "model.revffn.streams=fp32",
                "model.revffn.iterations=40", "run.seed=1",  # with seed 0 a step does not contract
            ],
        ),
    ],
)  # fmt: skip
def test_every_layout_gives_the_curve_of_one_plain_rank(train, tiny_config, tmp_path, world, options, column):
    """In float64, in which the grid's sums are exact, to 1e-12 (the fixed point: 1e-6)."""
    common = [*REVFFN, "precision.compute=fp64", *(o for o in options if o.startswith(COMMON))]
    one = train(1, tiny_config, tmp_path / "one", "parallel.micro_batch=16", *common)
    many = train(world, tiny_config, tmp_path / "many", *common, *options)
    assert column(one)[-1] < column(one)[0] - 0.4
    fixed_point = "model.coupling=revffn" in options
    assert (column(many) / column(one) - 1).abs().max() < (1e-6 if fixed_point else 1e-12)
    if fixed_point:
        assert 0 < column(one, "residual").max() < 1e-5
    else:  # the largest of a batch is on one rank alone
        assert 0 < column(one, "stream_max").max() < 1024
        torch.testing.assert_close(column(many, "stream_max"), column(one, "stream_max"), rtol=1e-6, atol=0)


@pytest.mark.e2e
@pytest.mark.parametrize(
    "ffn", [["model.num_layers=2"], [*MOE, "model.num_layers=1"]], ids=["dense", "a mixture"]
)
def test_compiled_halves_give_the_same_curve(train, tiny_config, tmp_path, column, ffn):
    options = [*REVFFN, *ffn]
    plain = train(1, tiny_config, tmp_path / "plain", *options)
    compiled = train(2, tiny_config, tmp_path / "compiled", "run.compile=true", *options)
    assert (column(compiled) / column(plain) - 1).abs().max() < 1e-5


def test_backward_from_streams_is_that_from_stored_activations(
    train, tiny_config, tmp_path, monkeypatch, column
):
    """Bit by bit over 20 steps, in fp32: the reference stores activations in the same arithmetic."""
    from stepline.models import transformer
    from stepline.trainer.run.launch import run_training

    rows = train(1, tiny_config, tmp_path / "reversible", *REVFFN)
    monkeypatch.setattr(
        transformer, "run_reversible", functools.partial(transformer.run_reversible, stored=True)
    )
    assert run_training(str(tiny_config), [*REVFFN, f"run.folder={tmp_path / 'stored'}"], "never") == 0
    stored = read_metrics(tmp_path / "stored" / "metrics.jsonl")
    for key in ("loss", "grad_norm"):
        assert torch.equal(column(rows, key), column(stored, key))


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("ffn", "sync"),
    [
        (MOE, ["demo", "parallel.demo.chunk=8"]),
        (MOE, ["diloco", "parallel.diloco.every=3"]),
        ([], ["demo", "parallel.demo.chunk=8"]),
        ([], ["diloco", "parallel.diloco.every=3"]),
        ([], ["random_k"]),
    ],
)
def test_replicas_across_slow_links(interrupted, ffn, sync):
    """Bit-identical replicas, a bitwise resume; the numbers: test_demo_models.py."""
    options = [*REVFFN, *ffn, f"parallel.sync={sync[0]}", *sync[1:], "parallel.shard=2"]
    options += ["parallel.check_replicas_every=1", "checkpoint.every=10"]
    straight, again = interrupted(4, *options)
    for key in ("loss", "grad_norm", "val_loss", "expert_load"):
        assert [r.get(key) for r in again] == [r.get(key) for r in straight], key


def test_recompute_beside_it_is_refused(tiny_config, tmp_path):
    options = [*REVFFN, "run.recompute=full", f"run.folder={tmp_path / 'run'}"]
    with pytest.raises(UserError, match="recompute their activations themselves"):
        start_job(str(tiny_config), options, "never", World(0, 1, 0, 1))
