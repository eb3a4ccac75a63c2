"""Finding the input files and cutting them into units of work, the same ones for any number of workers."""

import fnmatch
import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

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
from stepline.trainer.errors import UserError

FEW_TEXT_FILES = 50  # below this, whole-file splits would be empty or huge
SAMPLE_BYTES = 100_000_000  # of text for training a tokenizer
MIN_UNIT_BYTES, MAX_UNIT_BYTES = 1 << 18, 8 << 20  # of input; more units than workers, and few enough
LARGE_WHOLE, BYTES_OF_WHOLE = 100_000_000, 120  # a text that is encoded as one, and what a byte of it takes
BINARY_SUFFIXES = (
    ".7z .a .avi .bin .bmp .bz2 .class .dll .dylib .exe .gif .ico .idx .jar .jpeg .jpg .lz4 .mo .model .mp3 "
    ".mp4 .npy .npz .o .ogg .pdf .pickle .pkl .png .pt .pth .pyc .pyd .pyo .rar .safetensors .so .sqlite "
    ".tar .tgz .tif .tiff .ttf .wav .webp .whl .woff .woff2 .xz .zip"
)


@dataclass(frozen=True)
class InputFile:
    """An input file and its format (`text`, `jsonl` or `parquet`)."""

    path: str
    format: str
    size: int
    mtime_ns: int


def format_of(path: Path) -> str | None:
    """`text`, `jsonl`, `parquet`, or None for a suffix known to be binary."""
    suffixes = [s.lower() for s in path.suffixes]
    if compression_of(path):
        suffixes = suffixes[:-1]
    suffix = suffixes[-1] if suffixes else ""
    if suffix in BINARY_SUFFIXES.split():
        return None
    if suffix in (".jsonl", ".ndjson"):
        return "jsonl"
    return "parquet" if suffix == ".parquet" else "text"


def _walk(folder: Path, outside: Sequence[Path], entered: set[Path]) -> Iterator[Path]:
    """All files below, then those behind links to folders: each folder once, by its own name where it has one."""
    links, top = [], folder.resolve()
    entered.add(top)
    for root, folders, names in os.walk(folder):
        here, real = Path(root), []
        for name in sorted(folders):
            path = here / name
            if name.startswith(".") or name == "__pycache__" or path.resolve() in (*outside, *entered):
                continue
            if path.is_symlink():
                links.append(path)
            else:
                entered.add(path.resolve())
                real.append(name)
        folders[:] = real
        yield from (here / name for name in sorted(names) if not name.startswith("."))
    for link in links:
        # one that leads back up would take in what nobody gave
        if link.resolve() not in entered and not top.is_relative_to(link.resolve()):
            yield from _walk(link, outside, entered)


def discover(
    inputs: Sequence[Path], exclude: Sequence[str], outside: Sequence[Path] = ()
) -> tuple[list[InputFile], Counter]:
    """All input files, in the order given (folders sorted), and how many were left out and why.

    In folders, hidden files, known binary suffixes and files with a NUL byte in their first 64 KiB are left
    out; a file that is named must be readable. `outside` are folders never entered (the output).
    """
    files: dict[str, InputFile] = {}
    skipped: Counter = Counter()
    entered: set[Path] = set()

    def add(path: Path, named: bool) -> None:
        names = {path.as_posix(), path.resolve().as_posix()}
        if any(fnmatch.fnmatch(name, pattern) for name in names for pattern in exclude):
            skipped["excluded"] += 1
            return
        kind = format_of(path)
        if named and kind is None:
            raise UserError(f"{path} is a binary file; give text, .jsonl, .jsonl.gz, .jsonl.zst or .parquet")
        stat = path.stat() if path.exists() else None
        if stat is None or not path.is_file():  # a broken link, a socket
            skipped["not a file"] += 1
            return
        if not named and kind == "text" and compression_of(path) is None:
            with open(path, "rb") as file:
                kind = None if b"\0" in file.read(HEAD_BYTES) else kind
        if kind is None:
            skipped["binary"] += 1
            return
        files.setdefault(str(path.resolve()), InputFile(str(path), kind, stat.st_size, stat.st_mtime_ns))

    for path in map(Path, inputs):
        if path.is_dir():
            for file in _walk(path, outside, entered):
                add(file, named=False)
        elif path.is_file():
            add(path, named=True)
        else:
            raise UserError(f"{path} does not exist; give files or folders of text")
    return list(files.values()), skipped


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


def _parquet_sizes(path: str, text_key: str) -> list[int]:
    """Bytes of each row group's text column; UserError when there is no such column."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path} needs pyarrow: `pip install 'stepline[data]'`") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a sound Parquet file ({error}); download it again") from error
    if text_key not in schema.names:
        raise UserError(
            f"{path} has no column '{text_key}' (it has {', '.join(schema.names)}); name the right one"
        )
    kind = schema.field(text_key).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise UserError(f"{path}: the column '{text_key}' holds {kind}, not text; name the right one")
    groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
    return [max(1, group.total_byte_size) for group in groups]


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
            sizes = _parquet_sizes(file.path, options.text_key)
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
