"""What one rank alone finds is said by all, and ends or spares them alike."""

import contextlib
import importlib
import io
import json
import os
import shutil
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from stepline.trainer.data.loader import TrainLoader
from stepline.trainer.errors import Unreadable, UserError
from stepline.trainer.run import checkpoint, eval_command, manifest
from stepline.trainer.run.checkpoint import Checkpointer
from stepline.trainer.run.folder import checkpoint_to_resume
from stepline.trainer.run.launch import run_training
from stepline.trainer.run.manifest import (
    DAMAGED,
    EPHEMERAL,
    SUPERSEDED,
    checkpoint_path,
    complete_checkpoints,
    step_of,
)
from stepline.trainer.run.stored import check_by_all, sound_checkpoint


def one_rank(config: str, options: list[str], resume: str = "never") -> int:
    sys.argv = ["stepline"]
    return run_training(config, options, resume)


def message(folder: Path) -> str:
    """Of the attempt's end."""
    return json.loads((folder / "outcome.json").read_text())["message"]


@pytest.fixture
def copied(tiny_data, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_data, tmp_path / "data"))


def spoil(shard: Path, token: int) -> None:
    """No vocabulary has such a token."""
    content = np.fromfile(shard, np.uint16)
    content[token] = 65535
    content.tofile(shard)


def test_a_token_that_no_vocabulary_has(pool, tiny_config, copied, tmp_path):
    """In a window of rank 1's sixth step: what was trained on this data before no longer counts."""
    loader = TrainLoader(
        [(copied, 1.0)], seq_len=32, batch_windows=6, micro_batch=2, rank=1, world_size=2, prefetch=0
    )
    (split,) = loader.splits
    with mock.patch.object(split, "gather", side_effect=split.gather) as gather:
        for _ in range(6):
            next(loader)
        read = [call.args[0] for call in gather.call_args_list]
    spoil(copied / "train-00000.bin", int(read[5][0]) * 32 + 3)
    folder = tmp_path / "run"
    options = [f"data.path={copied}", "data.verify=off", "checkpoint.every=2", f"run.folder={folder}"]
    assert pool.run(2, one_rank, str(tiny_config), options, init=False) == [2, 2]
    outcome = json.loads((folder / "outcome.json").read_text())
    assert outcome["status"] == "stopped"
    assert "train-00000.bin is damaged (it holds token 65535" in outcome["message"]
    assert "what was trained since step 0 is given up" in outcome["message"]
    assert complete_checkpoints(folder) == []
    assert sorted(step_of(p.parent) for p in folder.glob(f"checkpoints/*/{SUPERSEDED}")) == [2, 4]


def refused_without(rows: Path, pool, config, options: list[str]) -> bool:
    """Whether all ranks end in the sentence for rows that cannot be read, of which this makes a folder."""
    rows.unlink()
    rows.mkdir()
    codes = pool.run(2, one_rank, str(config), options, "auto", init=False)
    says = f"{rows} cannot be read (Is a directory); mend that and start the same command again"
    return (codes, message(rows.parent)) == ([2, 2], says)


def test_rows_that_rank_0_cannot_read(pool, tiny_config, tmp_path):
    folder = tmp_path / "run"
    options = ["budget.steps=4", "checkpoint.every=2", f"run.folder={folder}"]
    assert pool.run(2, one_rank, str(tiny_config), options, init=False) == [0, 0]
    shutil.rmtree(folder / "checkpoints" / "step-000004")
    rows = folder / "metrics.jsonl"
    rows.write_text(rows.read_text().replace("{", "", 1))
    assert pool.run(2, one_rank, str(tiny_config), options, "auto", init=False) == [2, 2]
    assert message(folder) == f"{rows}, line 1, is not a JSON object; delete that line"
    assert json.loads((folder / "heartbeat.json").read_text())["status"] == "stopped"
    assert refused_without(rows, pool, tiny_config, options)


def test_rows_that_cannot_be_read_at_the_end_of_a_run(pool, tiny_config, tmp_path):
    """They would say whether it has been validated."""
    folder = tmp_path / "run"
    options = ["budget.steps=2", f"run.folder={folder}"]
    assert pool.run(2, one_rank, str(tiny_config), options, init=False) == [0, 0]
    (folder / "outcome.json").unlink()
    rows = folder / "metrics.jsonl"
    assert refused_without(rows, pool, tiny_config, options)
    assert not (folder / "logs/attempt-2").exists()


