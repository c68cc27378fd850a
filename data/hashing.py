"""Integer hashes behind every random decision of the plan and of the draws.

Only 64-bit integer arithmetic is used, so that a run planned on one machine, numpy or Python is the same on any other.
"""

from typing import overload

import numpy as np
import xxhash

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


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
