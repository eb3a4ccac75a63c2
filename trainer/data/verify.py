"""Whether the shards on the disk are the ones that `stepline prepare` wrote: by the checksums in meta.json.

Only what a training reads is checked, the .bin files of its splits; the sizes of all files are checked by `load_meta`.
"""

import logging
import threading
import time
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stepline.trainer.config import Config
from stepline.trainer.data.dataset import Meta
from stepline.trainer.files import copy_key

START_BYTES = 8 * 10**9
"""What a rank reads at most before the first step under `data.verify=auto`."""
BLOCK_BYTES = 1 << 24
MEND = "copy it again or run `stepline prepare` again, then resume"

log = logging.getLogger("stepline")


@dataclass(frozen=True)
class ShardFile:
    """One file and what it should hold."""

    path: Path
    size: int
    """Bytes."""
    crc32: int | None
    """None in a folder that was written without checksums: then the size alone counts."""


def shard_files(metas: Sequence[Meta], splits: Sequence[str]) -> list[ShardFile]:
    """The .bin files of these splits of data folders, each once."""
    files = [
        ShardFile(
            meta.path / shard["file"], shard["tokens"] * np.dtype(meta.dtype).itemsize, shard.get("crc32")
        )
        for meta in metas
        for split in splits
        if split in meta.splits
        for shard in meta.splits[split].shards
    ]
    return list(dict.fromkeys(files))


def shares(files: Sequence[ShardFile], world_size: int) -> list[list[ShardFile]]:
    """Every rank's share: each file in exactly one of them, of about the same number of bytes, alike on all ranks."""
    parts: list[list[ShardFile]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for file in sorted(files, key=lambda file: -file.size):
        lightest = loads.index(min(loads))
        parts[lightest].append(file)
        loads[lightest] += file.size
    return parts


def check_file(file: ShardFile, stop: threading.Event | None = None, pace: bool = False) -> str | None:
    """What is wrong with the file, in words that go on from its name; None when nothing is or `stop` was set.

    pace: leave the disk and a core to others for half of the time.
    """
    crc = size = 0
    block = memoryview(bytearray(BLOCK_BYTES))
    try:
        with open(file.path, "rb", buffering=0) as source:
            while True:
                start = time.monotonic()
                read = source.readinto(block)
                if not read:
                    break
                size += read
                crc = zlib.crc32(block[:read], crc)
                if stop is not None and stop.wait(time.monotonic() - start if pace else 0):
                    return None
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if size != file.size:
        return f"has {size} bytes instead of {file.size}"
    if file.crc32 is not None and crc != file.crc32:
        return "is damaged (its checksum differs from meta.json)"
    return None


def verify_shards(meta: Meta, splits: Sequence[str], rank: int, world_size: int) -> list[str]:
    """Reads this rank's share of the shards of a data folder; what is wrong, a sentence for each file."""
    files = shares(shard_files([meta], splits), world_size)[rank]
    found = [(file, check_file(file)) for file in files]
    return [f"{file.path} {wrong}; {MEND}" for file, wrong in found if wrong is not None]


class Verifier:
    """The check of one rank's files, done when made or in a thread of its own; may be asked from any thread."""

    def __init__(
        self, files: Sequence[ShardFile], background: bool, held_out: Collection[ShardFile] = ()
    ) -> None:
        """held_out: those of the files that no step reads."""
        self.held_out = frozenset(held_out)
        self.background = background
        """Whether steps are made before the check is done; alike on all ranks that read the same files."""
        self._files = list(files)
        self._problem: str | None = None
        self.trained_on = False
        """Whether steps may have read what is wrong."""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if background:
            self._thread = threading.Thread(target=self._run, name="verify", daemon=True)
            self._thread.start()
        else:
            self._run()

    def problem(self) -> str | None:
        """The first thing that is wrong, in one sentence that says what to do; None while nothing is known.

        In the background the steps made so far may have read it.
        """
        return self._problem

    def report(self, problem: str, trained_on: bool) -> None:
        """Takes note of what a loader has found wrong; trained_on: in what steps read."""
        if self._problem is None or trained_on > self.trained_on:
            self.trained_on, self._problem = trained_on, problem

    @property
    def done(self) -> bool:
        """Whether every file was checked, up to the first that is wrong."""
        return self._thread is None or not self._thread.is_alive()

    def close(self) -> None:
        """Ends the thread; what it has not read stays unchecked."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        start = time.monotonic()
        for file in self._files:
            wrong = check_file(file, self._stop, pace=self.background)
            if self._stop.is_set():
                return
            if wrong is not None:
                self.report(f"{file.path} {wrong}; {MEND}", trained_on=file not in self.held_out)
                return
        if self._files:
            read, seconds = sum(file.size for file in self._files) / 1e6, time.monotonic() - start
            log.info("data: %.0f MB agree with their checksums (%.1f s)", read, seconds)


def copy_of(metas: Sequence[Meta]) -> list[tuple[int, int, int]]:
    """What tells a node's own copy of the data from another node's; nodes that share one have the same."""
    return [copy_key(meta.path / "meta.json") for meta in metas]


def sharers(copies: Sequence[object], rank: int) -> tuple[int, int]:
    """A rank's place among the ranks that read the same copy, and their number; copies: `copy_of` by rank. So every
    copy is checked."""
    same = [other for other, copy in enumerate(copies) if copy == copies[rank]]
    return same.index(rank), len(same)


def start_verifying(config: Config, metas: Sequence[Meta], rank: int, world_size: int) -> Verifier:
    """Checks this rank's share of the shards that the run reads, as `data.verify` says.

    In the mode `start` the result is there when this returns. rank, world_size: of the `sharers`.
    """
    mode = config.data.verify
    files = [] if mode == "off" else shard_files(metas, ("train", config.logging.eval_split))
    parts = shares(files, world_size)
    if mode == "auto":
        largest = max(sum(file.size for file in part) for part in parts)
        mode = "start" if largest <= START_BYTES else "background"
    held_out = set(shard_files(metas, (config.logging.eval_split,))) - set(shard_files(metas, ("train",)))
    return Verifier(parts[rank], background=mode == "background", held_out=held_out)
