"""Batches for training: shuffled, resumable at any world size, prefetched."""

import math
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stepline.trainer.data.dataset import TokenSplit, check_windows
from stepline.trainer.data.order import OrderBlock, SampleOrder
from stepline.trainer.errors import UserError

IGNORE = -100  # target without loss, as in torch.nn.functional.cross_entropy
ORDER_BLOCK = 8192  # samples whose order is computed at once, in corpora that have as many


@dataclass
class Batch:
    """One rank's share of a global batch."""

    inputs: Tensor
    """[accum, micro_batch, seq] int64"""
    targets: Tensor
    """[accum, micro_batch, seq] int64, -100 where there is no loss"""
    doc_ids: Tensor | None
    """[accum, micro_batch, seq] int32: documents that ended before the position, within the window"""
    state: dict
    """The loader's state after this batch."""
    valid: int | None = None
    """Targets with loss of the global batch, over all ranks; None: to be counted."""


def to_batch(
    tokens: np.ndarray, shape: tuple[int, int], eod_id: int, confine_attention: bool, state: dict,
    valid: int | None = None,
) -> Batch:  # fmt: skip
    """Batch of [accum, micro_batch] windows from tokens [n, seq + 1]; missing rows have no targets."""
    rows, filled, seq_len = shape[0] * shape[1], len(tokens), tokens.shape[1] - 1
    inputs, targets = np.empty((2, rows, seq_len), np.int64)
    inputs[:filled], targets[:filled] = tokens[:, :-1], tokens[:, 1:]
    if filled < rows:
        inputs[filled:], targets[filled:] = 0, IGNORE
    doc_ids = None
    if confine_attention:
        ended = (inputs == eod_id).astype(np.int32)
        doc_ids = torch.from_numpy((np.cumsum(ended, 1, np.int32) - ended).reshape(*shape, seq_len))
    x, y = (torch.from_numpy(array.reshape(*shape, seq_len)) for array in (inputs, targets))
    return Batch(x, y, doc_ids, state, valid)


