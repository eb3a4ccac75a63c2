import errno
import gzip
import json
import os
from pathlib import Path

import pytest

from stepline.trainer.cli import main
from stepline.trainer.data import parts
from stepline.trainer.data import prepare as module
from stepline.trainer.data.dataset import TokenSplit, load_meta
from stepline.trainer.data.prepare import prepare
from stepline.trainer.errors import UserError

zstandard = pytest.importorskip("zstandard")
GOOD = b"".join(b'{"text": "document %d"}\n' % i for i in range(20_000))


def half_done(partial: Path) -> bool:
    """Whether units are done: a part of one is there, or they are joined already (every two seconds)."""
    return (partial / "joined.json").exists() or bool(list(partial.glob("parts/*.json")))


def refused(tmp_path: Path, tokenizer: Path | None, name: str, content: bytes, **options) -> str:
    """The sentence with which `prepare` refuses a file; no folder looks finished afterwards."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        prepare(
            [tmp_path / name], tmp_path / "out", tokenizer=tokenizer, workers=1, progress=False, **options
        )
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("meta.json"))
    partial = tmp_path / "out.partial"
    assert not partial.exists() or half_done(partial), "it holds nothing to go on with"
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.jsonl.gz", gzip.compress(GOOD, mtime=0)[:-2000], "x.jsonl.gz is truncated"),
        ("x.txt.gz", gzip.compress(GOOD, mtime=0)[:-4], "x.txt.gz is truncated"),
        ("x.jsonl.gz", b"no gzip at all", "x.jsonl.gz is not a sound gzip file"),
        ("x.jsonl.zst", zstandard.compress(GOOD)[:-200], "x.jsonl.zst is truncated"),
        ("x.jsonl.zst", b"no zstd at all", "x.jsonl.zst is not a sound zstd file"),
        ("x.txt", b"a\n" * 100_000 + b"\xff" + b"b\n" * 9, "x.txt is not UTF-8 text (byte 200000)"),
        ("x.jsonl", GOOD + b'{"text": "\xff"}\n', "x.jsonl:20001 is not UTF-8"),
        ("x.jsonl", GOOD + b'{"text": \n', "x.jsonl:20001 is not JSON"),
        ("x.jsonl", GOOD + b"[1]\n" + GOOD, "x.jsonl:20001 is not a JSON object"),
        (
            "x.jsonl",
            b'{"body": "b"}\n',
            "x.jsonl:1 has no text under 'text' (it has body); name the key with --text-key, or",
        ),
        ("x.jsonl", b'{"text": 3}\n', "x.jsonl:1 has no text under 'text'"),
        ("x.jsonl", b'{"text": "\\ud800"}\n', "x.jsonl has a text that is not valid Unicode"),
        ("x.jsonl", b"[" * 100_000, "x.jsonl:1 is not JSON"),
        ("x.parquet", b"PAR1 no parquet", "x.parquet is not a sound Parquet file"),
        ("x.txt", b"", "x.txt has no text"),
        ("x.jsonl", b"\n\n", "x.jsonl has no text"),
        ("x.jsonl.gz", gzip.compress(b"", mtime=0), "x.jsonl.gz has no text"),
        ("x.jsonl", b'{"text": ""}\n', "x.jsonl has no text"),
        ("x.jsonl", b'{"text": " \\n\\t"}\n' * 9, "x.jsonl has no text (nothing but white space)"),
        ("x.txt", b" \n\n\t" * 99, "x.txt has no text (nothing but white space)"),
        ("x.png", b"png", "x.png is a binary file"),
        ("x.jsonl", b'{"text": "only one"}\n', "no document of"),
    ],
)
def test_damaged_input_is_one_sentence_that_names_the_file(
    tmp_path, tokenizer_file, name: str, content: bytes, words: str
) -> None:
    assert words in refused(tmp_path, tokenizer_file, name, content)


@pytest.mark.parametrize(
    ("name", "content"), [("x.jsonl", b'{"text": ""}\n'), ("x.jsonl.gz", gzip.compress(b"", mtime=0))]
)
def test_nothing_to_train_a_tokenizer_on(tmp_path, name: str, content: bytes) -> None:
    assert "no text" in refused(tmp_path, None, name, content)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.jsonl", GOOD + b'{"text": \n', "x.jsonl:20001 is not JSON"),
        ("x.jsonl.gz", gzip.compress(GOOD, mtime=0)[:-2000], "x.jsonl.gz is truncated"),
        ("x.txt", b" \n\n\t" * 99, "x.txt has no text (nothing but white space)"),
    ],
)
def test_what_a_new_tokenizer_cannot_read(tmp_path, name: str, content: bytes, words: str) -> None:
    sentence = refused(tmp_path, None, name, content, vocab_size=330)
    assert words in sentence
    assert "sentencepiece" not in sentence


def test_vocabulary_too_large_for_the_text(tmp_path) -> None:
    assert "--vocab-size 32000 is too large" in refused(tmp_path, None, "x.jsonl", GOOD)


def test_wrong_tokenizer_file(tmp_path) -> None:
    (tmp_path / "t.model").write_bytes(b"not a model")
    assert "t.model is not a tokenizer" in refused(tmp_path, tmp_path / "t.model", "x.jsonl", GOOD)


def test_only_what_can_be_gone_on_with_stays(tmp_path, tokenizer_file, monkeypatch) -> None:
    partial = tmp_path / "out.partial"
    bad = b'{"text": \n'
    refused(tmp_path, tokenizer_file, "x.jsonl", bad + GOOD)
    assert not partial.exists()
    refused(tmp_path, tokenizer_file, "x.jsonl", GOOD + bad)
    assert half_done(partial)
    refused(tmp_path, tokenizer_file, "x.jsonl", GOOD, val_share=0.0, tune_share=1e-12)
    assert not partial.exists(), "without a document to tune on it would be refused again and again"

    def no_library(*args) -> None:
        raise UserError("x needs y")

    with monkeypatch.context() as patch:
        patch.setattr("stepline.trainer.data.pool.encode_unit", no_library)
        options = {"vocab_size": 300, "workers": 1, "progress": False}
        with pytest.raises(UserError, match="x needs y"):
            prepare([tmp_path / "x.jsonl"], tmp_path / "out", **options)
    trained = (partial / "tokenizer.model").read_bytes()
    monkeypatch.setattr("stepline.trainer.data.prepare.train_tokenizer", no_library)
    prepare([tmp_path / "x.jsonl"], tmp_path / "out", **options)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == trained


def test_a_tokenizer_and_the_size_of_a_new_one(tmp_path, tokenizer_file, monkeypatch, capsys) -> None:
    words = ["prepare", "x.jsonl", "--output", "out", "--vocab-size", "300", "--tokenizer"]
    (tmp_path / "x.jsonl").write_bytes(GOOD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["stepline", *words, str(tokenizer_file)])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert capsys.readouterr() == (
        "",
        "error: --vocab-size 300 is of a new tokenizer, but --tokenizer gives one; leave out one of the two\n",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


def test_training_a_tokenizer_is_said_on_standard_error(tmp_path, capsys) -> None:
    (tmp_path / "x.jsonl").write_bytes(GOOD)
    meta = prepare([tmp_path / "x.jsonl"], tmp_path / "out", vocab_size=300, workers=1)
    out, error = capsys.readouterr()
    assert out == ""
    megabytes = f"{meta['splits']['train']['bytes'] / 1e6:.1f}"
    assert megabytes == "0.3"
    said = f"prepare: training a tokenizer of 300 tokens on {megabytes} MB of text; it may take minutes\n"
    assert error.startswith(said)
    prepare([tmp_path / "x.jsonl"], tmp_path / "again", tokenizer=tmp_path / "out", workers=1)
    assert "training" not in capsys.readouterr().err


def test_missing_input_existing_output_and_bad_numbers(tmp_path, tokenizer_file) -> None:
    (tmp_path / "x.jsonl").write_bytes(GOOD)
    cases = [
        ("nothing.txt does not exist", [tmp_path / "nothing.txt"], {}),
        ("--workers 0", [tmp_path / "x.jsonl"], {"workers": 0}),
        ("val_share 1.0 is out of range", [tmp_path / "x.jsonl"], {"val_share": 1.0}),
        ("tune_share -1 is out of range", [tmp_path / "x.jsonl"], {"tune_share": -1}),
        ("has no text", [], {}),
    ]
    for words, inputs, options in cases:
        with pytest.raises(UserError, match=words):
            prepare(inputs, tmp_path / "out", tokenizer=tokenizer_file, progress=False, **options)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out exists already; remove it or choose another"):
        prepare([tmp_path / "x.jsonl"], tmp_path / "out", progress=False)


@pytest.mark.parametrize("where", ["tobytes", "append", "json", "meta", "after"])
def test_full_disk_names_the_folder_and_the_same_command_goes_on(
    tmp_path, tokenizer_file, monkeypatch, where: str
) -> None:
    (tmp_path / "x.jsonl").write_bytes(GOOD)

    def full(*args, **options) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "some file")

    with monkeypatch.context() as patch:
        if where == "tobytes":
            patch.setattr(parts.np, "cumsum", full)  # inside the worker's write
        elif where == "append":
            patch.setattr(parts.ShardWriter, "_append_part", full)
        elif where == "meta":  # all shards are there
            patch.setattr(module, "_meta", full)
        elif where == "after":
            patch.setattr(module.shutil, "rmtree", full)
        else:
            patch.setattr(parts.json, "dumps", full)
        with pytest.raises(UserError, match=r"out\.partial: the disk is full; free some space") as caught:
            prepare(
                [tmp_path / "x.jsonl"], tmp_path / "out", tokenizer=tokenizer_file, workers=1, progress=False
            )
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    if where in ("append", "meta", "after"):
        assert half_done(tmp_path / "out.partial")
    if where in ("meta", "after"):  # nothing is encoded again
        monkeypatch.setattr("stepline.trainer.data.pool.encode_unit", full)
    meta = prepare(
        [tmp_path / "x.jsonl"], tmp_path / "out", tokenizer=tokenizer_file, workers=1, progress=False
    )
    assert sum(split["documents"] for split in meta["splits"].values()) == 20_000


def test_unreadable_file_is_named(tmp_path, tokenizer_file, monkeypatch) -> None:
    (tmp_path / "x.jsonl").write_bytes(GOOD)
    original = open

    def denied(path, *args):
        if str(path).endswith("x.jsonl"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return original(path, *args)

    monkeypatch.setattr("stepline.trainer.data.sources.open", denied, raising=False)
    with pytest.raises(UserError, match=r"x\.jsonl: Permission denied"):
        prepare([tmp_path / "x.jsonl"], tmp_path / "out", tokenizer=tokenizer_file, workers=1, progress=False)


def test_a_read_that_fails_names_what_is_read(tmp_path, tokenizer_file, monkeypatch) -> None:
    """The system's error then names no file."""

    def broken(*_) -> None:
        raise OSError(errno.EIO, "Input/output error")

    (tmp_path / "x.jsonl").write_bytes(GOOD)
    monkeypatch.setattr("stepline.trainer.data.pool.encode_unit", broken)
    with pytest.raises(UserError, match=r"x\.jsonl or .*out\.partial: Input/output error; mend that"):
        prepare([tmp_path / "x.jsonl"], tmp_path / "out", tokenizer=tokenizer_file, workers=1, progress=False)


