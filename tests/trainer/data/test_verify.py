"""The shards of a run against the checksums that `prepare` wrote."""

import shutil
import time
import zlib
from types import SimpleNamespace

import pytest

from stepline.trainer.data.dataset import TokenSplit, load_meta
from stepline.trainer.data.prepare import prepare
from stepline.trainer.data.verify import shard_files, shares, start_verifying, verify_shards
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
def test_the_shares_cover_every_file_once(folder, ranks):
    files = shard_files([load_meta(folder)], ("train", "val"))
    parts = shares(files, ranks)
    assert len(parts) == ranks
    assert sorted(str(f.path) for part in parts for f in part) == sorted(str(f.path) for f in files)


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
