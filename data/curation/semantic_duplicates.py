"""Groups of samples that show the same, by the cosine of their embeddings: k-means clusters, then all pairs in each.

The embeddings of all shards go to a file of N rows in a scratch folder, and from there through memory in blocks. In
memory are the samples that k-means is fitted to, one cluster per task, and a few numbers per sample.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data.curation.base import GlobalFilter, ShardColumns
from data.curation.embeddings import faiss_threads, read_vectors
from data.curation.groups import connect, rank_groups
from data.curation.scratch import scratch_folder
from data.store import cache_root
from data.tasks import Task, Tasks, run_tasks
from data.tracking import RunLog

FEWEST = 40
"""Samples per cluster, on average, below which there are fewer clusters: FAISS warns below 39."""
BLOCK = 1 << 16
"""Samples whose clusters are found at once."""
LARGEST_PAIRS = 1 << 22
"""Pairs that a search may give at once: 250 MB with what is made of them."""


class SemanticDuplicates(GlobalFilter):
    """`semantic_cluster`; `semantic_group`: the same number for all samples of a group, null for one that is alone;
    `semantic_rank`: 0 for the best of each group and for those alone, so that `semantic_rank = 0` keeps one of each.
    All null for a sample without an embedding.

    Two samples are duplicates if one's nearest clusters hold the other and the cosine of their embeddings is above the
    threshold; and if both are duplicates of a third (SD3, arXiv 2403.03206, appendix E.2; SemDeDup, arXiv 2303.09540).
    What the two nearest clusters hold is found at twice the work of one.

    Args:
        embedding: column of the embeddings.
        threshold: cosine above which two samples are duplicates. SD3: 0.5, of SSCD's embeddings, which are trained for
            it; CLIP's are all alike, and mean duplicates from about 0.95 on.
        best: the column whose largest value is best; null: the first sample is.
        clusters: of k-means, fewer for less than 40 samples each. SD3: 16,000.
        probes: nearest clusters of a sample in which its duplicates are looked for. SD3: 1.
        training: samples per cluster that k-means is fitted to, drawn evenly from all.
        iterations: of k-means.
        seed: of the draw and of k-means.
        scratch: folder for the file of embeddings, 2 bytes a number; the user's cache folder if null.
    """

    name = "semantic_duplicates"
    columns = pa.schema({"semantic_cluster": pa.int32(), "semantic_group": pa.int64(), "semantic_rank": pa.uint32()})

    def __init__(
        self,
        embedding: str = "clip_embedding",
        threshold: float = 0.95,
        best: str | None = None,
        clusters: int = 16000,
        probes: int = 1,
        training: int = 64,
        iterations: int = 20,
        seed: int = 0,
        scratch: str | None = None,
    ) -> None:
        if not -1 <= threshold < 1:
            raise ValueError(f"threshold={threshold} must be a cosine below 1")
        if min(clusters, probes, training, iterations) < 1:
            raise ValueError(f"{clusters=}, {probes=}, {training=} and {iterations=} must be at least 1")
        self.embedding, self.threshold, self.best = embedding, threshold, best
        self.clusters, self.probes, self.training, self.iterations = clusters, probes, training, iterations
        self.seed, self.scratch = seed, scratch
        self.needs = (embedding, best) if best is not None else (embedding,)

    def settings(self) -> dict[str, Any]:
        names = ("embedding", "threshold", "best", "clusters", "probes", "training", "iterations", "seed")
        return {name: getattr(self, name) for name in names}

    def score_all(
        self, shards: Sequence[ShardColumns], tasks: int = 1, log: RunLog | None = None
    ) -> Iterator[pa.Table]:
        starts = np.cumsum([0, *(shard.rows for shard in shards)])
        width = _width(shards, self.embedding)
        if width is None:
            for shard in shards:
                empty = [pa.nulls(shard.rows, kind) for kind in self.columns.types]
                yield pa.Table.from_arrays(empty, schema=self.columns)
            return
        with scratch_folder(cache_root(self.scratch), self.name) as folder:
            vectors = _Vectors(folder, int(starts[-1]), width)
            vectors.create()
            rows = [shard.rows for shard in shards]
            self._run(partial(_collect, vectors, shards, starts, self.embedding), rows, tasks, "embeddings", log)
            clusters = self._fit(vectors, tasks)
            blocks = np.diff([*range(0, vectors.rows, BLOCK), vectors.rows]).tolist()
            nearest = min(self.probes, clusters)
            vectors.array("nearest", np.int32, nearest, mode="w+")
            self._run(partial(_assign, vectors, nearest), blocks, tasks, "clusters", log)
            sizes = _sort_by_cluster(vectors, clusters, nearest)
            self._run(partial(_search, vectors, nearest, self.threshold), sizes.tolist(), tasks, "pairs", log)
            first = np.arange(vectors.rows)
            for links in sorted(folder.glob("links-*.npy")):
                connect(first, *np.load(links))
            cluster = np.array(vectors.array("nearest", np.int32, nearest)[:, 0])
        yield from self._tables(shards, starts, first, cluster)

    def _run(self, work: Any, samples: Sequence[int], tasks: int, what: str, log: RunLog | None) -> None:
        """Work on items of so many samples each, shared by the tasks."""
        shared = Tasks(tasks)
        run_tasks(work, shared, shared.totals(samples), f"{self.name}: {what}", log)

    def _fit(self, vectors: "_Vectors", threads: int) -> int:
        """Fit k-means to a draw of the samples, which is the same on every machine; returns the number of clusters."""
        import faiss

        present = np.flatnonzero(vectors.array("present", np.bool_))
        clusters = max(1, min(self.clusters, len(present) // FEWEST))
        count = min(len(present), clusters * self.training)
        chosen = np.sort(np.random.default_rng(self.seed).choice(present, count, replace=False))
        means = faiss.Kmeans(
            vectors.width,
            clusters,
            niter=self.iterations,
            seed=self.seed,
            spherical=True,
            min_points_per_centroid=1,
            max_points_per_centroid=count,
        )
        with faiss_threads(threads):
            means.train(vectors.read(chosen))
        np.save(vectors.folder / "centroids.npy", np.asarray(means.centroids))
        return clusters

    def _tables(
        self, shards: Sequence[ShardColumns], starts: np.ndarray, first: np.ndarray, cluster: np.ndarray
    ) -> Iterator[pa.Table]:
        keys = []
        if self.best is not None:
            values = [shard.read([self.best])[self.best].cast(pa.float64()) for shard in shards]
            keys = [np.concatenate([column.to_numpy(zero_copy_only=False) for column in values])]
        groups = rank_groups(first, keys)
        absent = cluster < 0
        columns = [
            pa.array(cluster, mask=absent),
            pa.array(groups.first, mask=groups.alone | absent),
            pa.array(groups.rank.astype(np.uint32), mask=absent),
        ]
        table = pa.Table.from_arrays(columns, schema=self.columns)
        for start, shard in zip(starts.tolist(), shards, strict=False):
            yield table.slice(start, shard.rows)


@dataclass(frozen=True)
class _Vectors:
    """The scratch folder: files of a row per sample, and others by name.

    Args:
        folder: where they lie.
        rows: N.
        width: numbers in an embedding.
    """

    folder: Path
    rows: int
    width: int

    def create(self) -> None:
        self.array("vectors", np.float16, self.width, mode="w+")
        self.array("present", np.bool_, mode="w+")

    def array(self, name: str, dtype: Any, *shape: int, mode: Any = "r+") -> np.ndarray:
        """A file of (N, *shape) values, mapped into memory; "w+": a new one of zeros."""
        if not self.rows:
            return np.zeros((0, *shape), dtype)
        return np.memmap(self.folder / f"{name}.bin", dtype, mode, shape=(self.rows, *shape))

    def read(self, rows: np.ndarray | slice) -> np.ndarray:
        """(m, width) float32 embeddings of length one."""
        vectors = self.array("vectors", np.float16, self.width, mode="r")[rows].astype(np.float32)
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors / np.maximum(lengths, np.finfo(np.float32).tiny)


# --- the steps, each the work of one task -----------------------------------------------------------------------------


def _collect(vectors: _Vectors, shards: Sequence[ShardColumns], starts: np.ndarray, column: str, task: Task) -> None:
    """Write the shards' embeddings to the scratch file."""
    file, flags = vectors.array("vectors", np.float16, vectors.width), vectors.array("present", np.bool_)
    for i in task.own(range(len(shards))):
        present, found = read_vectors(shards[i], column)
        if len(found):
            if found.shape[1] != vectors.width:
                raise ValueError(f"{column!r} has {vectors.width} numbers in some shards, {found.shape[1]} in others")
            rows = starts[i] + np.flatnonzero(present)
            file[rows], flags[rows] = found, True
        task.advance(shards[i].rows)


