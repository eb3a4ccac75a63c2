"""The global order of training samples, a function of the seed alone."""

from collections.abc import Sequence

import numpy as np

from stepline.trainer.data.shuffle import KeyedPermutation, keyed_uniform, stream_key


class SampleOrder:
    """The global order of samples: which window of which source the i-th sample is.

    A function of the seed, the weights and the numbers of windows. Sample i is drawn from a source by a
    keyed hash of i; the k-th sample of a source is window perm_e(k mod n) of epoch e = k // n, with a new
    permutation for every epoch.
    """

    def __init__(self, num_windows: Sequence[int], weights: Sequence[float], seed: int) -> None:
        """`num_windows` and `weights` of each source."""
        self.num_windows, self.seed = list(num_windows), seed
        self._bounds = np.cumsum(np.asarray(weights, np.float64) / np.sum(weights))[:-1]
        self._draw_key = stream_key(seed, -1)

    def sources(self, first: int, count: int) -> np.ndarray:
        """Source of each of the samples [first, first + count): int64 [count]."""
        if len(self.num_windows) == 1:
            return np.zeros(count, np.int64)
        u = keyed_uniform(np.arange(first, first + count), self._draw_key)
        return np.searchsorted(self._bounds, u, side="right")

    def windows(self, source: int, ordinals: np.ndarray) -> np.ndarray:
        """Window of each sample, given how many samples of its source came before it: int64 [n]."""
        epochs, positions = np.divmod(ordinals, self.num_windows[source])
        out = np.empty(len(ordinals), np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            key = stream_key(self.seed, source, int(epoch))
            out[chosen] = KeyedPermutation(self.num_windows[source], key)(positions[chosen])
        return out


class OrderBlock:
    """The order of a run of samples, computed at once."""

    def __init__(self, order: SampleOrder, first: int, counts: np.ndarray, length: int) -> None:
        self.first, self.stop = first, first + length
        self.source = order.sources(first, length)
        self.window = np.empty(length, np.int64)
        one_hot = self.source[:, None] == np.arange(len(counts))
        self.counts = counts + np.concatenate(
            [np.zeros((1, len(counts)), np.int64), np.cumsum(one_hot, 0, dtype=np.int64)]
        )
        for source in range(len(counts)):
            rows = np.flatnonzero(one_hot[:, source])
            ordinals = counts[source] + np.arange(len(rows))
            self.window[rows] = order.windows(source, ordinals)
