"""What a checkpoint holds, which ones count, and which are kept."""

import json
import random
import re
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from stepline.trainer.errors import UserError
from stepline.trainer.run import checkpoint
from stepline.trainer.run.checkpoint import Checkpointer
from stepline.trainer.run.manifest import (
    COMPLETE,
    EPHEMERAL,
    PERMANENT,
    SMALL,
    SUPERSEDED,
    complete_checkpoints,
    damages,
    find_checkpoint,
    incomplete_checkpoints,
    retire,
)
from stepline.trainer.run.stored import load_tensors


def saved(folder: str, kinds: str, keep: int) -> list[str]:
    """Saves a tensor that changes while it is written, once for each letter (p or e); names of what is left."""
    run = Path(folder)
    saver = Checkpointer(run, keep, torch.device("cpu"))
    weights = torch.zeros(1000)
    for step, kind in enumerate(kinds, 1):
        weights.fill_(step)
        tensors = {"weights": weights, f"rank{dist.get_rank()}.own": torch.full((3,), float(dist.get_rank()))}
        saver.save(step, tensors, {"step": step}, PERMANENT if kind == "p" else EPHEMERAL)
        weights.fill_(-1)  # training goes on at once
    assert saver.finish()
    return [p.name for p in complete_checkpoints(run)]


def test_the_newest_ephemeral_ones_and_all_permanent_ones_are_kept(pool, tmp_path):
    left = pool.run(2, saved, str(tmp_path), "epeeepe", 2)
    assert left[0] == ["step-000002", "step-000005", "step-000006", "step-000007"]
    for path in complete_checkpoints(tmp_path):
        manifest = json.loads((path / "manifest.json").read_text())
        on_disk = {p.name for p in path.iterdir()} - {"manifest.json", "COMPLETE"}
        assert set(manifest["files"]) == on_disk
        for name, entry in manifest["files"].items():
            content = (path / name).read_bytes()
            assert entry == {"size": len(content), "crc32": zlib.crc32(content)}
        read = {"weights": torch.empty(1000), "rank1.own": torch.empty(3)}
        load_tensors(path, read)
        assert torch.equal(read["weights"], torch.full((1000,), float(manifest["step"])))
        assert read["rank1.own"].tolist() == [1.0] * 3


def test_an_old_one_that_cannot_be_removed_stays_and_the_new_one_counts(pool, tmp_path):
    assert pool.run(1, saved_where_nothing_goes, str(tmp_path)) == [
        ["step-000001", "step-000002", "step-000003"]
    ]


def saved_where_nothing_goes(folder: str) -> list[str]:
    refused = PermissionError(1, "Operation not permitted")
    with mock.patch.object(checkpoint, "remove", side_effect=refused):
        return saved(folder, "eee", 1)


@pytest.mark.parametrize("broken", ["step-000001", "checkpoints"])
def test_an_old_one_that_cannot_be_looked_at_costs_no_save(pool, tmp_path, broken):
    """Nor does their folder, once the new one is complete."""
    kept = ["step-000001", "step-000003", "step-000004"]
    if broken == "checkpoints":  # nothing can be tidied up
        kept.insert(1, "step-000002")
    for done, said in pool.run(2, saved_beside_a_bad_disk, str(tmp_path), broken):
        assert (done, said) == ([True] * 3, [])
    assert [p.name for p in complete_checkpoints(tmp_path)] == kept


def saved_beside_a_bad_disk(folder: str, broken: str) -> tuple[list[bool], list[str]]:
    """Three checkpoints after a first one, which or whose folder has become stale; and the failures said."""
    run, said, done = Path(folder), [], []
    saver = Checkpointer(run, 2, torch.device("cpu"), said.append)
    exists, glob = Path.exists, Path.glob
    new = ""

    def stale(path: Path) -> bool:
        if path.parent.name == broken:
            raise OSError(116, "Stale file handle", str(path))
        return exists(path)

    def listed(path: Path, pattern: str) -> Iterator[Path]:
        if path.name == broken and exists(path / new / COMPLETE):
            raise OSError(116, "Stale file handle", str(path))
        return glob(path, pattern)

    def save(step: int) -> bool:
        nonlocal new
        new = f"step-{step:06d}"
        saver.save(step, {"w": torch.zeros(10)}, {"step": step}, EPHEMERAL)
        return saver.finish()

    assert save(1)
    looks = stale if broken.startswith("step-") else exists
    with mock.patch.object(Path, "exists", looks), mock.patch.object(Path, "glob", listed):
        done += [save(step) for step in (2, 3, 4)]
    return done, said


def test_any_changed_byte_of_any_file_is_found(pool, tmp_path):
    pool.run(2, saved, str(tmp_path), "pp", 2)
    newest = tmp_path / "checkpoints" / "step-000002"
    assert damages(newest) == []
    draw = random.Random(0)
    for name in json.loads((newest / "manifest.json").read_text())["files"]:
        right = (newest / name).read_bytes()
        wrong = bytearray(right)
        wrong[draw.randrange(len(wrong))] ^= 1 << draw.randrange(8)
        (newest / name).write_bytes(wrong)
        changed = [f"{name} has another checksum than when it was written"]
        assert damages(newest) == changed
        shares = [damages(newest, rank, 3) for rank in range(3)]
        assert sum(map(len, shares)) == 1, "each file is read by one rank"
        assert damages(newest, checksums=False) == (changed if name in SMALL else [])
        with pytest.raises(UserError, match=r"step-000002 is damaged; use an earlier one \(step-000001\)"):
            find_checkpoint(tmp_path)
        (newest / name).write_bytes(right)
    manifest = newest / "manifest.json"
    for wrong in (manifest.read_text().replace("crc32", "crc33", 1), '{"files": 1}', "{"):
        manifest.write_text(wrong)
        assert damages(newest) == ["manifest.json cannot be read"]


