"""Faults that strike a run for real; afterwards every number is that of an undisturbed run, bitwise."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

RESTARTING = ["--standalone", "--max-restarts=3"]
UNHURRIED = {"sleep": {"step": 0.05}}
"""So that a fault strikes before the run has ended, on a fast machine too."""


def attempts(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "logs").iterdir())


def test_a_rank_dies_in_a_step(start, same, tmp_path):
    """SIGKILL to one of torchrun's ranks: it starts them again, and they go on from the last checkpoint, though this
    command was to find no run."""
    folder = tmp_path / "run"
    run = start(folder, "--resume=never", torchrun=RESTARTING, faults=UNHURRIED).reach(25)
    os.kill(run.ranks()[1], signal.SIGKILL)
    run.until(lambda: len(attempts(folder)) == 2).reach(25)
    assert run.end() == [0], run.text()
    assert "goes on from its newest checkpoint, not by --resume never" in run.text()
    same(folder)


def test_a_rank_dies_while_it_writes_a_checkpoint(start, same, tmp_path):
    """A half-written file without COMPLETE; the checkpoint before it is used, and the half one is named."""
    folder = tmp_path / "run"
    run = start(folder, torchrun=RESTARTING, faults={"kill_in_save": {"20": 1}})
    assert run.end() == [0], run.text()
    assert "step-000020 was not finished: step-000010 is used" in run.text()
    assert attempts(folder) == ["attempt-1", "attempt-2"]
    same(folder)


def test_the_whole_job_dies(start, same, tmp_path):
    """SIGKILL to the launcher and its ranks; the same command again."""
    folder, standalone = tmp_path / "run", ["--standalone"]
    start(folder, torchrun=standalone, faults=UNHURRIED).reach(33).kill()
    assert not (folder / "outcome.json").exists()
    assert start(folder, torchrun=standalone).end() == [0]
    assert (folder / "logs" / "attempt-2" / "rank-1.log").is_file()
    same(folder)


def test_a_rank_hangs(start, same, tmp_path):
    """The time limit of the config ends it; the log of every rank says where each of its threads stood."""
    folder = tmp_path / "run"
    run = start(folder, "parallel.timeout_s=8", torchrun=RESTARTING, faults={"hang": {"25": 1}})
    assert run.end() == [0], run.text()
    for rank in (0, 1):
        log = (folder / "logs" / "attempt-1" / f"rank-{rank}.log").read_text()
        assert "no progress for 8 s (parallel.timeout_s) after step 25" in log
        assert "most recent call first" in log
        assert "in faulty_step" in log
    assert "in train_step" in (folder / "logs" / "attempt-1" / "rank-0.log").read_text()
    same(folder)


def test_losses_that_are_nan_or_spike(start, tmp_path):
    """On one rank only: all ranks skip the same steps, whichever rank it was; killed in between or not."""
    faults = {"nan": {"7": 1, "41": 0}, "spike": {"45": 1}}
    options = ["optimizer.guard.window=16"]
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert start(undisturbed, *options, faults=faults).end() == [0, 0]
    others = {"nan": {"7": 0, "41": 1}, "spike": {"45": 1}}
    start(killed, *options, faults=others | UNHURRIED).reach(43).kill()
    assert start(killed, *options, faults=others).end() == [0, 0]
    read = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()]
            for f in (undisturbed, killed)]  # fmt: skip
    steps = [[r for r in rows if "lr" in r] for rows in read]
    assert [r["step"] for r in steps[0]] == list(range(1, 61))
    assert [r["step"] for r in steps[0] if r["skipped_in_a_row"]] == [8, 42, 46]
    assert steps[0][-1]["skipped"] == 3
    for mine, theirs in zip(*steps, strict=True):
        for key in ("step", "tokens", "loss", "grad_norm", "skipped"):
            assert mine.get(key) == theirs.get(key), (mine["step"], key)
    assert [r.get("val_loss") for r in read[0]] == [r.get("val_loss") for r in read[1]]


def flip(path: Path, offset: int = -1000) -> None:
    """Turns one bit of a file."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def killed_once(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("killed") / "run"


