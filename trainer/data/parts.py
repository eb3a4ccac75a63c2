"""What a worker writes (parts, one per unit of work) and how parts are joined into shards."""

import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np

from stepline.trainer.data.sources import Piece, ReadOptions, Span, read_pieces
from stepline.trainer.data.tokenizer import Tokenizer
from stepline.trainer.errors import UserError

SPLITS = ("train", "val", "tune")
SHARD_TOKENS = 1 << 28
BATCH_BYTES = 1 << 20
COPY_BYTES = 1 << 22


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def batches(pieces: Iterable[Piece], size: int = BATCH_BYTES) -> Iterator[list[Piece]]:
    """Lists of pieces of about `size` bytes of text."""
    batch, total = [], 0
    for piece in pieces:
        batch.append(piece)
        total += piece.num_bytes
        if total >= size:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def encode_unit(
    index: int,
    spans: Sequence[Span],
    options: ReadOptions,
    tokenizer: Tokenizer,
    folder: Path,
    keep_going: Callable[[], None] = lambda: None,
) -> None:
    """Tokenise a unit of work into `folder`: tokens and document ends of each split, then a summary.

    The summary, `INDEX.json`, is renamed into place last: a unit counts when it is there. `keep_going` is
    called once a batch and raises to give up.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    totals = {split: {"documents": 0, "tokens": 0, "bytes": 0} for split in SPLITS}
    hashes = {split: hashlib.sha256() for split in SPLITS}
    own, skipped = folder / f"{index:08d}.{os.getpid()}", Counter()
    with ExitStack() as stack:
        files: dict[str, tuple] = {}

        def write(split: str, pieces: list[Piece], ids: list[list[int]]) -> None:
            total = totals[split]
            lengths = np.fromiter(map(len, ids), np.uint64, len(ids))
            flat = np.fromiter(chain.from_iterable(ids), dtype, int(lengths.sum()))
            ends = np.uint64(total["tokens"]) + np.cumsum(lengths, dtype=np.uint64)
            ends = ends[np.fromiter((piece.last for piece in pieces), bool, len(pieces))]
            if split not in files:
                files[split] = tuple(
                    stack.enter_context(open(f"{own}.{split}.{kind}", "wb")) for kind in ("bin", "idx")
                )
            data = flat.tobytes()
            files[split][0].write(data)
            files[split][1].write(ends.astype("<u8").tobytes())
            hashes[split].update(data)
            total["tokens"] += len(flat)
            total["documents"] += len(ends)
            total["bytes"] += sum(piece.num_bytes for piece in pieces)

        for batch in batches(chain.from_iterable(read_pieces(span, options, skipped) for span in spans)):
            keep_going()
            encoded = tokenizer.encode_pieces([p.text for p in batch], [p.first for p in batch])
            for piece, ids in zip(batch, encoded):
                if piece.last:
                    ids.append(tokenizer.eod_id)
            for split in SPLITS:
                chosen = [i for i, piece in enumerate(batch) if piece.split == split]
                if chosen:
                    write(split, [batch[i] for i in chosen], [encoded[i] for i in chosen])
    for split in files:
        for kind in ("bin", "idx"):
            os.replace(f"{own}.{split}.{kind}", folder / f"{index:08d}.{split}.{kind}")
    summary = {split: total | {"sha256": hashes[split].hexdigest()} for split, total in totals.items()}
    Path(f"{own}.summary.json").write_text(json.dumps(summary | {"skipped": skipped}))
    os.replace(f"{own}.summary.json", folder / f"{index:08d}.json")


@dataclass
class SplitProgress:
    """How much of a split has been joined into shards."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    shards: list[dict] = field(default_factory=list)
    """{file, tokens, documents, crc32} of each shard, the last one growing."""
    content: str = ""
    """Chained hash of the parts' hashes."""


