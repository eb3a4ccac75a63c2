import errno
import json
import multiprocessing
import os
import random
import signal
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stepline.trainer.data import pool, units
from stepline.trainer.data.dataset import TokenSplit, load_meta
from stepline.trainer.data.prepare import prepare
from stepline.trainer.data.sources import ReadOptions, split_of
from stepline.trainer.data.tokenizer import load_tokenizer
from stepline.trainer.errors import UserError


@pytest.fixture
def small_units(monkeypatch) -> None:
    """Cut a small input into many units of work."""
    monkeypatch.setattr(units, "MIN_UNIT_BYTES", 1 << 13)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def random_texts(count: int, size: int = 60) -> list[str]:
    rng = random.Random(0)
    return [
        " ".join(rng.choices(["batch", "token\n", "été", "▁", "def", "\t"], k=rng.randrange(1, size)))
        for _ in range(count)
    ]


def decoded(folder: Path, split: str) -> list[str]:
    """The documents of a split, decoded with the folder's own tokenizer."""
    tokenizer, tokens = load_tokenizer(folder), TokenSplit(folder, split)
    everything, start, texts = tokens.read(0, tokens.num_tokens), 0, []
    for end in tokens.document_ends().tolist():
        assert everything[end - 1] == tokens.eod_id
        assert tokens.eod_id not in everything[start : end - 1]
        texts.append(tokenizer.decode(everything[start : end - 1].tolist()))
        start = end
    assert start == tokens.num_tokens
    return texts


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def run(inputs: list[Path], output: Path, tokenizer: Path | None, **options) -> dict:
    return prepare(inputs, output, tokenizer=tokenizer, **{"workers": 1, "progress": False, **options})


def test_documents_come_back_in_order_in_their_splits(tmp_path, tokenizer_file) -> None:
    texts = random_texts(400)
    source = write_jsonl(tmp_path / "x.jsonl", texts)
    meta = run([source], tmp_path / "out", tokenizer_file, val_share=0.2, tune_share=0.1)
    options = ReadOptions(val_share=0.2, tune_share=0.1)
    for split in ("train", "val", "tune"):
        expected = [text for text in texts if split_of(text.encode(), options) == split]
        assert decoded(tmp_path / "out", split) == expected
        counts = meta["splits"][split]
        assert counts["documents"] == len(expected) > 0
        assert counts["bytes"] == sum(len(text.encode()) for text in expected)
        for shard in counts["shards"]:
            assert shard["crc32"] == zlib.crc32((tmp_path / "out" / shard["file"]).read_bytes())
    assert not (tmp_path / "out.partial").exists()
    assert sorted(contents(tmp_path / "out")) == sorted(
        ["meta.json", "tokenizer.model"]
        + [f"{s}-00000.{kind}" for s in ("train", "val", "tune") for kind in ("bin", "idx")]
    )
    assert json.loads((tmp_path / "out" / "meta.json").read_text()) == meta


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=8))
def test_any_unicode_comes_back(tmp_path_factory, tokenizer_file, texts: list[str]) -> None:
    assume(any(text.strip() for text in texts))  # nothing but white space is refused
    folder = tmp_path_factory.mktemp("u")
    run([write_jsonl(folder / "x.jsonl", texts)], folder / "out", tokenizer_file, val_share=0.0)
    assert decoded(folder / "out", "train") == texts


@pytest.mark.parametrize("workers", [2, 3])
def test_result_is_the_same_for_any_number_of_workers(tmp_path, workers: int, small_units) -> None:
    rng = random.Random(0)
    texts = random_texts(600)
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "a.jsonl", texts[:400])
    for i in range(60):
        (tmp_path / "in" / f"{i}.txt").write_text("\n".join(rng.choices(texts, k=rng.randrange(60))))
    metas = [
        run([tmp_path / "in"], tmp_path / f"out{k}", None, vocab_size=300, workers=k, val_share=0.1)
        for k in (1, workers)
    ]
    assert metas[0] == metas[1]
    assert contents(tmp_path / "out1") == contents(tmp_path / f"out{workers}")