def _assign(vectors: _Vectors, nearest: int, task: Task) -> None:
    """Find the nearest clusters of each sample, -1 without an embedding."""
    import faiss

    centroids = np.load(vectors.folder / "centroids.npy")
    index = faiss.IndexFlatIP(vectors.width)
    index.add(centroids)
    flags, found = vectors.array("present", np.bool_), vectors.array("nearest", np.int32, nearest)
    with faiss_threads(1):
        for start in task.own(range(0, vectors.rows, BLOCK)):
            block = slice(start, min(start + BLOCK, vectors.rows))
            _, clusters = index.search(vectors.read(block), nearest)
            found[block] = np.where(flags[block, None], clusters, -1)
            task.advance(block.stop - block.start)


def _sort_by_cluster(vectors: _Vectors, clusters: int, nearest: int) -> np.ndarray:
    """List for each cluster the places in `nearest` that name it; returns the lengths of the lists, (clusters,)."""
    named = vectors.array("nearest", np.int32, nearest).ravel()
    order = np.argsort(named, kind="stable")
    sizes = np.bincount(named + 1, minlength=clusters + 1)
    np.save(vectors.folder / "order.npy", order[sizes[0] :])
    np.save(vectors.folder / "offsets.npy", np.cumsum([0, *sizes[1:]]))
    return sizes[1:]


