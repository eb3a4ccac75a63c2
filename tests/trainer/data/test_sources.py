import gzip
import json
import random
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepline.trainer.data import sources
from stepline.trainer.data.sources import ReadOptions, Span, chunks, read_pieces, split_of, text_blocks
from stepline.trainer.data.units import InputFile, discover, format_of, large_whole, plan_units, sample_texts
from stepline.trainer.errors import UserError

zstandard = pytest.importorskip("zstandard")
OPTIONS = ReadOptions()


def documents(spans: list[Span], options: ReadOptions = OPTIONS) -> list[tuple[str, str]]:
    """(split, text) of the documents, put together from their pieces."""
    found, parts = [], []
    for span in spans:
        for piece in read_pieces(span, options):
            assert piece.num_bytes == len(piece.text.encode())
            assert piece.first == (not parts)
            parts.append(piece.text)
            if piece.last:
                found.append((piece.split, "".join(parts)))
                parts = []
    assert not parts
    return found


def planned(paths: list[Path], options: ReadOptions = OPTIONS) -> list[Span]:
    return [span for unit in plan_units(discover(paths, [])[0], options).units for span in unit]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text(st.sampled_from("aé数🙂 \n\r"), max_size=300), max_size=6).map("".join),
    st.integers(8, 64),
    st.integers(1, 100),
)
def test_blocks_join_to_the_text_and_are_cut_at_line_ends(text: str, size: int, chunk: int) -> None:
    data = text.encode()
    stream = (data[i : i + chunk] for i in range(0, len(data), chunk))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PIECE_BYTES", size)
        blocks = list(text_blocks(stream, "x"))
    assert "".join(block for block, _ in blocks) == text
    for block, num_bytes in blocks[:-1]:
        assert num_bytes == len(block.encode()) <= size
        assert block.endswith("\n") or "\n" not in block


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text(st.sampled_from("aé \u2028\r"), max_size=30), max_size=12),
    st.integers(1, 60),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
)
def test_json_lines_cut_into_any_ranges_give_each_line_once(
    tmp_path_factory, texts: list[str], size: int, newline: str, final: bool
) -> None:
    path = tmp_path_factory.mktemp("j") / "x.jsonl"
    lines = newline.join(json.dumps({"text": text}) for text in texts)
    path.write_bytes((lines + (newline if final else "")).encode())
    total = path.stat().st_size
    spans = [Span(str(path), "jsonl", a, min(a + size, total)) for a in range(0, total, size)]
    assert [text for _, text in documents(spans)] == [text for text in texts if text]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_all_compressions_read_the_same(tmp_path, kind: str, suffix: str) -> None:
    rng = random.Random(0)
    texts = [f"line {rng.randrange(10**9)} é\n" * rng.randrange(1, 4000) for _ in range(60)]
    for i, text in enumerate(
        texts if kind == "txt" else ["".join(json.dumps({"text": t}) + "\n" for t in texts)]
    ):
        data = text.encode()
        half = len(data) // 2
        pack = {"": lambda d: d, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
        # two members / frames one after the other are one stream
        (tmp_path / f"{i:02d}.{kind}{suffix}").write_bytes(pack(data[:half]) + pack(data[half:]))
    found = documents(planned([tmp_path]))
    assert [text for _, text in found] == texts
    assert [split for split, _ in found] == [split_of(text.encode(), OPTIONS) for text in texts]


def test_big_text_is_cut_into_ranges_of_one_document(tmp_path) -> None:
    rng = random.Random(0)
    text = "".join("é" * rng.randrange(200) + "\n" for _ in range(40_000))
    (tmp_path / "big.txt").write_text(text)
    for i in range(60):
        (tmp_path / f"small{i}.txt").write_text(f"{i}\n")
    spans = planned([tmp_path])
    assert sum(span.path.endswith("big.txt") for span in spans) > 8
    found = documents(spans)
    assert len(found) == 61
    assert ("train", text) in found


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    "text",
    [
        "".join(f"line {i}\n" for i in range(5000)),
        "word " * 5000,
        "é" * 5000,
        "\r\n".join(map(str, range(5000))),
    ],
)
def test_tail_of_a_few_text_files_is_held_out_at_line_ends(tmp_path, text: str, suffix: str) -> None:
    path = tmp_path / f"input.txt{suffix}"
    path.write_bytes(gzip.compress(text.encode()) if suffix else text.encode())
    options = ReadOptions(val_share=0.1, tune_share=0.05)
    found = documents(planned([path], options), options)
    assert [split for split, _ in found] == ["train", "tune", "val"]
    assert "".join(part for _, part in found) == text
    sizes = [len(part.encode()) / len(text.encode()) for _, part in found]
    assert sizes == pytest.approx([0.85, 0.05, 0.1], abs=0.01)
    if "\n" in text:
        assert all(part.endswith("\n") for _, part in found[:2])


def test_tail_of_a_few_lines(tmp_path) -> None:
    path = tmp_path / "input.txt"
    path.write_text("first\nsecond\nthird line\n")
    assert documents(planned([path])) == [("train", "first\nsecond\n"), ("val", "third line\n")]


