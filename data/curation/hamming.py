"""All pairs of 64-bit hashes within a Hamming distance, without comparing all with all."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

CANDIDATES = 1 << 21
"""Pairs that are compared at once."""


def near_pairs(queries: np.ndarray, hashes: np.ndarray, distance: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Every (query, hash) whose bits differ in at most `distance` places; some more than once.

    Multi-index hashing (Norouzi, Punjani, Fleet 2012, arXiv 1307.2982): the bits are cut into so many chunks that two
    hashes within the distance must agree in one of them but for a single bit. For random hashes this compares a query
    with some N / 120 of N hashes at a distance of 8.

    Args:
        queries: (Q,) uint64.
        hashes: (N,) uint64.
        distance: 0 to 31.

    Yields:
        Positions of queries and of hashes, int64 arrays of one length.
    """
    if not 0 <= distance < 32:
        raise ValueError(f"a Hamming distance of 64-bit hashes must be 0 to 31 to mean anything, got {distance}")
    chunks = distance // 2 + 1
    edges = [64 * chunk // chunks for chunk in range(chunks + 1)]
    for begin, end in pairwise(edges):
        width = min(end - begin, len(hashes).bit_length())  # more bits than that save nothing
        flips = np.array([0, *(1 << bit for bit in range(width))], np.uint64)
        of_hashes = _bits(hashes, begin, width)
        order = np.argsort(of_hashes, kind="stable")
        starts = np.searchsorted(of_hashes[order], np.arange((1 << width) + 1))
        of_queries = _bits(queries, begin, width)
        for flip in flips:
            probed = of_queries ^ flip
            yield from _compare(queries, hashes, order, starts[probed], starts[probed + np.uint64(1)], distance)


def _bits(hashes: np.ndarray, begin: int, width: int) -> np.ndarray:
    return (hashes >> np.uint64(begin)) & np.uint64((1 << width) - 1)


def _compare(
    queries: np.ndarray, hashes: np.ndarray, order: np.ndarray, begin: np.ndarray, end: np.ndarray, distance: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs among each query and order[begin : end] of it."""
    counts = end - begin
    total = np.cumsum(counts)
    done = 0
    while done < len(queries):
        before = total[done - 1] if done else 0
        stop = max(done + 1, int(np.searchsorted(total, before + CANDIDATES, side="right")))
        part = counts[done:stop]
        query = np.repeat(np.arange(done, stop), part)
        within = np.arange(len(query)) - np.repeat(np.cumsum(part) - part, part)
        candidate = order[np.repeat(begin[done:stop], part) + within]
        near = np.bitwise_count(queries[query] ^ hashes[candidate]) <= distance
        yield query[near], candidate[near]
        done = stop
