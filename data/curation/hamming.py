"""All 64-bit hashes within a Hamming distance of others, without comparing all with all."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from math import comb
from pathlib import Path

import numpy as np

BITS = 64
PROBES = 1 << 18
"""Places in the tables that are looked up at once."""
CANDIDATES = 1 << 20
"""Pairs that are compared at once."""


@dataclass(frozen=True)
class Chunk:
    """Some of the bits of hashes.

    Args:
        begin: the first of them.
        width: how many.
        radius: in how many of them hashes may differ.
    """

    begin: int
    width: int
    radius: int

    @property
    def probes(self) -> int:
        """How many values of the chunk are within the radius of one."""
        return sum(comb(self.width, flips) for flips in range(self.radius + 1))

    def of(self, hashes: np.ndarray) -> np.ndarray:
        """The chunk's bits of hashes, as numbers below 2**width."""
        return (hashes >> np.uint64(self.begin)) & np.uint64((1 << self.width) - 1)

    def flips(self) -> np.ndarray:
        """(probes,) uint64: what to XOR a chunk with for all that are within the radius."""
        bits = [1 << bit for bit in range(self.width)]
        return np.array([sum(chosen) for r in range(self.radius + 1) for chosen in combinations(bits, r)], np.uint64)


def choose_chunks(count: int, distance: int) -> list[Chunk]:
    """Chunks such that any two hashes within the distance are within the radius of at least one, at the least work for
    a search among so many random hashes.

    With m chunks and distance = m r + a, one of the first a + 1 chunks differs in at most r bits or one of the others
    in at most r - 1: else the hashes would differ in (a + 1) (r + 1) + (m - a - 1) r = distance + 1 bits or more.
    """

    def cut(chunks: int) -> list[Chunk]:
        radius, rest = divmod(distance, chunks)
        edges = [BITS * i // chunks for i in range(chunks + 1)]
        # A table of many more entries than hashes saves no comparisons.
        widths = [min(edges[i + 1] - edges[i], max(count, 1).bit_length()) for i in range(chunks)]
        radii = [radius if i <= rest else radius - 1 for i in range(chunks)]
        return [Chunk(edges[i], widths[i], radii[i]) for i in range(chunks) if radii[i] >= 0]

    def work(chunks: list[Chunk]) -> float:
        return sum(chunk.probes * (1 + count / (1 << chunk.width)) for chunk in chunks)

    return min((cut(chunks) for chunks in range(1, distance + 2)), key=work)


class HammingIndex:
    """Multi-index hashing (Norouzi, Punjani, Fleet 2012, arXiv 1307.2982): hashes are cut into chunks; each chunk has a
    table by which those are found that agree with a query in all of its bits but a few. Exact. At a distance of 8 a
    query is compared with one in 350 of 10**5 random hashes, with one in 2,700 of 10**7.

    Args:
        hashes: (N,) uint64, N below 2**32.
        distance: bits, 0 to 31.
    """

    def __init__(self, hashes: np.ndarray, distance: int) -> None:
        if not 0 <= distance < BITS // 2:
            raise ValueError(f"a Hamming distance of 64-bit hashes must be 0 to 31 to mean anything, got {distance}")
        assert len(hashes) < 1 << 32, "places are kept as 32 bits"
        self._count, self._distance = len(hashes), distance
        self._chunks = choose_chunks(len(hashes), distance)
        self._tables = [_table(chunk, hashes) for chunk in self._chunks]

    def save(self, folder: Path) -> None:
        """Write the tables, 12 bytes a hash and chunk, to a folder, where several processes can share them."""
        np.save(folder / "index.npy", [self._count, self._distance])
        for i, table in enumerate(self._tables):
            for name, values in zip(("order", "hashes", "starts"), table, strict=True):
                np.save(folder / f"index-{name}-{i}.npy", values)

    @classmethod
    def load(cls, folder: Path) -> "HammingIndex":
        """The index in a folder; its tables stay on disk, mapped into memory."""
        index = cls.__new__(cls)
        index._count, index._distance = np.load(folder / "index.npy").tolist()
        index._chunks = choose_chunks(index._count, index._distance)

        def mapped(name: str) -> np.ndarray:
            return np.load(folder / f"index-{name}.npy", mmap_mode="r")

        index._tables = [
            (mapped(f"order-{i}"), mapped(f"hashes-{i}"), mapped(f"starts-{i}")) for i in range(len(index._chunks))
        ]
        return index

    def search(self, queries: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Every (query, hash) whose bits differ in at most `distance` places; some more than once.

        Args:
            queries: (Q,) uint64.

        Yields:
            Positions of queries and of hashes, int64 arrays of one length.
        """
        if not self._count:
            return
        for chunk, (order, hashes, starts) in zip(self._chunks, self._tables, strict=True):
            flips, of_queries = chunk.flips(), chunk.of(queries)
            step = max(1, PROBES // len(flips))
            for block in range(0, len(queries), step):
                probed = of_queries[block : block + step, None] ^ flips
                begin, end = starts[probed], starts[probed + np.uint64(1)]
                for query, place in _pairs(begin, end):
                    near = np.bitwise_count(queries[block + query] ^ hashes[place]) <= self._distance
                    yield block + query[near], order[place[near]].astype(np.int64)


Table = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Places of hashes, sorted by a chunk's bits; these hashes; and where in them each value of the chunk begins."""


def _table(chunk: Chunk, hashes: np.ndarray) -> Table:
    of_hashes = chunk.of(hashes)
    order = np.argsort(of_hashes, kind="stable").astype(np.uint32)
    counts = np.bincount(of_hashes.astype(np.int64), minlength=1 << chunk.width)
    return order, hashes[order], np.concatenate([[0], np.cumsum(counts)])


def _pairs(begin: np.ndarray, end: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each row r together with the numbers of all its ranges begin[r, i] .. end[r, i] - 1, some rows at a time."""
    counts = end - begin
    total = np.cumsum(counts.sum(1))
    done = 0
    while done < len(total):
        before = total[done - 1] if done else 0
        stop = max(done + 1, int(np.searchsorted(total, before + CANDIDATES, side="right")))
        part = counts[done:stop].ravel()
        first = np.repeat(begin[done:stop].ravel() - (np.cumsum(part) - part), part)
        yield np.repeat(np.arange(done, stop), counts[done:stop].sum(1)), first + np.arange(len(first))
        done = stop
