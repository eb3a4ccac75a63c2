"""Cutting the input files into units of work, the same ones for any number of workers."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stepline.trainer.data.discover import InputFile
from stepline.trainer.data.parquet import group_sizes
from stepline.trainer.data.sources import (
    HEAD_BYTES,
    ReadOptions,
    Span,
    chunks,
    compression_of,
    cut_before,
    read_pieces,
    split_of,
)

FEW_TEXT_FILES = 50  # below this, whole-file splits would be empty or huge
SAMPLE_BYTES = 100_000_000  # of text for training a tokenizer
MIN_UNIT_BYTES, MAX_UNIT_BYTES = 1 << 18, 8 << 20  # of input; more units than workers, and few enough
LARGE_WHOLE, BYTES_OF_WHOLE = 100_000_000, 120  # a text that is encoded as one, and what a byte of it takes


def _find_cut(path: str, position: int) -> int:
    """The first line start at or after `position` (else the first space, else character boundary, else the end)."""
    near = b"".join(chunks(path, position - 1, position + HEAD_BYTES))
    if (line_end := near.find(b"\n")) >= 0:
        return position + line_end
    if (space := near.find(b" ", 1)) >= 0:
        return position - 1 + space
    step = next((i for i, byte in enumerate(near[1:]) if byte & 0xC0 != 0x80), len(near) - 1)
    return position + step


def _tail_cuts(path: str, size: int, options: ReadOptions) -> list[tuple[str, int]]:
    """[(split, end)] that hold out the tail of a text of `size` bytes: train, then tune, then val."""
    ends = []
    for split, share in (
        ("train", 1 - options.val_share - options.tune_share),
        ("tune", 1 - options.val_share),
        ("val", 1.0),
    ):
        if share == 1 or size < 2:  # one byte cannot be cut
            ends.append((split, size))
            continue
        position = min(max(1, round(size * share)), size - 1)
        cut = _find_cut(path, position)
        if cut >= size:  # the last line begins before the position
            low = max(0, position - HEAD_BYTES)
            near = b"".join(chunks(path, low, position + 1))
            cut = low + cut_before(near, position - low)
            while cut > low and near[cut - low] & 0xC0 == 0x80:
                cut -= 1
            cut = cut or size  # a single character is not cut
        ends.append((split, cut))
    return ends


def _text_spans(file: InputFile, tail: bool, unit_bytes: int, options: ReadOptions) -> Iterator[Span]:
    """A text file as spans: its tail held out when `tail`, ranges of unit_bytes when it is big."""
    seekable = compression_of(file.path) is None
    if not tail and (not seekable or file.size <= unit_bytes or options.whole):
        yield Span(file.path, "text")
        return
    size = file.size if seekable else sum(map(len, chunks(file.path)))
    if tail:
        documents = _tail_cuts(file.path, size, options)
    else:
        head = b"".join(chunks(file.path, 0, HEAD_BYTES))
        documents = [(split_of(head, options), size)]
    start = 0
    for split, end in documents:
        begin = start
        while begin < end:
            stop = end
            if seekable and not options.whole and end - begin > unit_bytes:
                stop = min(_find_cut(file.path, begin + unit_bytes), end)
            yield Span(file.path, "text", begin, stop, begin == start, stop == end, split)
            begin = stop
        start = max(start, end)


@dataclass(frozen=True)
class Plan:
    """The units of work, in the order of the output."""

    units: list[tuple[Span, ...]]
    weights: list[int]
    """Input bytes of each unit, for the progress bar."""
    rule: str
    """How documents are held out."""


def plan_units(files: Sequence[InputFile], options: ReadOptions) -> Plan:
    """Cut the files into units of up to 8 MiB: groups of small files, byte ranges of big ones, row groups.

    When there are fewer than FEW_TEXT_FILES text files, each one's tail is held out instead of whole files.
    """
    unit_bytes = min(max(sum(file.size for file in files) // 64, MIN_UNIT_BYTES), MAX_UNIT_BYTES)
    num_text = sum(file.format == "text" for file in files)
    tail = 0 < num_text < FEW_TEXT_FILES and options.val_share + options.tune_share > 0
    units: list[tuple[Span, ...]] = []
    weights: list[int] = []
    group: list[Span] = []
    grouped = 0

    def flush() -> None:
        nonlocal grouped
        if group:
            units.append(tuple(group))
            weights.append(grouped)
            group.clear()
            grouped = 0

    for file in files:
        if file.size == 0:
            continue
        if file.format == "parquet":
            sizes = group_sizes(file.path, options.text_key)
            parts = [(Span(file.path, "parquet", i), size) for i, size in enumerate(sizes)]
        elif file.format == "jsonl" and compression_of(file.path) is None:
            starts = range(0, file.size, unit_bytes)
            ends = [*starts[1:], file.size]
            parts = [(Span(file.path, "jsonl", a, b), b - a) for a, b in zip(starts, ends)]
        elif file.format == "jsonl":
            parts = [(Span(file.path, "jsonl"), file.size)]
        else:
            spans = _text_spans(file, tail, unit_bytes, options)
            parts = [(s, (file.size if s.end is None else s.end) - s.start) for s in spans]
        for span, size in parts:
            if grouped + size > unit_bytes:
                flush()
            group.append(span)
            grouped += size
    flush()
    rule = "documents by keyed hash of their first 64 KiB"
    if tail:
        rule = f"the tail of each text file (fewer than {FEW_TEXT_FILES} of them); other " + rule
    return Plan(units, weights, rule)


def large_whole(files: Sequence[InputFile], options: ReadOptions) -> str | None:
    """A sentence where a tokenizer that takes whole documents gets a large one."""
    large = max((f for f in files if f.format == "text"), key=lambda file: file.size, default=None)
    if not options.whole or large is None or large.size < LARGE_WHOLE:
        return None
    needs = f"{large.path} may need {large.size * BYTES_OF_WHOLE / 1e9:.0f} GB of memory"
    return (
        f"this tokenizer takes whole documents only: {needs}; cut it into documents (.jsonl), or give a sentencepiece "
        "model that keeps white space"
    )


def has_words(plan: Plan, options: ReadOptions) -> bool:
    """Whether any document holds more than white space; reads no further than the first one that does."""
    spans = (span for unit in plan.units for span in unit)
    return any(piece.text.strip() for span in spans for piece in read_pieces(span, options))


def sample_texts(plan: Plan, options: ReadOptions, budget: int = SAMPLE_BYTES) -> Iterator[str]:
    """Up to about `budget` bytes of training text from the beginnings of units, in a hashed order.

    The order depends on the seed alone; held-out documents are never part of it.
    """
    share = max(1 << 20, budget // max(1, len(plan.units)))
    key = options.seed.to_bytes(8, "little", signed=True)

    def rank(index: int) -> bytes:
        return hashlib.blake2b(index.to_bytes(8, "little"), digest_size=8, key=key).digest()

    for index in sorted(range(len(plan.units)), key=rank):
        left = min(share, budget)
        for span in plan.units[index]:
            for piece in read_pieces(span, options) if left > 0 else ():
                if piece.split == "train":
                    yield piece.text
                    left -= piece.num_bytes
                    budget -= piece.num_bytes
                if left <= 0:
                    break
        if budget <= 0:
            return