GONE = Unreadable("/mnt/file", OSError(116, "Stale file handle"))


def stale(
    config: str, options: list[str], module: str, name: str, rank: int, resume: str, error: Exception = GONE
) -> int:
    """A run in which a function of a module finds, on one rank, a file on a mount that is gone."""
    os.environ["LOCAL_RANK"] = os.environ.get("RANK", "0")
    where = importlib.import_module(module if module == "logging" else f"stepline.trainer.run.{module}")
    broken = mock.patch.object(where, name, side_effect=error)
    with broken if int(os.environ["LOCAL_RANK"]) == rank else contextlib.nullcontext():
        return one_rank(config, options, resume)


def test_what_one_rank_cannot_read_ends_all_in_one_sentence(pool, tiny_config, tmp_path):
    says = "/mnt/file cannot be read (Stale file handle); mend that and start the same command again"
    first, second = tmp_path / "first", tmp_path / "second"
    options = ["budget.steps=4", f"run.folder={first}"]
    assert pool.run(2, one_rank, str(tiny_config), options, init=False) == [0, 0]
    begin = ["budget.steps=4", f"run.folder={second}", f"run.init_from={first}"]
    found = pool.run(2, stale, str(tiny_config), begin, "loop", "initial_checkpoints", 1, "never", init=False)
    assert (found, message(second)) == ([2, 2], says)
    (newest,) = complete_checkpoints(first)
    part = newest / "__1_0.distcp"  # each rank reads a share of the files
    whole = part.read_bytes()
    part.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert pool.run(2, one_rank, str(tiny_config), begin, init=False) == [2, 2]
    assert message(second).startswith(
        f"the checkpoint {newest} is damaged; its run has no earlier one ({part.name}"
    )
    part.write_bytes(whole)
    assert pool.run(2, one_rank, str(tiny_config), begin, init=False) == [0, 0]
    options = ["budget.steps=2", f"run.folder={second}", "checkpoint.every=1"]
    shutil.rmtree(second)
    assert pool.run(1, one_rank, str(tiny_config), options, init=False) == [0]
    shutil.rmtree(second / "checkpoints/step-000002")
    assert pool.run(1, stale, str(tiny_config), options, "state", "read_state", 0, "auto", init=False) == [2]
    assert message(second) == says
    assert [step_of(p) for p in complete_checkpoints(second)] == [1]


@pytest.mark.parametrize(
    ("module", "name", "rank"),
    [
        ("logs", "forget_outcome", 0),
        ("logging", "FileHandler", 1),
        ("stored", "complete_checkpoints", 0),
        ("attempt", "retire", 0),
        ("loop", "write_config", 0),
    ],
)
def test_a_file_of_the_run_that_one_rank_cannot_use_ends_all_in_one_sentence(
    pool, tiny_config, tmp_path, module, name, rank
):
    """At the start of an attempt."""
    folder = tmp_path / "run"
    options = ["budget.steps=2", "checkpoint.every=1", f"run.folder={folder}"]
    assert pool.run(1, one_rank, str(tiny_config), options, init=False) == [0]
    (folder / "outcome.json").unlink()
    error = PermissionError(13, "Permission denied", "/mnt/file")
    found = pool.run(
        2, stale, str(tiny_config), options, module, name, rank, "step-000001", error, init=False
    )
    says = "/mnt/file cannot be used (Permission denied); mend that and start the same command again"
    assert (found, message(folder)) == ([2, 2], says)


def test_a_token_that_no_vocabulary_has_in_a_validation(pool, tiny_config, copied, tmp_path):
    folder = tmp_path / "run"
    spoil(copied / "val-00000.bin", 5)
    options = [f"data.path={copied}", "data.verify=off", "logging.eval_every=4", "checkpoint.every=2"]
    options += [f"run.folder={folder}"]
    assert pool.run(2, one_rank, str(tiny_config), options, init=False) == [2, 2]
    outcome = json.loads((folder / "outcome.json").read_text())
    assert "val-00000.bin is damaged (it holds token 65535" in outcome["message"]
    assert "given up" not in outcome["message"]
    assert [step_of(p) for p in complete_checkpoints(folder)] == [2], "no step has read what is held out"
    assert not any("val_loss" in line for line in (folder / "metrics.jsonl").read_text().splitlines())