def test_shards_are_cut_after_documents(tmp_path, tokenizer_file) -> None:
    texts = random_texts(300)
    texts[100] = "one very long document " * 400
    source = write_jsonl(tmp_path / "x.jsonl", texts)
    run([source], tmp_path / "one", tokenizer_file, val_share=0.0)
    meta = run([source], tmp_path / "many", tokenizer_file, val_share=0.0, shard_tokens=1000)
    shards = meta["splits"]["train"]["shards"]
    assert len(shards) > 10
    assert all(0 < shard["tokens"] <= 1000 for shard in shards)
    one, many = TokenSplit(tmp_path / "one"), TokenSplit(tmp_path / "many")
    np.testing.assert_array_equal(one.read(0, one.num_tokens), many.read(0, many.num_tokens))
    np.testing.assert_array_equal(one.document_ends(), many.document_ends())
    ends = set(one.document_ends().tolist())
    cuts = np.cumsum([shard["tokens"] for shard in shards]).tolist()
    long_begin, long_end = one.document_ends()[99:101].tolist()
    assert all(cut in ends for cut in cuts if not long_begin < cut < long_end)


def test_one_big_text_file_just_works(tmp_path) -> None:
    lines = [" ".join(str(i * j % 97) for j in range(20)) for i in range(2000)]
    (tmp_path / "input.txt").write_text("\n".join(lines))
    meta = run([tmp_path / "input.txt"], tmp_path / "out", None, vocab_size=300)
    train, val = decoded(tmp_path / "out", "train"), decoded(tmp_path / "out", "val")
    assert len(train) == len(val) == 1
    assert train[0] + val[0] == "\n".join(lines)
    assert len(val[0]) / len(train[0] + val[0]) == pytest.approx(0.01, abs=0.002)
    assert "tail" in meta["held_out"]["rule"]


def test_hugging_face_tokenizer(tmp_path, hf_folder) -> None:
    texts = random_texts(100)
    source = write_jsonl(tmp_path / "x.jsonl", texts)
    meta = run([source], tmp_path / "out", hf_folder, val_share=0.0)
    assert decoded(tmp_path / "out", "train") == texts
    assert meta["tokenizer"]["kind"] == "huggingface"
    assert load_meta(tmp_path / "out").eod_id == load_tokenizer(hf_folder).eod_id


def test_fingerprint_follows_content_tokenizer_and_parameters(tmp_path, tokenizer_file) -> None:
    texts = random_texts(100)
    a = write_jsonl(tmp_path / "a.jsonl", texts)
    b = write_jsonl(tmp_path / "b.jsonl", texts)
    c = write_jsonl(tmp_path / "c.jsonl", [*texts[:-1], "other"])
    runs = {
        "a": (a, {}),
        "b": (b, {}),
        "c": (c, {}),
        "seed": (a, {"seed": 1}),
        "share": (a, {"val_share": 0.2}),
    }
    prints = {
        name: run([path], tmp_path / name, tokenizer_file, **{"val_share": 0.1, **options})["fingerprint"]
        for name, (path, options) in runs.items()
    }
    assert prints["a"] == prints["b"]
    assert len(set(prints.values())) == 4
    other = run([a], tmp_path / "t", None, vocab_size=300, val_share=0.1)["fingerprint"]
    assert other not in prints.values()


def _prepare_and_die(inputs: list[Path], output: Path, tokenizer: Path, after: int) -> None:
    """Run in a process of its own: SIGKILL itself after some units."""
    original, done = pool.encode_unit, []

    def dying(*args) -> None:
        if len(done) == after:
            os.kill(os.getpid(), signal.SIGKILL)
        original(*args)
        done.append(args[0])

    pool.encode_unit = dying
    from stepline.trainer.data import prepare as module

    module.COMMIT_SECONDS = 0.0 if after % 2 else 1e9
    prepare(inputs, output, tokenizer=tokenizer, workers=1, progress=False, val_share=0.1)


