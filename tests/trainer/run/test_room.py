"""What the checkpoints of a run will take, against those that a run has written and against a disk without room."""

from types import SimpleNamespace

import pytest

from stepline.comm.mesh import World
from stepline.trainer.config_io import load_config
from stepline.trainer.plan.sync_memory import checkpoint_bytes
from stepline.trainer.run import room
from stepline.trainer.run.launch import dry_run
from stepline.trainer.run.manifest import SUPERSEDED, complete_checkpoints, retire
from stepline.trainer.run.start import start_job

ALONE = World(0, 1, 0, 1)
WIDE = ["model.hidden_size=96", "model.ffn_size=256"]
"""So that the tensors outweigh what describes them."""


@pytest.mark.parametrize(
    ("options", "per_parameter"),
    [
        ([], 12.0),
        (["precision.compute=fp64"], 24.0),
        (["optimizer.name=muon"], None),
        (["parallel.sync=demo"], None),
        (["parallel.sync=demo", "parallel.demo.delay=1", "optimizer.name=muon"], None),
        (["parallel.sync=demo", "parallel.demo.faithful=true"], 12.0),
        (["parallel.sync=diloco"], 8.0 + 2 * 12.0),
        (["parallel.sync=random_k"], None),
    ],
)
def test_bytes_of_a_checkpoint_of_two_replicas(train, tiny_config, tmp_path, options, per_parameter):
    options = [*WIDE, "parallel.shard=1", "budget.steps=1", *options]
    train(2, tiny_config, tmp_path / "run", *options)
    (checkpoint,) = complete_checkpoints(tmp_path / "run")
    written = sum(file.stat().st_size for file in checkpoint.glob("*.distcp"))
    config, _ = load_config(str(tiny_config), options)
    told = checkpoint_bytes(config, 2)
    assert told == pytest.approx(written, rel=0.1)
    if per_parameter is not None:
        parameters = 96 * (2 * 331 + 1) + 2 * (4 * 96 * 96 + 3 * 96 * 256 + 2 * 96 + 2 * 32)
        assert told == pytest.approx(per_parameter * parameters, rel=1e-3)


def free(monkeypatch, size: float) -> None:
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: SimpleNamespace(free=int(size)))


def notes(config, *options: str, resume: str = "auto") -> list[str]:
    job = start_job(str(config), list(options), resume, ALONE)
    return [note for note in job.notes if note.startswith("checkpoints will take")]


def test_checkpoints_that_will_not_fit_are_told_before_the_first_step(
    tiny_config, tmp_path, monkeypatch, capsys
):
    """Of a folder that is not there yet, with the default of a permanent checkpoint each tenth of the run."""
    options = ["checkpoint.every=auto", f"run.folder={tmp_path / 'new' / 'run'}"]
    size = checkpoint_bytes(start_job(str(tiny_config), options, "never", ALONE).config, 1)
    assert size == pytest.approx(12 * 45_228, rel=1e-2)
    free(monkeypatch, 10 * size + room.SPARE_BYTES)
    assert notes(tiny_config, *options) == []
    free(monkeypatch, 10 * size + room.SPARE_BYTES - 1)
    (note,) = notes(tiny_config, *options)
    assert note == (
        f"checkpoints will take about 22.2 MB more, and {tmp_path} has 22.2 MB for them (10 permanent of 543 kB each, "
        "which all stay; ephemeral ones make way): raise checkpoint.every (now 2), or put run.folder on another disk"
    )
    assert dry_run(str(tiny_config), options, "auto") == 0
    assert f"# note: {note}\n" in capsys.readouterr().out
    assert not (tmp_path / "new").exists()

    one = ["checkpoint.every=30"]
    free(monkeypatch, size + room.SPARE_BYTES)
    assert notes(tiny_config, *options, *one) == []
    free(monkeypatch, size + room.SPARE_BYTES - 1)
    (note,) = notes(tiny_config, *options, *one)
    assert note.endswith("): free some space, or put run.folder on another disk")


def test_a_resumed_run_counts_what_is_left_to_write(train, tiny_config, tmp_path, monkeypatch):
    run, options = tmp_path / "run", ["checkpoint.every=4", "checkpoint.ephemeral_minutes=null"]
    train(1, tiny_config, run, *options, "budget.steps=20")
    kept = complete_checkpoints(run)
    assert len(kept) == 5
    options += [f"run.folder={run}", "budget.steps=20"]
    retire(kept[-1], SUPERSEDED)  # one of those that are written anew takes its place
    size = checkpoint_bytes(start_job(str(tiny_config), options, "auto", ALONE).config, 1)
    left = run / "checkpoints" / "step-000019"  # as of a save that was killed
    left.mkdir()
    (left / "__0_0.distcp").write_bytes(bytes(1000))
    for resume, to_write, goes in (("auto", 1, [kept[-1]]), ("step-000008", 3, kept[2:])):
        files = [file.stat().st_size for folder in goes for file in folder.iterdir()]
        needs = to_write * size + room.SPARE_BYTES - sum(files) - 1000
        free(monkeypatch, needs)
        assert notes(tiny_config, *options, resume=resume) == []
        free(monkeypatch, needs - 1)
        assert len(notes(tiny_config, *options, resume=resume)) == 1
    free(monkeypatch, room.SPARE_BYTES)
    (note,) = notes(tiny_config, *options, "checkpoint.every=1")  # steps 17 to 20
    assert "(4 permanent of " in note


@pytest.mark.parametrize(
    ("steps", "every", "step", "left"),
    [
        (20, 2, 0, 10),
        (105, 10, 0, 11),
        (105, 10, 100, 1),
        (9, 10, 3, 1),
        (20, 5, 20, 0),
        (9, 10, 9, 0),
        (105, 10, 105, 0),
    ],
)
def test_permanent_checkpoints_to_come(tiny_config, steps, every, step, left):
    config, _ = load_config(str(tiny_config), [f"budget.steps={steps}", f"checkpoint.every={every}"])
    assert room.permanent_to_come(config, step) == left
    assert left == sum(s == steps or s % every == 0 for s in range(step + 1, steps + 1))
