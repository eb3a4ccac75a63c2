import errno
import json
import os
from pathlib import Path

import pytest

from stepline.trainer.data.discover import discover, format_of
from stepline.trainer.data.prepare import prepare
from stepline.trainer.errors import UserError


def test_folders_leave_out_binary_hidden_and_excluded_files(tmp_path) -> None:
    for name, data in {
        "a.txt": b"a",
        "b.py": b"b",
        "sub/c.md": b"c",
        "sub/test/d.txt": b"d",
        "e.png": b"e",
        "f.txt": b"\0f",
        ".git/g.txt": b"g",
        ".h": b"h",
        "__pycache__/i.txt": b"i",
        "out/j.txt": b"j",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    (tmp_path / "k.txt").symlink_to(tmp_path / "missing")
    files, skipped = discover([tmp_path, tmp_path / "a.txt"], ["*/test/*"], [(tmp_path / "out").resolve()])
    assert [Path(file.path).name for file in files] == ["a.txt", "b.py", "c.md"]
    assert dict(skipped) == {"binary": 2, "excluded": 1, "not a file": 1}
    with pytest.raises(UserError, match=r"e\.png is a binary file"):
        discover([tmp_path / "e.png"], [])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.TXT", "text"),
        ("a.jsonl", "jsonl"),
        ("a.jsonl.gz", "jsonl"),
        ("a.jsonl.zst", "jsonl"),
        ("a.parquet", "parquet"),
        ("a.txt.gz", "text"),
        ("README", "text"),
        ("a.so", None),
        ("a.tar.gz", None),
    ],
)
def test_format_by_suffix(name: str, expected: str | None) -> None:
    assert format_of(Path(name)) == expected


def test_links_to_folders_are_followed_once(tmp_path) -> None:
    (tmp_path / "in" / "real").mkdir(parents=True)
    (tmp_path / "other" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "real" / "a.txt").write_text("a")
    (tmp_path / "other" / "deep" / "b.txt").write_text("b")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "other")
    (tmp_path / "in" / "again").symlink_to(tmp_path / "in" / "real")
    (tmp_path / "other" / "back").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "output").symlink_to(tmp_path / "out")
    (tmp_path / "in" / "up").symlink_to(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "c.txt").write_text("c")
    files, skipped = discover([tmp_path / "in"], [], (tmp_path / "out",))
    paths = [Path(file.path).relative_to(tmp_path / "in").as_posix() for file in files]
    assert paths == ["real/a.txt", "link/deep/b.txt"]
    assert not skipped
    for pattern, left in (("*/real/*", ["link/deep/b.txt"]), ("*/other/*", ["real/a.txt"])):
        files, skipped = discover([tmp_path / "in"], [pattern], (tmp_path / "out",))
        assert [Path(file.path).relative_to(tmp_path / "in").as_posix() for file in files] == left
        assert skipped["excluded"] == 1


def test_links_in_a_circle_are_no_files(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "self").symlink_to("self")
    (tmp_path / "there").symlink_to("back")
    (tmp_path / "back").symlink_to("there")
    files, skipped = discover([tmp_path], [])
    assert [Path(file.path).name for file in files] == ["a.txt"]
    assert skipped == {"not a file": 3}
    with pytest.raises(UserError, match=r"self does not exist; give files or folders of text$"):
        discover([tmp_path / "self"], [])


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch) -> None:
    (tmp_path / "in" / "closed").mkdir(parents=True)
    (tmp_path / "in" / "a.txt").write_text("a")
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    stat = os.stat

    def kept_out(path, **options):  # as of all that is in a folder that may not be entered
        if str(path).endswith(("closed/request.json", "closed/meta.json")):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(os, "scandir", denied)
    monkeypatch.setattr(os, "stat", kept_out)
    with pytest.raises(UserError) as caught:
        discover([tmp_path / "in"], [])
    closed = tmp_path / "in" / "closed"
    assert str(caught.value) == (
        f"the folder {closed} cannot be listed (Permission denied); make it readable, or leave it out with "
        f"`prepare --exclude '{closed}/*'`"
    )
    files, skipped = discover([tmp_path / "in"], [f"{closed}/*"])
    assert [Path(file.path).name for file in files] == ["a.txt"]
    assert skipped == {"excluded": 1}


def test_what_an_earlier_prepare_wrote_is_left_out(tmp_path, tokenizer_file, write_data, capsys) -> None:
    corpus = tmp_path / "corp"
    data, half = write_data(corpus / "mine", {"train": [[5, 2]]}), corpus / "other.partial"
    (data / "notes.txt").write_text("in a prepared folder")
    (half / "parts").mkdir(parents=True)
    (half / "request.json").write_text('"a hash"')
    (corpus / "link").symlink_to(data)
    (corpus / "foreign").mkdir()
    (corpus / "foreign" / "meta.json").write_text('{"splits": "of somebody else"}')
    (corpus / "a.txt").write_text("text of its own\n" * 9)
    meta = prepare([corpus], tmp_path / "out", tokenizer=tokenizer_file, workers=1)
    assert meta["skipped"] == {"prepared data": 3}
    said = f"prepare: left out what an earlier `stepline prepare` wrote: {corpus / 'link'}, {data}, {half}\n"
    assert said in capsys.readouterr().err
    assert sum(split["bytes"] for split in meta["splits"].values()) == 9 * 16 + 30  # and the foreign one
    with pytest.raises(
        UserError, match=r"^`stepline prepare` wrote .*mine: give the text that it was made of$"
    ):
        prepare([data], tmp_path / "again", tokenizer=tokenizer_file, workers=1)
    assert json.loads((tmp_path / "out" / "meta.json").read_text()) == meta