def evaluated(run: Path, behind: int | None) -> str:
    """What `stepline eval --json` prints; rank `behind` sees the run's first checkpoint as its newest."""
    out, older = io.StringIO(), complete_checkpoints(run)[0]
    late = int(os.environ.get("RANK", 0)) == behind
    find = mock.patch.object(eval_command, "find_checkpoint", return_value=older)
    with contextlib.redirect_stdout(out), find if late else contextlib.nullcontext():
        eval_command.run_eval(run, [], ["val"], "text", True)
    return out.getvalue()


def test_ranks_evaluate_the_checkpoint_of_rank_0(pool, tiny_config, tmp_path):
    """A run that trains meanwhile has another newest one from moment to moment."""
    folder = tmp_path / "run"
    options = [f"run.folder={folder}", "budget.steps=4", "checkpoint.every=2", "precision.compute=fp64"]
    assert one_rank(str(tiny_config), options) == 0
    alone = json.loads(evaluated(folder, None))
    said = json.loads(pool.run(2, evaluated, folder, 1, init=False)[0])
    assert said["checkpoint"] == alone["checkpoint"] == str(folder / "checkpoints/step-000004")
    assert said["val_loss"] == pytest.approx(alone["val_loss"], rel=1e-12)


def saves(folder: str, unreadable: int) -> tuple[list[bool], list[str]]:
    """Three checkpoints, of which rank 1 cannot read the one of step `unreadable` again."""
    saver, done = Checkpointer(Path(folder), 9, torch.device("cpu")), []
    honest = checkpoint.file_entry

    def entry(path: Path) -> dict[str, int]:
        if path.name.startswith("__1_") and f"step-{unreadable:06}" in str(path):
            raise OSError(5, "Input/output error")
        return honest(path)

    with mock.patch.object(checkpoint, "file_entry", entry):
        for step in (1, 2, 3):
            saver.save(step, {f"of{dist.get_rank()}": torch.ones(3)}, {"step": step}, EPHEMERAL)
            done.append(saver.finish())
    return done, [p.name for p in complete_checkpoints(Path(folder))]


def test_a_file_that_cannot_be_read_again_costs_that_checkpoint_alone(pool, tmp_path):
    for done, left in pool.run(2, saves, str(tmp_path), 2):
        assert done == [True, False, True]
        assert left == ["step-000001", "step-000003"]


@pytest.mark.parametrize(("rate", "said"), [(10, True), (5e-3, False)])
def test_a_run_that_ends_above_its_first_loss_is_said(train, tiny_config, tmp_path, rate, said):
    rows = train(1, tiny_config, tmp_path / "run", f"optimizer.lr={rate}", "budget.steps=10")
    assert (rows[-1]["val_loss"] > rows[0]["loss"]) == said
    log = (tmp_path / "run/logs/attempt-1/rank-0.log").read_text()
    assert ("this run has learned nothing; lower optimizer.lr" in log) == said


def test_a_run_from_the_weights_of_another_has_a_first_loss_that_says_nothing(train, tiny_config, tmp_path):
    train(1, tiny_config, tmp_path / "first", "budget.steps=4")
    rows = train(1, tiny_config, tmp_path / "run", "optimizer.lr=10", f"run.init_from={tmp_path / 'first'}")
    assert rows[-1]["val_loss"] > rows[0]["loss"]
    assert "learned nothing" not in (tmp_path / "run/logs/attempt-1/rank-0.log").read_text()


def sound(folders: list[str], broken: str | None) -> tuple[str, list[str]]:
    """Where this rank would go on, in its own folder, or what it says; rank 1 cannot read files that begin so."""
    run, honest = Path(folders[dist.get_rank() % len(folders)]), manifest.file_entry

    def entry(path: Path) -> dict[str, int]:
        if broken is not None and path.name.startswith(broken) and dist.get_rank() == 1:
            raise OSError(116, "Stale file handle")
        return honest(path)

    group, notes = dist.new_group(backend="gloo"), []
    with mock.patch.object(manifest, "file_entry", entry):
        try:
            path, notes = sound_checkpoint(checkpoint_path(run, 3), run, group, only_this=False)
            said = str(path)
        except UserError as error:
            said = str(error)
    return said, notes