def _search(vectors: _Vectors, nearest: int, threshold: float, task: Task) -> None:
    """Compare the samples that have a cluster among their nearest ones with those that have it as the nearest, and
    write which are duplicates: pairs of each one and the first of its group within the cluster."""
    order = np.load(vectors.folder / "order.npy", mmap_mode="r")
    offsets = np.load(vectors.folder / "offsets.npy")
    links: list[np.ndarray] = [np.zeros((2, 0), np.int64)]
    with faiss_threads(1):
        for cluster in task.own(range(len(offsets) - 1)):
            places = order[offsets[cluster] : offsets[cluster + 1]]
            rows = places // nearest  # ascending, as the order is stable
            first = near_groups(vectors.read(rows), np.flatnonzero(places % nearest == 0), threshold)
            linked = np.flatnonzero(first != np.arange(len(rows)))
            links.append(np.stack([rows[linked], rows[first[linked]]]))
            task.advance(len(rows))
    np.save(vectors.folder / f"links-{task.index}.npy", np.concatenate(links, axis=1))


def near_groups(vectors: np.ndarray, members: np.ndarray, threshold: float) -> np.ndarray:
    """Groups of vectors that are connected through pairs of a cosine above the threshold, one of each being a member.

    Args:
        vectors: (n, d) float32, of length one.
        members: (m,) int64, which of them every vector is compared with.
        threshold: a cosine.

    Returns:
        (n,) int64, the smallest index in each one's group.
    """
    import faiss

    first = np.arange(len(vectors))
    if not len(members):
        return first
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(np.ascontiguousarray(vectors[members]))
    block = max(1, LARGEST_PAIRS // len(members))
    for start in range(0, len(vectors), block):
        part = vectors[start : start + block]
        limits, _, found = index.range_search(part, threshold)
        pairs: np.ndarray = np.diff(limits.astype(np.int64))
        connect(first, np.repeat(np.arange(start, start + len(part)), pairs), members[found])
    return first


# --- what they stand on -----------------------------------------------------------------------------------------------


def _width(shards: Sequence[ShardColumns], column: str) -> int | None:
    """Numbers in an embedding; None if no sample has one."""
    for shard in shards:
        _, vectors = read_vectors(shard, column)
        if len(vectors):
            return vectors.shape[1]
    return None