def test_two_runs_at_once_are_refused(tmp_path, tokenizer_file) -> None:
    import fcntl

    (tmp_path / "x.jsonl").write_bytes(GOOD)
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "work").touch()
    with open(tmp_path / "out.partial" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another `stepline prepare` is writing"):
            prepare([tmp_path / "x.jsonl"], tmp_path / "out", tokenizer=tokenizer_file, progress=False)
    assert (tmp_path / "out.partial" / "work").exists()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
@pytest.mark.parametrize("kept", [True, False])
def test_a_file_system_without_locks(tmp_path, tokenizer_file, monkeypatch, code, kept) -> None:
    def flock(*_) -> None:
        raise OSError(code, os.strerror(code))

    (tmp_path / "x.jsonl").write_bytes(GOOD)
    partial = tmp_path / "out.partial"
    if kept:
        partial.mkdir()
        (partial / "request.json").write_text('""')
    monkeypatch.setattr("fcntl.flock", flock)
    sentence = (
        rf"out\.partial is on a file system that cannot lock files \({os.strerror(code)}\); choose another"
    )
    with pytest.raises(UserError, match=sentence):
        prepare([tmp_path / "x.jsonl"], tmp_path / "out", tokenizer=tokenizer_file, progress=False)
    assert partial.exists() == kept


def test_a_lock_of_another_user_is_left_as_it_is(tmp_path, tokenizer_file, monkeypatch) -> None:
    """Of a `prepare` that has just begun, whose folder holds nothing else."""
    (tmp_path / "x.jsonl").write_bytes(GOOD)
    lock, honest = tmp_path / "out.partial" / "lock", os.open
    lock.parent.mkdir()
    lock.touch()

    def refused(path, *more):
        if Path(path) == lock:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return honest(path, *more)

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(
        UserError, match=r"the lock file .*lock cannot be opened \(Permission denied\); make it one"
    ):
        prepare([tmp_path / "x.jsonl"], tmp_path / "out", tokenizer=tokenizer_file, progress=False)
    assert lock.exists()


def test_folders_that_are_no_data_folders(tmp_path, tokenizer_file) -> None:
    with pytest.raises(UserError, match=r"no prepared data folder \(no meta\.json\); run `stepline prepare`"):
        load_meta(tmp_path)
    (tmp_path / "x.jsonl").write_bytes(GOOD)
    out = tmp_path / "out"
    prepare([tmp_path / "x.jsonl"], out, tokenizer=tokenizer_file, workers=1, progress=False)
    with pytest.raises(UserError, match="has no split 'test'"):
        TokenSplit(out, "test")
    shard = out / "train-00000.bin"
    data = shard.read_bytes()
    shard.write_bytes(data[:-2])
    with pytest.raises(
        UserError, match=rf"train-00000\.bin has {len(data) - 2} bytes instead of {len(data)}"
    ):
        load_meta(out)
    shard.unlink()
    with pytest.raises(UserError, match=r"train-00000\.bin is missing"):
        load_meta(out)
    meta = json.loads((out / "meta.json").read_text())
    del meta["splits"]
    for text in (json.dumps(meta), "{"):
        (out / "meta.json").write_text(text)
        with pytest.raises(UserError, match=r"meta\.json is damaged"):
            load_meta(out)


def test_the_current_folder_as_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^\. exists already"):
        prepare([tmp_path], Path())
