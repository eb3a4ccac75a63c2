"""The shards of a run against the checksums that `prepare` wrote."""

import shutil
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stepline.trainer.data import verify
from stepline.trainer.data.dataset import TokenSplit, load_meta
from stepline.trainer.data.loader import TrainLoader
from stepline.trainer.data.prepare import prepare
from stepline.trainer.data.verify import (
    ShardFile,
    Verifier,
    copy_of,
    shard_files,
    sharers,
    shares,
    start_verifying,
    verify_shards,
)
from stepline.trainer.errors import UserError


@pytest.fixture
def folder(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(60):
        (texts / f"{i:02}.txt").write_text(f"document {i} says {i * 7919} and {i * 104729} to all. " * 20)
    prepare([texts], tmp_path / "data", vocab_size=300, workers=1, val_share=0.2, progress=False)
    return tmp_path / "data"


def config(verify: str) -> SimpleNamespace:
    return SimpleNamespace(data=SimpleNamespace(verify=verify), logging=SimpleNamespace(eval_split="val"))


def test_checksums_are_those_of_the_files(folder):
    for file in shard_files([load_meta(folder)], ("train", "val")):
        assert zlib.crc32(file.path.read_bytes()) == file.crc32
    assert verify_shards(load_meta(folder), ("train", "val"), 0, 1) == []


@pytest.mark.parametrize("mode", ["auto", "start", "background"])
def test_one_flipped_bit_is_found_and_named(folder, mode):
    (shard, *_) = sorted(folder.glob("train*.bin"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    verifiers = [start_verifying(config(mode), [load_meta(folder)], rank, 2) for rank in (0, 1)]
    deadline = time.monotonic() + 10
    while not all(v.done for v in verifiers) and time.monotonic() < deadline:
        time.sleep(0.01)
    found = [v.problem() for v in verifiers if v.problem() is not None]
    for verifier in verifiers:
        verifier.close()
    assert len(found) == 1, "one rank reads the shard"
    assert found[0].startswith(f"{shard} is damaged (its checksum differs from meta.json)")
    off = start_verifying(config("off"), [load_meta(folder)], 0, 1)
    assert off.problem() is None


def places(*folders: Path) -> list[tuple[int, int]]:
    """Of ranks that read these folders."""
    copies = [copy_of([load_meta(folder)]) for folder in folders]
    return [sharers(copies, rank) for rank in range(len(folders))]


def test_ranks_that_read_the_same_files_divide_them(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    shutil.copytree(folder, tmp_path / "copy")
    assert places(folder, tmp_path / "link", folder) == [(0, 3), (1, 3), (2, 3)]
    assert places(folder, tmp_path / "copy", folder) == [(0, 2), (0, 1), (1, 2)]


def test_a_copy_with_the_number_and_the_time_of_the_first_is_another(folder, monkeypatch):
    status = (folder / "meta.json").stat()
    changed = iter([1, 1, 2, 2])

    def stat(path: Path) -> SimpleNamespace:
        fields = {"st_ino": status.st_ino, "st_mtime_ns": status.st_mtime_ns}
        return SimpleNamespace(**fields, st_ctime_ns=next(changed))

    monkeypatch.setattr(Path, "stat", stat)
    copies = [copy_of([SimpleNamespace(path=folder)]) for _ in range(4)]
    assert [sharers(copies, rank) for rank in range(4)] == [(0, 2), (1, 2), (0, 2), (1, 2)]


def test_missing_and_short_files(folder):
    meta = load_meta(folder)
    (train, *_), (val, *_) = sorted(folder.glob("train*.bin")), sorted(folder.glob("val*.bin"))
    size = val.stat().st_size
    val.write_bytes(val.read_bytes()[:-2])
    train.unlink()
    said = " ".join(verify_shards(meta, ("train", "val"), 0, 1))
    assert f"{train} is missing" in said
    assert f"{val} has {size - 2} bytes instead of {size}" in said


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_each_rank_finds_what_is_in_its_share_and_all_find_everything_once(folder, tmp_path, ranks):
    """Seven training shards of unequal size and one of the other split, each of them damaged."""
    many = tmp_path / "many"
    prepare(
        [folder.parent / "texts"], many, tokenizer=folder / "tokenizer.model", workers=1, val_share=0.2,
        shard_tokens=load_meta(folder).splits["train"].tokens // 6, progress=False,
    )  # fmt: skip
    meta, shards = load_meta(many), sorted([*many.glob("train*.bin"), *many.glob("val*.bin")])
    assert len(shards) > 6
    for shard in shards:
        content = bytearray(shard.read_bytes())
        content[-1] ^= 128
        shard.write_bytes(content)
    said = [verify_shards(meta, ("train", "val"), rank, ranks) for rank in range(ranks)]
    assert sorted(text.split(" ")[0] for part in said for text in part) == [str(shard) for shard in shards]


@given(st.lists(st.integers(0, 10**12), max_size=40), st.integers(1, 9))
def test_shares_are_whole_disjoint_and_even(sizes, ranks):
    files = [ShardFile(Path(f"{i}.bin"), size, 0) for i, size in enumerate(sizes)]
    parts = shares(files, ranks)
    assert len(parts) == ranks
    assert sorted(file.path for part in parts for file in part) == sorted(file.path for file in files)
    loads = [sum(file.size for file in part) for part in parts]
    assert max(loads) - min(loads) <= max(sizes, default=0)


def test_auto_reads_large_shares_in_the_background_on_all_ranks_alike(folder, monkeypatch):
    metas = [load_meta(folder)]
    sizes = sorted(file.size for file in shard_files(metas, ("train", "val")))
    for most, background in ((sizes[-1], False), (sizes[-1] - 1, True)):
        monkeypatch.setattr(verify, "START_BYTES", most)
        verifiers = [start_verifying(config("auto"), metas, rank, 2) for rank in (0, 1)]
        assert [verifier.background for verifier in verifiers] == [background] * 2
        for verifier in verifiers:
            verifier.close()


def test_closing_ends_the_thread_at_once_and_reading_errors_are_problems(tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "BLOCK_BYTES", 1)  # years
    (tmp_path / "a.bin").write_bytes(bytes(1 << 22))
    verifier = Verifier([ShardFile(tmp_path / "a.bin", 1 << 22, 0)], background=True)
    assert not verifier.done
    assert verifier.problem() is None
    verifier.close()
    assert verifier.done
    assert verifier.problem() is None, "what was not read is no problem"
    unreadable = Verifier([ShardFile(tmp_path, 1, 0)], background=False)
    assert "cannot be read (Is a directory)" in unreadable.problem()


def test_a_token_beyond_the_vocabulary_names_its_shard(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (shard, *_) = sorted(copy.glob("train*.bin"))
    content = bytearray(shard.read_bytes())
    content[20:22] = b"\xff\xff"
    shard.write_bytes(content)
    split = TokenSplit(copy)
    with pytest.raises(UserError, match=r"train.*is damaged \(it holds token 65535"):
        split.gather([0, 1], 32)
    with pytest.raises(UserError, match="is damaged"):
        split.read(0, 64)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_the_loader_hands_over_what_comes_before_the_damage(tmp_path, write_data, prefetch):
    """Three shards, the second of them damaged: every batch is either whole or an error that names the shard."""
    shards = [list(range(10, 91)) for _ in range(3)]
    data = write_data(tmp_path / "data", {"train": shards}, vocab_size=100)
    options = {"seq_len": 4, "batch_windows": 2, "micro_batch": 2}
    sound = TrainLoader([(data, 1.0)], **options, prefetch=0)
    expected = [next(sound).inputs for _ in range(30)]
    damaged = np.array(shards[1], np.uint16)
    damaged[41] = 100  # of window 10 of the second shard, the 31st of all
    damaged.tofile(data / "train-00001.bin")
    loader, handed = TrainLoader([(data, 1.0)], **options, prefetch=prefetch), []
    with pytest.raises(UserError, match=r"train-00001.bin is damaged \(it holds token 100, .* ends at 99\)"):
        handed.extend(batch.inputs for batch in loader)
    loader.close()
    assert len(handed) < 30
    assert all(torch.equal(a, b) for a, b in zip(handed, expected))
