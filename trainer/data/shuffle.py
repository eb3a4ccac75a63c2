"""A keyed pseudo-random bijection: a global shuffle of any number of samples in constant memory."""

import hashlib

import numpy as np

ROUNDS = 6
U64 = np.uint64


def stream_key(*words: int) -> bytes:
    """A key that depends on every integer of `words` (a named random stream)."""
    return hashlib.blake2b(repr(words).encode(), digest_size=16, person=b"stepline").digest()


def mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014): a bijection of uint64 that avalanches."""
    x = (x ^ (x >> U64(30))) * U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> U64(27))) * U64(0x94D049BB133111EB)
    return x ^ (x >> U64(31))


def keyed_uniform(indices: np.ndarray, key: bytes) -> np.ndarray:
    """Uniform float64 in [0, 1) for each index, a function of (index, key) alone."""
    low, high = np.frombuffer(key, "<u8")
    x = mix(mix(np.asarray(indices, np.uint64) * U64(0x9E3779B97F4A7C15) + low) + high)
    return (x >> U64(11)).astype(np.float64) * 2.0**-53


class KeyedPermutation:
    """A bijection of [0, n) chosen by `key`, evaluated at any indices without materialising it.

    A balanced Feistel network (Luby & Rackoff 1988) on the smallest even number of bits that covers n;
    values outside [0, n) are mapped again until they fall inside (cycle walking, Black & Rogaway 2002):
    fewer than four times on average.
    """

    def __init__(self, n: int, key: bytes) -> None:
        """`n` up to 2**62; `key` of any bytes. Raises ValueError when n is out of range."""
        if not 1 <= n <= 1 << 62:
            raise ValueError(f"n = {n} is not between 1 and 2**62")
        self.n = n
        self._half = U64(max(1, ((n - 1).bit_length() + 1) // 2))
        self._mask = U64((1 << int(self._half)) - 1)
        digests = (hashlib.blake2b(key, digest_size=8, salt=bytes([r])).digest() for r in range(ROUNDS))
        self._keys = [U64(int.from_bytes(digest, "little")) for digest in digests]

    def _feistel(self, x: np.ndarray) -> np.ndarray:
        left, right = x >> self._half, x & self._mask
        for key in self._keys:
            left, right = right, left ^ (mix(right + key) & self._mask)
        return (left << self._half) | right

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """Images of `indices` [n'] (integers in [0, n)) as int64 [n']."""
        x = self._feistel(np.asarray(indices).astype(np.uint64))
        outside = np.flatnonzero(x >= U64(self.n))
        while len(outside):
            x[outside] = self._feistel(x[outside])
            outside = outside[x[outside] >= U64(self.n)]
        return x.astype(np.int64)
