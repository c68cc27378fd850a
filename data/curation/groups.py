"""Groups of samples that are pairwise alike, and the best of each."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Groups:
    """For each of N samples:

    Args:
        first: (N,) int64, number of the first sample of its group.
        rank: (N,) int64, 0 for the best of its group, 1 for the next ...; 0 for a sample that is alone.
        alone: (N,) bool, whether it is the only one of its group.
    """

    first: np.ndarray
    rank: np.ndarray
    alone: np.ndarray


def rank_groups(first: np.ndarray, keys: Sequence[np.ndarray]) -> Groups:
    """Rank the members of each group.

    Args:
        first: (N,) int64, the same number for all members of a group, that of its first one.
        keys: (N,) each, by which a group is ranked, largest first; each decides where those before are equal, and in
            the end the sample's number, smallest first. NaN ranks last.
    """
    count = len(first)
    order = _best_first(keys, count, first)
    starts = np.flatnonzero(np.diff(first[order], prepend=-1))
    sizes = np.diff(starts, append=count)
    rank = np.empty(count, np.int64)
    rank[order] = np.arange(count) - np.repeat(starts, sizes)
    alone = np.empty(count, bool)
    alone[order] = np.repeat(sizes == 1, sizes)
    return Groups(first, rank, alone)


def gather(first: np.ndarray, keys: Sequence[np.ndarray], a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Put groups that are alike together, around the best of them: best first, each that is not yet taken takes all
    that are alike to it. So every sample is in one group with, or alike to, the best of its group, however long a
    chain of likenesses may be.

    Args:
        first: (N,) int64, the smallest member of each sample's group.
        keys: see `rank_groups`.
        a: (m,) int64, samples whose groups are alike to those of `b`.
        b: (m,) int64.

    Returns:
        (N,) int64, the smallest member of each sample's new group.
    """
    count = len(first)
    place = np.empty(count, np.int64)
    place[_best_first(keys, count)] = np.arange(count)
    best = place.copy()
    np.minimum.at(best, first, place)
    a, b = first[a], first[b]
    a, b = a[a != b], b[a != b]
    left, right = np.divmod(np.unique(np.concatenate([a * count + b, b * count + a])), count)  # below 2**63
    groups, starts = np.unique(left, return_index=True)
    ends = np.append(starts[1:], len(left))
    center = np.arange(count)
    free = np.ones(count, bool)
    for i in np.argsort(best[groups]):
        if free[groups[i]]:
            alike = right[starts[i] : ends[i]]
            taken = alike[free[alike]]
            center[taken] = groups[i]
            free[taken] = free[groups[i]] = False
    center = center[first]
    smallest = np.full(count, count)
    np.minimum.at(smallest, center, np.arange(count))
    return smallest[center]


def _best_first(keys: Sequence[np.ndarray], count: int, groups: np.ndarray | None = None) -> np.ndarray:
    """The order of samples by their keys, within groups."""
    descending = [np.where(np.isnan(key), np.inf, -key) for key in (np.asarray(k, np.float64) for k in keys)]
    return np.lexsort([np.arange(count), *reversed(descending), *([groups] if groups is not None else [])])


def connect(first: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    """Put the samples a[i] and b[i] into one group, for all pairs at once, in place: the components of a graph by
    hooking and pointer doubling (Shiloach and Vishkin 1982).

    Args:
        first: (N,) int64, the smallest member of each sample's group; `np.arange(N)` to begin with.
        a: (m,) int64.
        b: (m,) int64.
    """
    while True:
        low, high = np.minimum(first[a], first[b]), np.maximum(first[a], first[b])
        apart = low != high
        if not apart.any():
            return
        first[high[apart]] = low[apart]  # of several pairs one takes hold; the others are seen to in the next round
        while not np.array_equal(up := first[first], first):
            first[:] = up
