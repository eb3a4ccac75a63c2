"""A prepared data folder: its meta.json and its memory-mapped splits."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stepline.trainer.errors import UserError


@dataclass(frozen=True)
class SplitMeta:
    """Counts of one split, over all its shards."""

    documents: int
    tokens: int
    """End-of-document tokens included."""
    bytes: int
    """UTF-8 bytes of the documents' text."""
    shards: tuple[dict, ...]
    """{file, tokens, documents, crc32}"""

    def num_windows(self, seq_len: int) -> int:
        """Windows of seq_len + 1 tokens, seq_len apart, that lie within a shard."""
        return sum(max(shard["tokens"] - 1, 0) // seq_len for shard in self.shards)


@dataclass(frozen=True)
class Meta:
    """The content of meta.json."""

    path: Path
    fingerprint: str
    """Hash of the tokens, the tokenizer and the parameters."""
    vocab_size: int
    eod_id: int
    dtype: str
    tokenizer_path: Path
    tokenizer_sha256: str
    splits: dict[str, SplitMeta]


def load_meta(path: Path | str) -> Meta:
    """Read a data folder's meta.json and check that its shards have the sizes it says.

    Raises UserError when the folder is no prepared data folder or a shard is missing or cut off.
    """
    path = Path(path)
    file = path / "meta.json"
    if not file.is_file():
        raise UserError(f"{path} is no prepared data folder (no meta.json); run `stepline prepare`")
    try:
        raw = json.loads(file.read_text())
        meta = Meta(
            path=path,
            fingerprint=raw["fingerprint"],
            vocab_size=raw["vocab_size"],
            eod_id=raw["eod_id"],
            dtype=raw["dtype"],
            tokenizer_path=path / raw["tokenizer"]["file"],
            tokenizer_sha256=raw["tokenizer"]["sha256"],
            splits={
                name: SplitMeta(s["documents"], s["tokens"], s["bytes"], tuple(s["shards"]))
                for name, s in raw["splits"].items()
            },
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error!r}); run `stepline prepare` again") from error
    itemsize = np.dtype(meta.dtype).itemsize
    for split in meta.splits.values():
        for shard in split.shards:
            for name, size in (
                (shard["file"], shard["tokens"] * itemsize),
                (shard["file"].removesuffix(".bin") + ".idx", shard["documents"] * 8),
            ):
                actual = (path / name).stat().st_size if (path / name).is_file() else -1
                if actual != size:
                    state = "is missing" if actual < 0 else f"has {actual} bytes instead of {size}"
                    raise UserError(f"{path / name} {state}; copy it again or run `stepline prepare` again")
    return meta


def source_names(paths: Sequence[Path]) -> list[str]:
    """A name for each of several folders or files: its own, with as many of those above it as tell it from the others.

    Equal paths have equal names.
    """
    whole = [path.absolute().parts[1:] for path in paths]
    names = []
    for parts in whole:
        length = 1
        while length < len(parts) and any(
            other[-length:] == parts[-length:] and other != parts for other in whole
        ):
            length += 1
        names.append("/".join(parts[-length:]))
    return names


def load_sources(paths: Sequence[Path], vocab_size: int) -> list[Meta]:
    """meta.json of each data folder of a run; raises UserError where there is none, or it does not fit the model.

    vocab_size: rows of the model's embedding.
    """
    if not paths:
        raise UserError("the config names no data; set data.path to a folder written by `stepline prepare`")
    metas = [load_meta(path) for path in paths]
    for path, meta in zip(paths, metas):
        if meta.vocab_size > vocab_size:
            raise UserError(
                f"the tokenizer of {path} has {meta.vocab_size} tokens but model.vocab_size is {vocab_size}; "
                f"set it to at least {meta.vocab_size}"
            )
        if meta.tokenizer_sha256 != metas[0].tokenizer_sha256:
            raise UserError(f"{path} was prepared with another tokenizer than {paths[0]}")
    return metas


def load_for_run(paths: Sequence[Path], vocab_size: int, seq_len: int, eval_split: str) -> list[Meta]:
    """As `load_sources`; raises UserError too where a source has no window to train on, or no text to validate on."""
    metas = load_sources(paths, vocab_size)
    check_held_out(paths, metas, eval_split)
    check_windows(paths, metas, seq_len)
    return metas


def check_held_out(paths: Sequence[Path], metas: Sequence[Meta], split: str) -> None:
    """Raises UserError for a source without text in the split that a run validates on."""
    for path, meta in zip(paths, metas):
        if split not in meta.splits:
            splits = (
                f"its splits are {', '.join(meta.splits)}"
                if meta.splits
                else "it holds a tokenizer and no text"
            )
            raise UserError(f"{path} has no split '{split}'; {splits}")
        if meta.splits[split].tokens < 2:
            raise UserError(
                f"{path} has no tokens in '{split}' to evaluate; prepare it with a held-out share (--{split}-share)"
            )