@pytest.mark.parametrize("after", [0, 3, 4])
def test_a_killed_run_goes_on_where_it_was(
    tmp_path, tokenizer_file, after: int, monkeypatch, small_units
) -> None:
    texts = random_texts(600)
    source = write_jsonl(tmp_path / "x.jsonl", texts)
    run([source], tmp_path / "whole", tokenizer_file, val_share=0.1)
    context = multiprocessing.get_context("fork")
    process = context.Process(
        target=_prepare_and_die, args=([source], tmp_path / "out", tokenizer_file, after)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"no meta\.json"):
        load_meta(tmp_path / "out.partial")
    # half-written bytes after the last commit, and a part that was being written
    if after:
        with open(tmp_path / "out.partial" / "train-00000.bin", "ab") as file:
            file.write(b"torn")
    (tmp_path / "out.partial" / "parts" / "00000009.1234.train.bin").write_bytes(b"torn")
    encoded = []
    original = pool.encode_unit
    monkeypatch.setattr(pool, "encode_unit", lambda *args: (encoded.append(args[0]), original(*args)))
    run([source], tmp_path / "out", tokenizer_file, val_share=0.1)
    assert min(encoded) == after
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_folder_of_somebody_else_is_left_alone(tmp_path, tokenizer_file) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "mine.txt").write_text("a user's")
    source = write_jsonl(tmp_path / "x.jsonl", random_texts(9))
    for vocab_size in (None, 10**6):  # one that would succeed, and one that would clear up after its mistake
        tokenizer = tokenizer_file if vocab_size is None else None
        with pytest.raises(UserError) as caught:
            run([source], tmp_path / "out", tokenizer, vocab_size=vocab_size)
        assert (
            str(caught.value)
            == f"{partial} would be written and holds something else; choose another --output"
        )
    assert [p.name for p in partial.iterdir()] == ["mine.txt"]


def test_all_but_the_last_name_is_gone_on_with(tmp_path, tokenizer_file, monkeypatch) -> None:
    """The folder cannot be renamed, when all is done: nothing is done twice."""
    source = write_jsonl(tmp_path / "x.jsonl", random_texts(50))
    run([source], tmp_path / "whole", tokenizer_file)
    with monkeypatch.context() as patch:
        replace = os.replace

        def refused(old, new):
            if Path(new) == tmp_path / "out":
                raise OSError(errno.ENOTEMPTY, "Directory not empty", str(new))
            replace(old, new)

        patch.setattr(os, "replace", refused)
        with pytest.raises(UserError, match="Directory not empty; mend that and run the command again"):
            run([source], tmp_path / "out", tokenizer_file)
    monkeypatch.setattr(pool, "encode_unit", None)
    run([source], tmp_path / "out", tokenizer_file)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_changed_request_starts_over(tmp_path, tokenizer_file, small_units) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", [*random_texts(3000, 20)])
    with open(source, "a") as file:
        file.write("not json\n")
    with pytest.raises(UserError, match=r"x\.jsonl:3001 is not JSON"):
        run([source], tmp_path / "out", tokenizer_file, val_share=0.1)
    partial = tmp_path / "out.partial"
    assert (partial / "joined.json").exists() or list(partial.glob("parts/*.json"))
    assert not (tmp_path / "out").exists()
    other = write_jsonl(tmp_path / "y.jsonl", random_texts(500, 20))
    run([other], tmp_path / "out", tokenizer_file, val_share=0.1)
    run([other], tmp_path / "fresh", tokenizer_file, val_share=0.1)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_killed_worker_is_one_sentence_and_the_same_command_goes_on(tmp_path, tokenizer_file) -> None:
    texts = random_texts(6_000, 200)
    source = write_jsonl(tmp_path / "x.jsonl", texts)

    def kill_one() -> None:
        parts = tmp_path / "out.partial" / "parts"
        while not list(parts.glob("*.bin")):
            time.sleep(0.005)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(UserError, match=r"out\.partial was killed .* run the same command again"):
        run([source], tmp_path / "out", tokenizer_file, workers=2)
    killer.join()
    assert not multiprocessing.active_children()
    assert not (tmp_path / "out").exists()
    meta = run([source], tmp_path / "out", tokenizer_file, workers=2)
    assert sum(split["documents"] for split in meta["splits"].values()) == len(texts)


def test_a_part_that_a_crash_cut_off_is_refused(tmp_path, tokenizer_file, monkeypatch) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", random_texts(50))
    original = pool.encode_unit

    def cut_off(index: int, *args) -> None:
        original(index, *args)
        part = tmp_path / "out.partial" / "parts" / f"{index:08d}.train.bin"
        os.truncate(part, part.stat().st_size - 2)

    monkeypatch.setattr(pool, "encode_unit", cut_off)
    with pytest.raises(UserError, match=r"train\.bin is cut off .* remove .*out\.partial and start again"):
        run([source], tmp_path / "out", tokenizer_file)
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_link_to_nothing(tmp_path, tokenizer_file) -> None:
    source, out = write_jsonl(tmp_path / "x.jsonl", random_texts(9)), tmp_path / "out"
    out.symlink_to("gone")
    with pytest.raises(UserError) as caught:
        run([source], out, tokenizer_file)
    assert str(caught.value) == f"{out} is a link to gone, which does not exist; remove the link"
    assert not (tmp_path / "out.partial").exists()
