"""`train_seconds` of outcome.json: what a run's steps took, over all attempts."""

import json
import shutil

import pytest

from stepline.trainer.run.launch import run_training
from stepline.trainer.run.manifest import MANIFEST, STATE, checkpoint_path, file_entry, read_state

ROUNDED = 0.1


@pytest.mark.parametrize("before", [1000.0, None])  # None: the checkpoint of an older version
def test_seconds_of_all_attempts(train, tiny_config, tmp_path, before):
    folder, options = tmp_path / "run", ["budget.steps=4", "checkpoint.every=2"]
    train(2, tiny_config, folder, *options)
    taken = [read_state(checkpoint_path(folder, step))["train_seconds"] for step in (2, 4)]
    first = json.loads((folder / "outcome.json").read_text())
    assert 0 < taken[0] < taken[1] < first["train_seconds"] + ROUNDED
    assert first["train_seconds"] <= first["seconds"]

    shutil.rmtree(checkpoint_path(folder, 4))
    checkpoint = checkpoint_path(folder, 2)
    state, manifest = (json.loads((checkpoint / name).read_text()) for name in (STATE, MANIFEST))
    del state["train_seconds"]
    (checkpoint / STATE).write_text(json.dumps(state | ({"train_seconds": before} if before else {})))
    manifest["files"][STATE] = file_entry(checkpoint / STATE)
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    train(2, tiny_config, folder, *options, resume="auto")
    second = json.loads((folder / "outcome.json").read_text())
    mine = second["train_seconds"] - (before or 0.0)
    assert second["attempt"] == 2
    assert 0 <= mine < second["seconds"] + ROUNDED
    saved = read_state(checkpoint_path(folder, 4))["train_seconds"]
    assert (before or 0.0) < saved < second["train_seconds"] + ROUNDED


def test_seconds_of_a_run_that_diverged(pool, tiny_config, tmp_path):
    options = [f"run.folder={tmp_path / 'run'}", "model.z_loss=1e38", "optimizer.guard.max_skipped=3"]
    assert pool.run(1, run_training, str(tiny_config), options, "never", init=False) == [1]
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert outcome["diverged"]
    assert 0 <= outcome["train_seconds"] <= outcome["seconds"]