class ShardWriter:
    """Appends parts, in the order of the units, to the shards of a folder; goes on after a kill.

    `joined.json` says how far the shards are valid: what was written after it is cut off on opening.
    """

    def __init__(self, folder: Path, parts: Path, dtype: np.dtype, shard_tokens: int = SHARD_TOKENS) -> None:
        """Open `folder`, which may hold the shards of a killed run."""
        self.folder, self.parts, self.dtype, self.shard_tokens = folder, parts, dtype, shard_tokens
        self.next_unit = 0
        self.splits = {split: SplitProgress() for split in SPLITS}
        self.skipped: Counter = Counter()
        """What was left out of the parts, and why."""
        self._state = folder / "joined.json"
        self._done: list[Path] = []
        if self._state.exists():
            state = json.loads(self._state.read_text())
            self.next_unit = state["next_unit"]
            self.splits = {split: SplitProgress(**state["splits"][split]) for split in SPLITS}
            self.skipped = Counter(state.get("skipped"))  # an older version wrote none
        shards = {shard["file"]: shard for split in self.splits.values() for shard in split.shards}
        empty = {"tokens": 0, "documents": 0}
        for file in [*folder.glob("*-*.bin"), *folder.glob("*-*.idx")]:
            shard = shards.get(file.with_suffix(".bin").name, empty)
            tokens = file.suffix == ".bin"
            os.truncate(file, shard["tokens"] * dtype.itemsize if tokens else shard["documents"] * 8)

    def ready(self) -> bool:
        """Whether the next unit's part is there."""
        return (self.parts / f"{self.next_unit:08d}.json").exists()

    def append(self) -> None:
        """Append the next unit's part to the shards."""
        summary_file = self.parts / f"{self.next_unit:08d}.json"
        summary = json.loads(summary_file.read_text())
        self.skipped += Counter(summary.pop("skipped", None))
        for split, total in summary.items():
            progress = self.splits[split]
            if total["tokens"]:
                part = self.parts / f"{self.next_unit:08d}.{split}.bin"
                self._append_part(split, part, total["tokens"])
                self._done += [part, part.with_suffix(".idx")]
                progress.content = hashlib.sha256((progress.content + total["sha256"]).encode()).hexdigest()
            for key in ("documents", "tokens", "bytes"):
                setattr(progress, key, getattr(progress, key) + total[key])
        self._done.append(summary_file)
        self.next_unit += 1

    def _append_part(self, split: str, part: Path, num_tokens: int) -> None:
        ends = np.fromfile(part.with_suffix(".idx"), "<u8")
        shards, start = self.splits[split].shards, 0
        while start < num_tokens:
            room = self.shard_tokens - (shards[-1]["tokens"] if shards else self.shard_tokens)
            inside = ends[(ends > start) & (ends <= start + room)]
            whole = num_tokens - start <= room
            # a new shard for a part that would fit in one, and where not one document fits in the room left
            if not whole and (
                num_tokens - start <= self.shard_tokens
                or room == 0
                or (not len(inside) and room < self.shard_tokens)
            ):
                name = f"{split}-{len(shards):05d}.bin"
                shards.append({"file": name, "tokens": 0, "documents": 0, "crc32": 0})
                continue
            stop = num_tokens if whole else int(inside[-1]) if len(inside) else start + room
            shard = shards[-1]
            chosen = ends[(ends > start) & (ends <= stop)] - np.uint64(start) + np.uint64(shard["tokens"])
            with open(part, "rb") as source, open(self.folder / shard["file"], "ab") as file:
                source.seek(start * self.dtype.itemsize)
                left = (stop - start) * self.dtype.itemsize
                while left:
                    data = source.read(min(left, COPY_BYTES))
                    if not data:
                        raise UserError(f"{part} is cut off (a crash?); remove {self.folder} and start again")
                    shard["crc32"] = zlib.crc32(data, shard["crc32"])
                    file.write(data)
                    left -= len(data)
            with open((self.folder / shard["file"]).with_suffix(".idx"), "ab") as file:
                file.write(chosen.astype("<u8").tobytes())
            shard["tokens"] += stop - start
            shard["documents"] += len(chosen)
            start = stop

    def commit(self) -> None:
        """Make everything appended so far survive a kill, and drop the parts it came from."""
        if not self._done:
            return
        for progress in self.splits.values():
            for shard in progress.shards[-1:]:
                for suffix in (".bin", ".idx"):
                    with open((self.folder / shard["file"]).with_suffix(suffix), "rb+") as file:
                        os.fsync(file.fileno())
        splits = {split: asdict(progress) for split, progress in self.splits.items()}
        write_json(self._state, {"next_unit": self.next_unit, "splits": splits, "skipped": self.skipped})
        for path in self._done:
            path.unlink()
        self._done.clear()


def write_json(path: Path, value: object) -> None:
    """Write JSON so that the file is either the old one or the whole new one."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
