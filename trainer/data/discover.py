"""Finding the input files: which there are, of which format, and which are left out."""

import fnmatch
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from stepline.trainer.data.sources import HEAD_BYTES, compression_of
from stepline.trainer.errors import UserError

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


def is_prepared(folder: Path) -> bool:
    """Whether `stepline prepare` wrote the folder, or has begun to: by what is in it."""
    # not Path's, which raise where a folder may not be entered
    if os.path.isfile(folder / "request.json") and os.path.isdir(folder / "parts"):
        return True
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(meta, dict) and {"fingerprint", "eod_id", "tokenizer", "splits"} <= meta.keys()


def _real(path: Path) -> Path:
    """Where links lead; unlike Path.resolve, of those in a circle too."""
    return Path(os.path.realpath(path))


def _walk(
    folder: Path, outside: Sequence[Path], entered: set[Path], prepared: list[Path], unlisted: Callable
) -> Iterator[Path]:
    """All files below, then those behind links to folders: each folder once, by its own name where it has one.

    prepared: takes the folders of prepared data, which are not entered. unlisted: of os.walk, onerror.
    """
    links, top = [], _real(folder)
    entered.add(top)
    for root, folders, names in os.walk(folder, onerror=unlisted):
        here, real = Path(root), []
        for name in sorted(folders):
            path = here / name
            if name.startswith(".") or name == "__pycache__":
                continue
            target = _real(path)
            if target in outside or target in entered:
                continue
            if is_prepared(path):
                prepared.append(path)
            elif path.is_symlink():
                links.append(path)
            else:
                entered.add(target)
                real.append(name)
        folders[:] = real
        yield from (here / name for name in sorted(names) if not name.startswith("."))
    for link in links:
        # one that leads back up would take in what nobody gave
        if _real(link) not in entered and not top.is_relative_to(_real(link)):
            yield from _walk(link, outside, entered, prepared, unlisted)


def discover(
    inputs: Sequence[Path],
    exclude: Sequence[str],
    outside: Sequence[Path] = (),
    prepared: list[Path] | None = None,
) -> tuple[list[InputFile], Counter]:
    """All input files, in the order given (folders sorted), and how many were left out and why.

    In folders, hidden files, known binary suffixes, files with a NUL byte in their first 64 KiB and folders of
    prepared data, which `prepared` takes, are left out; a file that is named must be readable. `outside` are folders
    never entered (the output).
    """
    prepared = [] if prepared is None else prepared
    files: dict[str, InputFile] = {}
    skipped: Counter = Counter()
    entered: set[Path] = set()

    def excluded(path: Path, end: str = "") -> bool:
        names = {path.as_posix() + end, _real(path).as_posix() + end}
        return any(fnmatch.fnmatch(name, pattern) for name in names for pattern in exclude)

    def unlisted(error: OSError) -> None:
        if not excluded(folder := Path(error.filename), "/"):
            raise UserError(
                f"the folder {folder} cannot be listed ({error.strerror}); make it readable, or leave it out with "
                f"`prepare --exclude '{folder}/*'`"
            )
        skipped["excluded"] += 1

    def add(path: Path, named: bool) -> None:
        if excluded(path):
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
        files.setdefault(str(_real(path)), InputFile(str(path), kind, stat.st_size, stat.st_mtime_ns))

    for path in map(Path, inputs):
        if path.is_dir():
            if is_prepared(path):
                raise UserError(f"`stepline prepare` wrote {path}: give the text that it was made of")
            for file in _walk(path, outside, entered, prepared, unlisted):
                add(file, named=False)
        elif path.is_file():
            add(path, named=True)
        else:
            raise UserError(f"{path} does not exist; give files or folders of text")
    if prepared:
        skipped["prepared data"] = len(prepared)
    return list(files.values()), skipped