def check_windows(paths: Sequence[Path], metas: Sequence[Meta], seq_len: int, split: str = "train") -> None:
    """Raises UserError for a source that does not fill one training window."""
    for path, meta in zip(paths, metas):
        if not meta.splits[split].num_windows(seq_len):
            raise UserError(
                f"{path} has {meta.splits[split].tokens} tokens in '{split}', fewer than seq_len {seq_len} + 1; "
                "prepare more text or lower data.seq_len"
            )


class TokenSplit:
    """One split of a data folder, memory-mapped; its shards in order form one sequence of tokens."""

    def __init__(self, path: Path | str, split: str = "train") -> None:
        """Open `split` of the data folder `path`; UserError when it is missing."""
        self.meta = load_meta(path)
        self.path, self.split = Path(path), split
        if split not in self.meta.splits:
            raise UserError(f"{path} has no split '{split}' (it has {', '.join(self.meta.splits)})")
        counts = self.meta.splits[split]
        self.num_tokens, self.num_documents, self.num_bytes = counts.tokens, counts.documents, counts.bytes
        self.vocab_size, self.eod_id = self.meta.vocab_size, self.meta.eod_id
        self._dtype = np.dtype(self.meta.dtype).newbyteorder("<")
        self._every_id_is_valid = self.vocab_size > np.iinfo(self._dtype).max
        self._files = [self.path / shard["file"] for shard in counts.shards]
        self._shards = [np.memmap(file, self._dtype, "r") for file in self._files]
        self._windows: dict[int, tuple[np.ndarray, list[np.ndarray]]] = {}
        self._lengths = np.array([len(shard) for shard in self._shards], np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._lengths)]).astype(np.int64)

    def document_ends(self) -> np.ndarray:
        """One past the last token (its end-of-document token) of each document, uint64 [documents]."""
        ends = [
            np.fromfile(file.with_suffix(".idx"), "<u8") + np.uint64(start)
            for file, start in zip(self._files, self._starts)
        ]
        return np.concatenate(ends) if ends else np.zeros(0, np.uint64)

    def windows_per_shard(self, seq_len: int) -> np.ndarray:
        """How many windows of seq_len + 1 tokens, seq_len apart, each shard holds: int64 [shards]."""
        return np.maximum(self._lengths - 1, 0) // seq_len

    def num_windows(self, seq_len: int) -> int:
        """Windows of the split; a shard's last (len - 1) % seq_len tokens are in none."""
        return int(self.windows_per_shard(seq_len).sum())

    def gather(self, window_indices: np.ndarray, seq_len: int) -> np.ndarray:
        """Tokens [n, seq_len + 1] of windows [n]: window i of a shard covers its tokens [i*S, i*S + S].

        Raises UserError for a token that is not in the vocabulary.
        """
        if seq_len not in self._windows:
            self._windows[seq_len] = self._window_views(seq_len)
        ends, views = self._windows[seq_len]
        if len(views) == 1:
            out = views[0][window_indices]
            self._check_ids(out, 0)
            return out
        indices = np.asarray(window_indices, np.int64)
        shard_of = np.searchsorted(ends, indices, side="right")
        out = np.empty((len(indices), seq_len + 1), self._dtype)
        for shard in np.unique(shard_of):
            rows = np.flatnonzero(shard_of == shard)
            out[rows] = part = views[shard][indices[rows] - (ends[shard - 1] if shard else 0)]
            self._check_ids(part, shard)
        return out

    def _check_ids(self, tokens: np.ndarray, shard: int) -> None:
        """Raises UserError for a token that is not in the vocabulary: the shard was damaged after `prepare`."""
        if self._every_id_is_valid or not tokens.size:
            return
        largest = np.maximum.reduce(tokens, axis=None)  # .max() costs more than its work in a small batch
        if largest >= self.vocab_size:
            raise UserError(
                f"{self._files[shard]} is damaged (it holds token {largest}, the vocabulary ends at "
                f"{self.vocab_size - 1}); copy it again or run `stepline prepare` again, then resume"
            )

    def _window_views(self, seq_len: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """Cumulative windows per shard, and each shard as overlapping windows [n, seq_len + 1]."""
        counts = self.windows_per_shard(seq_len)
        views = [
            np.lib.stride_tricks.as_strided(
                np.asarray(shard),
                (count, seq_len + 1),
                (seq_len * shard.itemsize, shard.itemsize),
                writeable=False,
            )
            for shard, count in zip(self._shards, counts)
        ]
        return np.cumsum(counts), views

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length) of the whole split, across shards; shorter at the end.

        Raises UserError for a token that is not in the vocabulary.
        """
        stop = min(start + length, self.num_tokens)
        pieces = []
        for i, (shard, begin) in enumerate(zip(self._shards, self._starts)):
            if begin < stop and begin + len(shard) > start:
                pieces.append(shard[max(start - begin, 0) : stop - begin])
                self._check_ids(pieces[-1], i)
        return np.concatenate(pieces) if pieces else np.zeros(0, self._dtype)