def test_what_counts(pool, tmp_path):
    pool.run(1, saved, str(tmp_path), "ppp", 2)
    first, second, third = complete_checkpoints(tmp_path)
    (third / "COMPLETE").unlink()
    retire(second, SUPERSEDED)
    assert complete_checkpoints(tmp_path) == [first]
    shutil.copytree(first, third.with_name("step-000009.bak"))  # that someone keeps
    assert complete_checkpoints(tmp_path) == [first]
    assert incomplete_checkpoints(tmp_path) == [third]
    assert find_checkpoint(tmp_path) == first


def test_a_checkpoint_that_its_run_removes_while_it_is_read_gives_way_to_a_newer_one(pool, tmp_path):
    pool.run(1, saved, str(tmp_path), "pp", 2)
    first, second = complete_checkpoints(tmp_path)
    hidden = second.rename(tmp_path / "hidden")

    def removed(path, **_):
        if path != first:
            return []
        hidden.rename(second)
        shutil.rmtree(first)
        return ["manifest.json cannot be read"]

    with mock.patch("stepline.trainer.run.manifest.damages", removed):
        assert find_checkpoint(tmp_path) == second


def test_the_space_that_is_asked_for_counts_every_replica_and_rank(pool, tmp_path):
    """Two replicas of two ranks: each replica has a delta of its own, and each rank what it owes."""
    for said in pool.run(4, without_room, str(tmp_path)):
        assert said == pytest.approx(4 * (1_000 + 2 * 10_000 + 4 * 100_000) / 1e9, rel=1e-2)


@pytest.mark.parametrize(
    ("mark", "why"), [("SUPERSEDED", "the run has gone back behind it"), ("DAMAGED", "it was found damaged")]
)
def test_what_no_longer_counts_says_why(tmp_path, mark, why):
    path = tmp_path / "checkpoints" / "step-000003"
    path.mkdir(parents=True)
    (path / mark).touch()
    with pytest.raises(UserError) as caught:
        find_checkpoint(path)
    assert str(caught.value) == f"{path} no longer counts, as {why}; to use it, rename its {mark} to COMPLETE"


def test_what_no_longer_counts_makes_room(pool, tmp_path):
    (left,) = pool.run(1, short_of_room, str(tmp_path))
    assert left == [
        "step-000001",
        "step-000005",
        "step-000009",
    ]  # of the abandoned ones the oldest has made way


def test_one_that_cannot_be_removed_costs_no_save(pool, tmp_path):
    (left,) = pool.run(1, short_of_room, str(tmp_path), 5, 3)
    assert left == ["step-000001", "step-000003", "step-000009"]  # the next one has made way instead


def short_of_room(folder: str, large: int = 3, stuck: int | None = None) -> list[str]:
    """large: the step whose checkpoint fills the disk; stuck: the one that cannot be removed."""
    run, remove = Path(folder), shutil.rmtree
    for step, mark in ((1, "COMPLETE"), (3, "SUPERSEDED"), (5, "SUPERSEDED")):
        (run / f"checkpoints/step-{step:06d}").mkdir(parents=True)
        (run / f"checkpoints/step-{step:06d}" / mark).touch()
    saver = Checkpointer(run, 2, torch.device("cpu"), lambda said: None)

    def usage(_: Path) -> SimpleNamespace:
        return SimpleNamespace(free=0 if (run / f"checkpoints/step-{large:06d}").exists() else 10**12)

    def rmtree(path: Path, **options: bool) -> None:
        if stuck is not None and path.name == f"step-{stuck:06d}":
            raise PermissionError(1, "Operation not permitted")
        remove(path, **options)

    full = mock.patch.object(checkpoint.shutil, "disk_usage", usage)
    with full, mock.patch.object(checkpoint.shutil, "rmtree", rmtree):
        saver.save(9, {"model.w": torch.zeros(10)}, {}, PERMANENT)
        assert saver.finish()
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def waits(folder: str, bytes_: float) -> tuple[float, float]:
    """Seconds: what a checkpoint of that size may take, and how long a rank waits in it for the others."""
    saver = Checkpointer(Path(folder), 2, torch.device("cpu"))
    saver._pending = SimpleNamespace(needed=bytes_)
    return saver.limit_s, saver.group._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def test_ranks_wait_for_each_other_as_long_as_a_checkpoint_may_take(pool, tmp_path):
    """By itself torch would end a group's wait after half an hour, and with it the run."""
    for limit, waited in pool.run(2, waits, str(tmp_path), 10e12):
        assert limit == 3600 + 1e6
        assert waited > 10 * limit


def without_room(folder: str) -> float:
    failures = []
    saver = Checkpointer(Path(folder), 2, torch.device("cpu"), failures.append)
    rank = dist.get_rank()
    tensors = {"model.w": torch.zeros(1_000), f"replica{rank // 2}.delta": torch.zeros(10_000)}
    tensors[f"replica{rank // 2}.owed.2x2.rank{rank}.a.0"] = torch.zeros(100_000)
    full = mock.patch.object(checkpoint.shutil, "disk_usage", return_value=SimpleNamespace(free=0))
    with full, mock.patch.object(checkpoint, "SPARE_BYTES", 0):
        saver.save(1, tensors, {"replicas": 2}, PERMANENT)
        assert not saver.finish()
    return float(re.search(r"needs (\S+) GB", failures[0])[1])
