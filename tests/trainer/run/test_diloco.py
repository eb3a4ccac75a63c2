"""DiLoCo through the whole trainer: what its outer steps and a resize do to a run."""

import shutil

import pytest
import torch

from stepline.trainer.config_io import load_config
from stepline.trainer.run.manifest import complete_checkpoints
from stepline.trainer.run.state import least_history


def test_an_outer_step_is_no_spike(train, tiny_config, tmp_path, column):
    """One so long that the loss jumps for good: the run is that of a guard which lets all pass."""
    options = ["parallel.sync=diloco", "parallel.diloco.every=7", "parallel.diloco.outer_lr=3"]
    options += [
        "optimizer.lr=1e-2",
        "optimizer.guard.window=8",
        "optimizer.guard.max_skipped=3",
        "budget.steps=28",
    ]
    guarded = train(1, tiny_config, tmp_path / "guarded", *options)
    alone = train(1, tiny_config, tmp_path / "alone", *options, "optimizer.guard.sigma=1e4")
    assert column(guarded, "skipped").sum() == 0
    losses = column(alone)
    assert torch.equal(column(guarded), losses)
    assert (losses[[7, 14, 21]] - losses[[6, 13, 20]]).max() > 1, losses


@pytest.mark.parametrize(("world", "shard"), [(4, 1), (1, 1)])
def test_what_replicas_have_learned_alone_survives_a_resize(
    train, tiny_config, tmp_path, column, world, shard
):
    """Before their first average, when the model that they agree on is still the initial one."""
    options = ["parallel.sync=diloco", "parallel.diloco.every=100", "model.num_layers=1", "budget.steps=26"]
    options += ["precision.compute=fp64", "checkpoint.every=20", "optimizer.guard.window=8"]
    options += ["optimizer.guard.max_skipped=3"]
    run = tmp_path / "run"
    straight = column(train(4, tiny_config, run, "parallel.shard=2", *options))
    shutil.rmtree(complete_checkpoints(run)[-1])
    rows = train(world, tiny_config, run, f"parallel.shard={shard}", *options, resume="auto")
    log = (run / "logs/attempt-2/rank-0.log").read_text()
    assert f"2 replicas became {world // shard}: all begin at the mean" in log
    assert column(rows, "skipped").sum() == 0
    resized = column(rows)
    assert torch.equal(resized[:20], straight[:20])
    assert straight[:3].mean() - straight[20:25].mean() > 0.5  # they had learned something
    assert (resized[20:25].mean() - straight[20:25].mean()).abs() < 0.1


@pytest.mark.parametrize(
    ("sync", "every", "fragments", "window", "steps"),
    [
        ("diloco", 32, 1, 128, 16),
        ("diloco", 100, 2, 128, 25),
        ("diloco", 500, 1, 128, 64),
        ("diloco", 31, 1, 128, 64),  # too few to know a spread by
        ("diloco", 32, 1, 8, 4),
        ("demo", 32, 1, 128, 64),
    ],
)
def test_the_guard_judges_the_second_half_of_a_turn(tiny_config, sync, every, fragments, window, steps):
    config, _ = load_config(str(tiny_config), [f"parallel.sync={sync}", f"optimizer.guard.window={window}"])
    config.parallel.diloco.every, config.parallel.diloco.fragments = every, fragments
    assert least_history(config) == steps