def test_a_checkpoint_that_one_rank_cannot_read_stays_and_counts(pool, tmp_path):
    pool.run(2, saves, str(tmp_path), 0)
    broken = tmp_path / "checkpoints/step-000003/__0_0.distcp"  # of rank 1's share
    says = f"{broken} cannot be read (Stale file handle); mend that and start the same command again"
    assert pool.run(2, sound, [str(tmp_path)], "__0_") == [(says, [])] * 2
    assert [step_of(p) for p in complete_checkpoints(tmp_path)] == [1, 2, 3]
    assert pool.run(2, sound, [str(tmp_path)], None) == [(str(broken.parent), [])] * 2
    broken.unlink()  # what is missing is damage
    note = (
        f"the checkpoint {broken.parent} is damaged ({broken.name} cannot be read (No such file or directory)): "
        "the one before it is used"
    )
    assert pool.run(2, sound, [str(tmp_path)], None) == [(str(checkpoint_path(tmp_path, 2)), [note])] * 2
    assert (broken.parent / DAMAGED).exists()


@pytest.mark.parametrize(
    ("before", "after"),
    [('"step"', '"stop"'), ('"fingerprints": [\n  "', '"fingerprints": [\n  "!'), ("{", "[")],
)
def test_a_changed_state_of_the_same_size_is_damage(tiny_config, tmp_path, before, after):
    """What every rank reads before they meet."""
    folder = tmp_path / "run"
    options = ["budget.steps=6", "checkpoint.every=2", f"run.folder={folder}"]
    assert one_rank(str(tiny_config), options) == 0
    shutil.rmtree(checkpoint_path(folder, 6))
    newest = checkpoint_path(folder, 4)
    state = (newest / "state.json").read_text()
    changed = state.replace(before, after, 1)[: len(state)]
    assert changed != state
    (newest / "state.json").write_text(changed)
    assert one_rank(str(tiny_config), [*options, "checkpoint.every=6"], "auto") == 0
    log = (folder / "logs/attempt-2/rank-0.log").read_text()
    assert f"{newest} is damaged (state.json has another checksum than when it was written)" in log
    assert f"continuing {checkpoint_path(folder, 2)} at step 2" in log
    assert (newest / DAMAGED).exists()


def copies_checked(folders: list[str]) -> str:
    """What is said of each rank's own copy of a checkpoint."""
    try:
        check_by_all([checkpoint_path(Path(folders[dist.get_rank() % len(folders)]), 3)])
    except UserError as error:
        return str(error)
    return ""


def test_each_copy_of_a_checkpoint_is_read_whole(pool, tmp_path):
    """A node may have its own of the one that a run starts from."""
    pool.run(2, saves, str(tmp_path / "first"), 0)
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    folders = [str(tmp_path / "first"), str(tmp_path / "second")]
    assert pool.run(4, copies_checked, folders) == [""] * 4
    for name in ("__0_0.distcp", "__1_0.distcp"):
        broken = checkpoint_path(tmp_path / "second", 3) / name
        whole = broken.read_bytes()
        broken.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        (said,) = set(pool.run(4, copies_checked, folders))
        assert said.startswith(f"the checkpoint {broken.parent} is damaged")
        assert f"({name} has another checksum" in said
        broken.write_bytes(whole)


@pytest.mark.parametrize("resume", ["auto", "never", "step-000002"])
def test_a_folder_of_checkpoints_that_cannot_be_read_is_no_new_start(tmp_path, monkeypatch, resume):
    kept, listdir = tmp_path / "checkpoints", os.listdir
    (kept / "step-000002").mkdir(parents=True)

    def refused(path: Path) -> list[str]:
        if path == kept:
            raise PermissionError(13, "Permission denied")
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refused)
    with pytest.raises(UserError) as caught:
        checkpoint_to_resume(tmp_path, resume)
    assert str(caught.value) == (
        f"{kept} cannot be read (Permission denied); mend that and start the same command again"
    )


def test_each_rank_goes_on_from_the_checkpoint_in_its_own_folder(pool, tmp_path):
    mine, other = tmp_path / "mine", tmp_path / "other"
    pool.run(2, saves, str(mine), 0)
    shutil.copytree(mine, other)
    shutil.rmtree(mine / "checkpoints/step-000003")
    found = [str(checkpoint_path(folder, 2)) for folder in (mine, other)]
    assert pool.run(2, sound, [str(mine), str(other)], None) == [(path, []) for path in found]
    other.rename(tmp_path / "unmounted")
    says = (
        f"{found[1]} cannot be read (No such file or directory); mend that and start the same command again"
    )
    assert pool.run(2, sound, [str(mine), str(other)], None) == [(says, [])] * 2
    assert [step_of(p) for p in complete_checkpoints(mine)] == [1, 2]
