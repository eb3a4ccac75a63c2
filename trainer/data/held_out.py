"""Batches of held-out text: one pass in order, in step on all ranks."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from stepline.trainer.data.dataset import TokenSplit
from stepline.trainer.data.loader import IGNORE, Batch, to_batch
from stepline.trainer.errors import UserError


class ValidationLoader:
    """One pass over a split in order: every token is a target exactly once, but for the first of a split that nothing
    comes before.

    Each rank takes a contiguous share of the micro-batches and yields the same number of micro-batches
    ([1, micro_batch, seq]), the last ones with all targets -100, so that ranks stay in step. `max_windows`
    picks that many evenly spaced windows.
    """

    def __init__(
        self,
        path: Path | str,
        split: str = "val",
        *,
        seq_len: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        max_windows: int | None = None,
        confine_attention: bool = False,
        after_eod: bool = False,
        on_damage: Callable[[str, bool], None] | None = None,
    ) -> None:
        """Open the split; UserError when it has nothing to predict. after_eod: an end-of-document token before the
        first, as in training before every document, so that all of a short text counts. on_damage: as TrainLoader's.
        """
        self.on_damage = on_damage
        self.tokens = TokenSplit(path, split)
        self._before = np.array([self.tokens.eod_id] if after_eod else [], np.int64)
        num_targets = len(self._before) + self.tokens.num_tokens - 1
        if num_targets < 1:
            raise UserError(
                f"{path} has no tokens in '{split}' to evaluate; prepare it with a held-out share"
            )
        self.seq_len, self.micro_batch, self.confine_attention = seq_len, micro_batch, confine_attention
        total = math.ceil(num_targets / seq_len)
        chosen = total if max_windows is None else max(1, min(max_windows, total))
        self._windows = np.arange(chosen, dtype=np.int64) * total // chosen
        covered = np.minimum(num_targets - self._windows * seq_len, seq_len).sum()
        self.num_targets = int(covered)
        """Targets of the pass, over all ranks."""
        self.num_bytes = (
            self.tokens.num_bytes
            if chosen == total
            else (self.tokens.num_bytes * self.num_targets / num_targets)
        )
        """UTF-8 bytes of the text covered, over all ranks: exact for a full pass, else in proportion."""
        # whole micro-batches, which hold the same windows at any number of ranks: so that their sums are the same bits
        micro_batches = math.ceil(chosen / micro_batch)
        self._len = math.ceil(micro_batches / world_size)
        low, high = (r * micro_batches // world_size * micro_batch for r in (rank, rank + 1))
        self._mine = self._windows[low:high]

    def __len__(self) -> int:
        """Micro-batches, the same on every rank."""
        return self._len

    def __iter__(self) -> Iterator[Batch]:
        size = self.seq_len
        for i in range(self._len):
            rows = self._mine[i * self.micro_batch : (i + 1) * self.micro_batch]
            tokens = np.zeros((len(rows), size + 1), np.int64)
            short = []
            for row, window in enumerate(rows):
                part = self._read(int(window) * size, size + 1)
                tokens[row, : len(part)] = part
                short.append(len(part))
            batch = to_batch(tokens, (1, self.micro_batch), self.tokens.eod_id, self.confine_attention, {})
            for row, length in enumerate(short):
                batch.targets[0, row, max(length - 1, 0) :] = IGNORE
            yield batch

    def _read(self, start: int, length: int) -> np.ndarray:
        """Tokens of the split and of what comes before it."""
        head = self._before[start : start + length]
        first = start + len(head) - len(self._before)
        try:
            return np.concatenate([head, self.tokens.read(first, length - len(head))])
        except UserError as error:
            if self.on_damage is None:
                raise
            self.on_damage(str(error), False)
            return np.zeros(0, np.int64)
