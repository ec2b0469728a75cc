"""Random numbers that follow from a seed and a place alone: the same on every platform and numpy version.

Hash: splitmix64 (Steele, Lea, Flood 2014).
"""

import numpy as np


def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of 0..n-1, int64 [n], by sorting hashed indices."""
    return np.argsort(_hashed(np.arange(n, dtype=np.uint64), seed, epoch), kind="stable").astype(np.int64)


def uniform(count: int, *keys: int) -> np.ndarray:
    """Numbers from 0 (inclusive) to 1 (exclusive), float64 [count], others for every sequence of keys."""
    return (_hashed(np.arange(count, dtype=np.uint64), *keys) >> np.uint64(11)) * 2.0**-53


def _hashed(values: np.ndarray, *keys: int) -> np.ndarray:
    first, *more = keys
    key = _splitmix64(np.array([first % 2**64], np.uint64))
    for further in more:
        key = _splitmix64(key + np.array([further % 2**64], np.uint64))
    return _splitmix64(values + key)


def _splitmix64(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
