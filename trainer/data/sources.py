"""Reading documents as a stream: text, JSON lines and Parquet, plain or compressed, in bounded memory."""

import gzip
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from stepline.trainer.data.parquet import group_texts
from stepline.trainer.errors import UserError

CHUNK_BYTES = 1 << 20
HEAD_BYTES = 1 << 16  # what a document's split depends on
PIECE_BYTES = 1 << 16  # sentencepiece is twice as fast on 64 KiB as on 1 MiB (its symbols stay in cache)
NULL = "null text"  # among the counts of what was left out


@dataclass(frozen=True)
class Span:
    """A part of an input file: bytes (after decompression) of text, or of JSON lines, or a row group."""

    path: str
    format: str
    """`text`, `jsonl` or `parquet`."""
    start: int = 0
    """First byte, or the row group's index. JSON lines belong to the span in which they begin."""
    end: int | None = None
    """One past the last byte; None is the end of the file."""
    first: bool = True
    """text: this span begins its document."""
    last: bool = True
    """text: this span ends its document."""
    split: str | None = None
    """text: the document's split where the plan has fixed it; None: by hash."""


@dataclass(frozen=True)
class ReadOptions:
    """How documents are read and split."""

    text_key: str = "text"
    val_share: float = 0.01
    tune_share: float = 0.0
    seed: int = 0
    whole: bool = False
    """Keep every document in one piece, for tokenizers whose pieces cannot be joined."""


@dataclass(frozen=True)
class Piece:
    """A stretch of a document."""

    text: str
    num_bytes: int
    split: str
    first: bool
    last: bool


def split_of(head: bytes, options: ReadOptions) -> str:
    """`val`, `tune` or `train`, by a keyed hash of a document's first HEAD_BYTES bytes.

    Equal documents fall into the same split.
    """
    key = options.seed.to_bytes(8, "little", signed=True)
    digest = hashlib.blake2b(head[:HEAD_BYTES], digest_size=8, key=key).digest()
    u = int.from_bytes(digest, "little") / 2**64
    if u < options.val_share:
        return "val"
    return "tune" if u < options.val_share + options.tune_share else "train"


def compression_of(path: str | Path) -> str | None:
    """`gz`, `zst` or None, by the file's name."""
    suffix = Path(path).suffix.lower()
    return {".gz": "gz", ".zst": "zst"}.get(suffix)


def chunks(path: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
    """Decompressed bytes [start, end) of a file, in chunks of about CHUNK_BYTES.

    Raises UserError when a compressed file is damaged or truncated.
    """
    compression = compression_of(path)
    if compression is None:
        with open(path, "rb") as file:
            file.seek(start)
            left = end - start if end is not None else None
            while data := file.read(CHUNK_BYTES if left is None else min(left, CHUNK_BYTES)):
                left = None if left is None else left - len(data)
                yield data
        return
    position = 0
    for data in _gzip_chunks(path) if compression == "gz" else _zstd_chunks(path):
        low, high = max(start - position, 0), len(data) if end is None else min(end - position, len(data))
        position += len(data)
        if low < high:
            yield data[low:high]
        if end is not None and position >= end:
            return


def _gzip_chunks(path: str) -> Iterator[bytes]:
    try:
        with gzip.open(path, "rb") as file:
            while data := file.read(CHUNK_BYTES):
                yield data
    except EOFError as error:
        raise UserError(f"{path} is truncated (gzip ends early); copy or download it again") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is not a sound gzip file ({error}); copy or download it again") from error


def _zstd_chunks(path: str) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise UserError(f"{path} needs zstandard: `pip install 'stepline[data]'`") from error
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame = None
    try:
        with open(path, "rb") as file:
            # zstd grows its input at most 32,768-fold: small reads bound what is in memory
            grown, size = [], 0
            while data := file.read(1 << 10):
                while data:
                    frame = frame or decompressor.decompressobj()
                    grown.append(frame.decompress(data))
                    size += len(grown[-1])
                    data = frame.unused_data if frame.eof else b""
                    frame = None if frame.eof else frame
                if size >= CHUNK_BYTES:
                    yield b"".join(grown)
                    grown, size = [], 0
            if size:
                yield b"".join(grown)
    except zstandard.ZstdError as error:
        raise UserError(f"{path} is not a sound zstd file ({error}); copy or download it again") from error
    if frame is not None:
        raise UserError(f"{path} is truncated (zstd ends early); copy or download it again")


def cut_before(data: bytes | bytearray, limit: int) -> int:
    """Where to cut `data` at or before `limit`: after a line end, else before a space, else between
    characters. Always > 0."""
    cut = data.rfind(b"\n", 0, limit) + 1 or data.rfind(b" ", 1, limit)
    if cut > 0:
        return cut
    cut = limit
    while cut > limit - 4 and cut > 1 and data[cut] & 0xC0 == 0x80:
        cut -= 1
    return cut


def text_blocks(stream: Iterable[bytes], path: str, offset: int = 0) -> Iterator[tuple[str, int]]:
    """Decode a stream of bytes into (text, bytes) of at most PIECE_BYTES, cut at line ends.

    Raises UserError with the file and the byte at which it stops being UTF-8.
    """

    def decode(block: bytes) -> tuple[str, int]:
        try:
            return block.decode("utf-8"), len(block)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path} is not UTF-8 text (byte {offset + error.start}); convert it or leave it out"
            ) from error

    pending = b""
    for data in stream:
        pending = pending + data if pending else data
        start = 0
        while len(pending) - start > PIECE_BYTES:
            block = pending[start : start + PIECE_BYTES + 1]
            cut = cut_before(block, PIECE_BYTES)
            yield decode(block[:cut])
            start += cut
            offset += cut
        pending = pending[start:]
    if pending:
        yield decode(pending)


