import gzip
import json
import random
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepline.trainer.data import sources
from stepline.trainer.data.discover import InputFile, discover
from stepline.trainer.data.sources import ReadOptions, Span, chunks, read_pieces, split_of, text_blocks
from stepline.trainer.data.units import large_whole, plan_units, sample_texts

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
