"""Integer hashes behind every random decision of the plan and of the draws.

Only 64-bit integer arithmetic is used, so that a run planned on one machine, numpy or Python is the same on any other.
"""

from typing import overload

import numpy as np
import xxhash

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FEISTEL_ROUNDS = 8  # four suffice for long numbers, short ones want more


@overload
def mix64(*parts: int) -> int: ...
@overload
def mix64(*parts: int | np.ndarray) -> np.ndarray | int: ...
def mix64(*parts: int | np.ndarray) -> np.ndarray | int:
    """Hash of a tuple of integers, as SplitMix64 (Steele et al. 2014) absorbs them one by one.

    Parts are integers or arrays of them (any shapes that broadcast); the result is a Python int below 2**64 when all
    parts are ints, else a uint64 array. Negative ints count modulo 2**64.
    """
    state: np.ndarray | int = 0
    for part in parts:
        if isinstance(part, np.ndarray) or isinstance(state, np.ndarray):
            state = _absorb_array(_as_u64(state), _as_u64(part))
        else:
            state = _finalize((state ^ (int(part) & _MASK)) + _GOLDEN & _MASK)
    return state


def text64(text: str, seed: int = 0) -> int:
    """64-bit xxHash of a string's UTF-8 bytes: turns keys and purposes into integers for `mix64`."""
    return xxhash.xxh64_intdigest(text.encode(), seed=seed)


def permute(index: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Where a pseudo-random permutation of 0 .. count - 1 takes some indices, in no more memory than they.

    A balanced Feistel network (Luby and Rackoff 1988) of `mix64` permutes the numbers of the smallest even number of
    bits; what it takes beyond `count` it takes on until it is within (cycle walking, Black and Rogaway 2002).

    Args:
        index: (n,) integers in [0, count).
        count: size of what is permuted.
        seed: of the permutation.

    Returns:
        (n,) int64.
    """
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    values = index.astype(np.uint64)
    outside = np.arange(len(values))
    while len(outside):
        left, right = values[outside] >> half, values[outside] & mask
        for turn in range(_FEISTEL_ROUNDS):
            left, right = right, left ^ (_as_u64(mix64(seed, turn, right)) & mask)
        values[outside] = left << half | right
        outside = outside[values[outside] >= np.uint64(count)]
    return values.astype(np.int64)


def _finalize(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
    return z ^ (z >> 31)


def _as_u64(part: int | np.ndarray) -> np.ndarray:
    if isinstance(part, np.ndarray):
        return part.astype(np.uint64, copy=False)
    return np.asarray(int(part) & _MASK, dtype=np.uint64)


def _absorb_array(state: np.ndarray, part: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        z = (state ^ part) + np.uint64(_GOLDEN)
        z ^= z >> np.uint64(30)
        z *= np.uint64(0xBF58476D1CE4E5B9)
        z ^= z >> np.uint64(27)
        z *= np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return z