def test_split_is_by_content_and_of_the_asked_share() -> None:
    options = ReadOptions(val_share=0.1, tune_share=0.05, seed=3)
    splits = [split_of(str(i).encode(), options) for i in range(20_000)]
    assert splits == [split_of(str(i).encode(), options) for i in range(20_000)]
    assert splits.count("val") / 20_000 == pytest.approx(0.1, abs=0.01)
    assert splits.count("tune") / 20_000 == pytest.approx(0.05, abs=0.01)
    other = [split_of(str(i).encode(), ReadOptions(val_share=0.1, seed=4)) for i in range(20_000)]
    assert sum(a == b == "val" for a, b in zip(splits, other)) / 20_000 == pytest.approx(0.01, abs=0.005)
    head = b"x" * sources.HEAD_BYTES
    assert split_of(head + b"1", options) == split_of(head + b"2", options)


def test_parquet_row_groups(tmp_path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    texts = [f"text {i} é" for i in range(100)] + [None, ""]
    table = pyarrow.table({"id": range(102), "body": texts})
    parquet.write_table(table, tmp_path / "x.parquet", row_group_size=17)
    options = ReadOptions(text_key="body")
    assert [text for _, text in documents(planned([tmp_path], options), options)] == texts[:100]
    with pytest.raises(UserError, match=r"x\.parquet has no column 'text' \(it has id, body\)"):
        planned([tmp_path])
    with pytest.raises(UserError, match="holds int64, not text"):
        planned([tmp_path], ReadOptions(text_key="id"))
    (tmp_path / "x.parquet").write_bytes((tmp_path / "x.parquet").read_bytes()[:-100])
    with pytest.raises(UserError, match="not a sound Parquet file"):
        planned([tmp_path], options)


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


def test_tokenizer_sample_holds_training_text_only_and_is_bounded(tmp_path) -> None:
    lines = [f"{'held' if i >= 900 else 'kept'} {i} " + "x" * 5000 for i in range(1000)]
    (tmp_path / "input.txt").write_text("\n".join(lines) + "\n")
    options = ReadOptions(val_share=0.1)
    plan = plan_units(discover([tmp_path], [])[0], options)
    everything = "".join(sample_texts(plan, options)).split("\n")
    assert set(lines[:900]) <= set(everything)
    assert sum(line in everything for line in lines[900:]) <= 1
    some = "".join(sample_texts(plan, options, budget=500_000))
    assert 500_000 <= len(some) < 500_000 + sources.PIECE_BYTES
    assert some == "".join(sample_texts(plan, options, budget=500_000))


@pytest.mark.parametrize("kind", ["txt", "jsonl", "txt.gz", "jsonl.gz", "jsonl.zst"])
def test_reading_takes_constant_memory(tmp_path, kind: str) -> None:
    rng = random.Random(0)
    data = b"".join(b'{"text": "%s"}\n' % rng.randbytes(500).hex().encode() for _ in range(10_000))  # 10 MB
    pack = {"gz": lambda d: gzip.compress(d, 1), "zst": zstandard.compress}.get(kind[-3:].strip("."), bytes)
    path = tmp_path / f"x.{kind}"
    path.write_bytes(pack(data))
    size = len(data)
    del data
    span = Span(str(path), kind.split(".")[0].replace("txt", "text"))
    tracemalloc.start()
    count = sum(1 for _ in read_pieces(span, OPTIONS))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count >= size / sources.PIECE_BYTES
    assert peak < 6 * sources.CHUNK_BYTES


def test_chunks_of_a_range(tmp_path) -> None:
    data = random.Random(0).randbytes(3_000_000)
    (tmp_path / "x").write_bytes(data)
    (tmp_path / "x.gz").write_bytes(gzip.compress(data, 1))
    for name in ("x", "x.gz"):
        for start, end in ((0, None), (5, 2_500_000), (1_048_576, 1_048_577), (2_999_999, None), (10, 10)):
            assert b"".join(chunks(str(tmp_path / name), start, end)) == data[start:end]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text(st.sampled_from("aé数🙂 \n"), max_size=12), min_size=1, max_size=3),
    st.floats(0, 0.6),
    st.floats(0, 0.3),
)
def test_tails_of_short_files_are_cut_between_characters(
    tmp_path_factory, texts, val_share, tune_share
) -> None:
    folder = tmp_path_factory.mktemp("short")
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_bytes(text.encode())
    options = ReadOptions(val_share=val_share, tune_share=tune_share)
    found = documents(planned([folder], options), options)
    assert "".join(text for _, text in found) == "".join(texts)


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


def test_a_large_text_for_a_tokenizer_that_takes_documents_whole() -> None:
    files = [
        InputFile("a.txt", "text", 10**7, 0),
        InputFile("b.txt", "text", 10**9, 0),
        InputFile("c", "jsonl", 10**10, 0),
    ]
    assert large_whole(files, ReadOptions()) is None
    told = large_whole(files, ReadOptions(whole=True))
    assert told.startswith("this tokenizer takes whole documents only: b.txt may need 120 GB of memory; ")
    assert large_whole(files[:1], ReadOptions(whole=True)) is large_whole([], ReadOptions(whole=True)) is None