@pytest.fixture
def killed(start, killed_once, tmp_path) -> Path:
    """The folder of a run that was killed with the checkpoint of step 40."""
    if not killed_once.exists():
        checkpoint = killed_once / "checkpoints" / "step-000040"
        start(killed_once, faults=UNHURRIED).until((checkpoint / "COMPLETE").exists).kill()
    return Path(shutil.copytree(killed_once, tmp_path / "run"))


def test_checkpoints_with_a_short_and_a_changed_file(start, same, killed):
    """Size and checksum tell; each damaged one is named, the last sound one is used."""
    folder = killed
    shard = folder / "checkpoints" / "step-000040" / "__1_0.distcp"
    size = shard.stat().st_size
    os.truncate(shard, size - 10)
    flip(folder / "checkpoints" / "step-000030" / "__0_0.distcp")
    run = start(folder, "checkpoint.every=60")  # what is damaged is kept until its step is saved again
    assert run.end() == [0, 0]
    marks = [p for mark in ("DAMAGED", "SUPERSEDED") for p in folder.glob(f"checkpoints/*/{mark}")]
    assert sorted(f"{p.parent.name} {p.name}" for p in marks) == [
        "step-000030 DAMAGED",
        "step-000040 DAMAGED",
    ]
    for said in (
        f"step-000040 is damaged (__1_0.distcp has {size - 10} bytes instead of {size})",
        "step-000030 is damaged (__0_0.distcp has another checksum than when it was written)",
        "continuing " + str(folder / "checkpoints" / "step-000020"),
    ):
        assert said in run.text()
    same(folder)


def test_every_checkpoint_is_damaged(start, killed):
    folder = killed
    for shard in folder.glob("checkpoints/*/__0_0.distcp"):
        flip(shard)
    run = start(folder)
    assert run.end() == [2, 2]
    assert run.text().count("every checkpoint of") >= 1
    assert "Traceback" not in run.text()
    before = sorted(p.name for p in folder.glob("checkpoints/*/DAMAGED"))
    again = start(folder, ranks=1)  # not a new start either
    assert again.end() == [2]
    assert "every checkpoint of" in again.text()
    assert sorted(p.name for p in folder.glob("checkpoints/*/DAMAGED")) == before


def test_a_damaged_shard_of_data(start, same, data, tmp_path):
    """Found before it is read, or by the check in the background, after steps that may have read it: their checkpoints
    no longer count. With the right file back the run goes on as if nothing had been."""
    folder, copy = tmp_path / "run", tmp_path / "data"
    shutil.copytree(data, copy)
    option = f"data.path={copy}"
    run = start(folder, option, faults=UNHURRIED).reach(15)
    run.send(signal.SIGTERM)
    assert run.end() == [75, 75]
    sound = max(p.parent.name for p in folder.glob("checkpoints/step-*/COMPLETE"))
    (shard, *_) = sorted(copy.glob("train*.bin"))
    right = shard.read_bytes()
    flip(shard)
    run = start(folder, option)
    assert run.end() == [2, 2]
    assert f"{shard} is damaged" in run.text()
    assert run.outcome()["status"] == "stopped"
    later = {"sleep": {"step": 0.1}, "verify_after": str(folder / "checkpoints/step-000020/COMPLETE")}
    run = start(folder, option, "data.verify=background", faults=later)
    assert run.end() == [2, 2]
    assert f"what was trained since step {int(sound.removeprefix('step-'))} is given up" in run.text()
    assert max(p.parent.name for p in folder.glob("checkpoints/step-*/COMPLETE")) == sound
    assert list(folder.glob("checkpoints/step-*/SUPERSEDED")), "no step was made before it was found"
    shard.write_bytes(right)
    assert start(folder, option, "data.verify=background").end() == [0, 0]
    same(folder)