def _text_pieces(span: Span, options: ReadOptions) -> Iterator[Piece]:
    stream = chunks(span.path, span.start, span.end)
    head = next(stream, b"")
    while len(head) < HEAD_BYTES and (data := next(stream, b"")):
        head += data
    split = span.split or split_of(head, options)

    def with_head() -> Iterator[bytes]:
        yield head
        yield from stream

    blocks = text_blocks(with_head(), span.path, span.start)
    if options.whole:
        texts = list(blocks)
        joined = "".join(text for text, _ in texts), sum(size for _, size in texts)
        blocks = iter([joined] if joined[0] else [])
    first, held = span.first, next(blocks, None)
    while held is not None:
        following = next(blocks, None)
        yield Piece(*held, split, first, span.last and following is None)
        first, held = False, following


def _lines(span: Span) -> Iterator[tuple[int, bytes]]:
    """(index of the line within the span, line) of all lines that begin within the span."""
    start, end = span.start, span.end
    if start:
        start -= 1  # the byte before tells whether a line begins here
    pending: list[bytes] = []
    position, index = start, 0
    skipping = span.start > 0
    for data in chunks(span.path, start):
        begin = 0
        while (stop := data.find(b"\n", begin)) >= 0:
            if skipping:
                skipping = False
            else:
                yield index, b"".join([*pending, data[begin:stop]])
                index += 1
            pending.clear()
            begin = stop + 1
            if end is not None and position + begin >= end:
                return
        if not skipping:
            pending.append(data[begin:])
        position += len(data)
    if any(pending):
        yield index, b"".join(pending)


def _json_texts(span: Span, options: ReadOptions) -> Iterator[str | None]:
    """The text of each line, None for a null."""
    for index, line in _lines(span):
        if span.start == 0 and index == 0:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        problem, remedy = None, "mend or remove the line"
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError:
            problem = "is not UTF-8"
        except (ValueError, RecursionError) as error:
            problem = f"is not JSON ({error})"
        else:
            if not isinstance(row, dict):
                problem = "is not a JSON object"
            elif not isinstance(row.get(options.text_key, 0), str | None):
                has = ", ".join(row) or "no keys"
                problem = f"has no text under '{options.text_key}' (it has {has})"
                remedy = f"name the key with --text-key, or {remedy}"
            else:
                yield row[options.text_key]
        if problem:
            line_number = 1 + index
            if span.start:
                before = sum(data.count(b"\n") for data in chunks(span.path, 0, span.start - 1))
                line_number += before + 1
            raise UserError(f"{span.path}:{line_number} {problem}; {remedy}")


def read_pieces(span: Span, options: ReadOptions, skipped: Counter | None = None) -> Iterator[Piece]:
    """The non-empty documents of a span, long ones in pieces of about PIECE_BYTES cut at line ends.

    Rows whose text is null are none; `skipped` counts them. Raises UserError, naming the file and the place, for
    anything that is not valid text.
    """
    if span.format == "text":
        yield from _text_pieces(span, options)
        return
    jsonl, skipped = span.format == "jsonl", Counter() if skipped is None else skipped
    texts = _json_texts(span, options) if jsonl else group_texts(span.path, span.start, options.text_key)
    for text in texts:
        if text is None:
            skipped[NULL] += 1
            continue
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"{span.path} has a text that is not valid Unicode (lone surrogate in {text[:40]!a}…); mend it"
            ) from error
        if not data:
            continue
        split = split_of(data, options)
        if options.whole or len(data) <= PIECE_BYTES:
            yield Piece(text, len(data), split, True, True)
            continue
        blocks = list(text_blocks([data], span.path))
        for i, (block, size) in enumerate(blocks):
            yield Piece(block, size, split, i == 0, i == len(blocks) - 1)