class TrainLoader:
    """Endless shuffled batches of one rank, over one data folder or a weighted mixture of several.

    The global order of samples depends on the seed alone; step t takes samples [t * G, (t + 1) * G) and rank
    r a contiguous share of them, so the state (a sample index and a count for each source) fits any world
    size. Each window of a source comes once per epoch. When G does not divide into world_size * micro_batch,
    the last micro-batches are filled with rows whose targets are all -100. A thread prepares batches ahead;
    `state_dict` counts consumed ones only. Iterate in one thread, and `close` at the end.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Path | str, float]],
        *,
        seq_len: int,
        batch_windows: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        confine_attention: bool = False,
        prefetch: int = 2,
        split: str = "train",
        on_damage: Callable[[str, bool], None] | None = None,
    ) -> None:
        """`sources`: (data folder, mixture weight). Raises UserError when a folder is none or too small.

        on_damage: told of damaged data, and whether steps read it, in place of an exception, while batches without
        targets are handed out: a rank that ended alone would leave the others in a collective.
        """
        self.on_damage = on_damage
        self.splits = [TokenSplit(path, split) for path, _ in sources]
        if not sources:
            raise UserError("data.sources is empty; name at least one data folder")
        for (path, weight), tokens in zip(sources, self.splits):
            if not weight > 0:
                raise UserError(f"{path} has mixture weight {weight}; give a weight above 0 or leave it out")
            check_windows([path], [tokens.meta], seq_len, split)
            if tokens.eod_id != self.splits[0].eod_id or tokens.meta.tokenizer_sha256 != (
                self.splits[0].meta.tokenizer_sha256
            ):
                raise UserError(
                    f"{path} and {sources[0][0]} have different tokenizers; prepare both with the same one"
                )
        self.seq_len, self.batch_windows, self.micro_batch = seq_len, batch_windows, micro_batch
        self.seed, self.confine_attention, self.prefetch = seed, confine_attention, prefetch
        self.accum = math.ceil(batch_windows / (world_size * micro_batch))
        self.num_windows = [tokens.num_windows(seq_len) for tokens in self.splits]
        # this rank's part of every global batch
        self._low, self._high = (r * batch_windows // world_size for r in (rank, rank + 1))
        self._order = SampleOrder(self.num_windows, [weight for _, weight in sources], seed)
        self._identity = {
            "seed": seed,
            "seq_len": seq_len,
            "sources": [[t.meta.fingerprint, float(w)] for t, (_, w) in zip(self.splits, sources)],
        }
        self._sample, self._counts = 0, [0] * len(sources)
        self._thread: threading.Thread | None = None
        self._producer: Iterator[Batch] | None = None
        self._new_queues()

    def _new_queues(self) -> None:
        # Two of C's queues: what is ready, and a None for each batch that may still be put there.
        self._ready: queue.SimpleQueue = queue.SimpleQueue()
        self._room: queue.SimpleQueue = queue.SimpleQueue()
        for _ in range(self.prefetch):
            self._room.put(None)
        self._stop = threading.Event()

    def _state(self, sample: int, counts: Sequence[int]) -> dict:
        return {**self._identity, "sample": int(sample), "counts": [int(c) for c in counts]}

    def state_dict(self) -> dict:
        """State after the batches consumed so far: plain numbers and strings, the same on all ranks."""
        return self._state(self._sample, self._counts)

    def load_state_dict(self, state: dict) -> None:
        """Go on after `state`, at any world size. UserError when it belongs to other data or settings."""
        for key, mine in self._identity.items():
            if state.get(key) != mine:
                raise UserError(
                    f"the data's {key} changed since the checkpoint ({state.get(key)} then, {mine} now); "
                    "use the same, or start a new run"
                )
        self._join()
        self._sample, self._counts = state["sample"], list(state["counts"])

    @property
    def epochs(self) -> list[float]:
        """Epochs consumed of each source."""
        return [count / n for count, n in zip(self._counts, self.num_windows)]

    def _produce(self, sample: int, counts: Sequence[int]) -> Iterator[Batch]:
        size = self.batch_windows
        length = math.ceil(min(ORDER_BLOCK, sum(self.num_windows)) / size) * size
        block = OrderBlock(self._order, sample, np.asarray(counts, np.int64), length)
        while True:
            if sample == block.stop:
                block = OrderBlock(self._order, sample, block.counts[-1], length)
            begin = sample - block.first
            mine = slice(begin + self._low, begin + self._high)
            tokens = self._gather(block.source[mine], block.window[mine])
            sample += size
            state = self._state(sample, block.counts[begin + size])
            shape = (self.accum, self.micro_batch)
            eod_id, valid = self.splits[0].eod_id, size * self.seq_len
            yield to_batch(tokens, shape, eod_id, self.confine_attention, state, valid)

    def _gather(self, sources: np.ndarray, windows: np.ndarray) -> np.ndarray:
        if len(self.splits) == 1:
            return self.splits[0].gather(windows, self.seq_len)
        out = np.empty((len(windows), self.seq_len + 1), np.int64)
        for source, split in enumerate(self.splits):
            rows = np.flatnonzero(sources == source)
            out[rows] = split.gather(windows[rows], self.seq_len)
        return out

    def _fill(self, batches: Iterator[Batch]) -> None:
        """The thread's work: batches, or the exception that ended them, into the queue."""
        item: Batch | Exception
        while not self._stop.is_set():
            try:
                item = next(batches)
            except Exception as error:  # handed to the consumer, who raises it
                item = error
            self._room.get()
            self._ready.put(item)
            if isinstance(item, Exception):
                return

    def __iter__(self) -> "TrainLoader":
        return self

    def __next__(self) -> Batch:
        if self._producer is None:
            self._producer = self._produce(self._sample, self._counts)
            if self.prefetch > 0:
                self._thread = threading.Thread(target=self._fill, args=(self._producer,), daemon=True)
                self._thread.start()
        try:
            if self._thread is None:
                item = next(self._producer)
            else:
                item = self._ready.get()
                self._room.put(None)
            if isinstance(item, Exception):
                raise item
        except Exception as error:
            self._join()
            if self.on_damage is None or not isinstance(error, UserError):
                raise
            self.on_damage(str(error), True)
            nothing = np.empty((0, self.seq_len + 1), np.int64)
            shape = (self.accum, self.micro_batch)
            valid = self.batch_windows * self.seq_len  # as the other ranks say of their parts of this batch
            state = self.state_dict()
            return to_batch(nothing, shape, self.splits[0].eod_id, self.confine_attention, state, valid)
        self._sample, self._counts = item.state["sample"], item.state["counts"]
        return item

    def _join(self) -> None:
        self._stop.set()
        self._room.put(None)  # wakes a thread that waits for room
        if self._thread is not None:
            self._thread.join()
        self._thread = self._producer = None
        self._new_queues()

    def close(self) -> None:
        """Stop the prefetching thread."""
        self._join()