@pytest.fixture
def small_disk(tmp_path, mount):
    """A file system of 64 MB in memory."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", disk)
    yield disk
    subprocess.run(["umount", "-l", disk], check=False)


def fill(disk: Path) -> Path:
    """Writes until nothing more fits."""
    filler = disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return filler


@pytest.mark.parametrize("honest", [True, False], ids=["seen before", "seen while writing"])
def test_a_full_disk(start, same, small_disk, honest):
    """Saving fails, training goes on; with room again all is written, the rows in between too."""
    folder = small_disk / "run"
    run = start(folder, faults=UNHURRIED | ({} if honest else {"free_bytes": 1e12})).reach(12)
    filler = fill(small_disk)
    run.until(lambda: "step-000020 could not be saved" in run.text())
    newest = sorted(p.parent.name for p in folder.glob("checkpoints/step-*/COMPLETE"))
    assert newest == ["step-000010"]
    filler.unlink()
    assert run.end() == [0, 0], run.text()
    same(folder)


def test_a_disk_that_stays_full(start, same, small_disk):
    """The last checkpoint cannot be saved: exit code 1 and one sentence; afterwards the same command ends the run."""
    folder = small_disk / "run"
    run = start(folder, faults=UNHURRIED).reach(12)
    filler = fill(small_disk)
    assert run.end() == [1, 1]
    assert "the checkpoint of step 60 could not be saved" in run.text()
    assert "goes on from step-000010" in run.text()
    filler.unlink()
    assert start(folder).end() == [0, 0]
    same(folder)


def test_a_folder_that_becomes_read_only(start, same, small_disk, mount):
    """A mount over the folder: what is opened from now on cannot be written."""
    folder = small_disk / "run"
    run = start(folder, faults=UNHURRIED).reach(12)
    mount("--bind", folder, folder)
    mount("-o", "remount,bind,ro", folder)
    run.until(lambda: "step-000020 could not be saved (Read-only file system)" in run.output.read_text())
    subprocess.run(["umount", folder], check=True)
    assert run.end() == [0, 0], run.text()
    same(folder)


def test_a_clock_that_jumps(start, same, tmp_path):
    """A day on, a year back: nothing that the run decides is told by the wall clock."""
    folder = tmp_path / "run"
    run = start(
        folder, "checkpoint.ephemeral_minutes=60", faults={"clock": {"20": 86_400, "40": -31_536_000}}
    )
    assert run.end() == [0, 0]
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [
        f"step-{s:06}" for s in range(10, 61, 10)
    ]
    same(folder)


def test_two_runs_in_one_folder(start, same, tmp_path):
    folder = tmp_path / "run"
    second_gave_up = tmp_path / "gave-up"
    first = start(folder, faults={"sleep": {"first_step": 50}, "awake": str(second_gave_up)})
    first.until((folder / "heartbeat.json").exists)
    second = start(folder, ranks=1, faults={"lock_wait": 2})
    assert second.processes[0].wait(90) == 2
    assert "another process trains in" in second.text()
    second_gave_up.touch()
    assert first.end() == [0, 0]
    same(folder)


def test_a_start_that_waits_goes_on_where_the_run_before_has_saved(start, same, tmp_path):
    """It has looked for a checkpoint while there was none."""
    folder = tmp_path / "run"
    first = start(folder, faults={"sleep": {"step": 1.5}})
    first.reach(1)
    second = start(folder)
    time.sleep(10)  # until it waits
    assert not list(folder.glob("checkpoints/*/COMPLETE"))
    first.send(signal.SIGTERM)
    assert [process.wait(60) for process in first.processes] == [75, 75]
    assert second.end() == [0, 0]
    assert "continuing" in second.text()
    same(folder)


def test_ephemeral_checkpoints_come_by_time_and_go(start, same, tmp_path):
    """Every .6 s here; the newest two stay beside the permanent ones, and a killed run goes on from the newest."""
    folder = tmp_path / "run"
    options = ["checkpoint.every=60", "checkpoint.ephemeral_minutes=0.01"]
    faults = {"sleep": {"step": 0.05, "validation": 0.2}}
    run = start(folder, *options, faults=faults).reach(45)
    kinds = {}
    for path in folder.glob("checkpoints/step-*/manifest.json"):
        with contextlib.suppress(OSError):
            kinds[path.parent.name] = json.loads(path.read_text())["kind"]
    run.kill()
    assert set(kinds.values()) == {"ephemeral"}
    assert 1 <= len(kinds) <= 3, "two that are kept, and one that is being written or removed"
    newest = max(p.parent.name for p in folder.glob("checkpoints/step-*/COMPLETE"))
    run = start(folder, *options)
    assert run.end() == [0, 0]
    assert f"{newest} at step {int(newest.removeprefix('step-'))}" in run.text()
    same(folder)
