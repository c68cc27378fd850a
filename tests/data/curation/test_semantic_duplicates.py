"""Semantic duplicates: against brute force, against planted groups, and however the work is cut."""

import platform
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse
from scipy.sparse.csgraph import connected_components
from shard_files import write_tar

from conf.errors import ConfigError
from data.curate import curate
from data.curation import semantic_duplicates
from data.curation.groups import connect
from data.curation.semantic_duplicates import SemanticDuplicates, near_groups
from data.index import ensure_indexed
from data.manifest import Manifest
from data.scores import score_url, write_scores
from data.store import Store
from data.tasks import Tasks

WIDTH = 32


class Shard:
    """A shard's columns in memory."""

    def __init__(self, table: pa.Table) -> None:
        self.table, self.rows = table, table.num_rows

    def read(self, columns: Sequence[str]) -> pa.Table:
        return self.table.select(columns)


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def table_of(vectors: np.ndarray, missing: np.ndarray | None = None, **columns: np.ndarray) -> pa.Table:
    rows = [None if missing is not None and missing[i] else v for i, v in enumerate(vectors.astype(np.float16))]
    return pa.table({"clip_embedding": pa.array(rows, pa.list_(pa.float16(), vectors.shape[1])), **columns})


def cut(table: pa.Table, shards: int) -> list[Shard]:
    borders = np.linspace(0, table.num_rows, shards + 1).astype(int).tolist()
    return [Shard(table.slice(a, b - a)) for a, b in pairwise(borders)]


def planted(samples: int = 3000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings around 30 topics, a fifth of them with one to three disturbed copies; and each one's group."""
    rng = np.random.default_rng(seed)
    topics = rng.normal(size=(30, WIDTH))
    own = unit(topics[rng.integers(0, 30, samples)] + rng.normal(size=(samples, WIDTH)))
    copied = np.repeat(np.arange(samples // 5), rng.integers(1, 4, samples // 5))
    copies = unit(own[copied] + 0.15 * rng.normal(size=(len(copied), WIDTH)) / np.sqrt(WIDTH))
    order = rng.permutation(samples + len(copied))
    return np.concatenate([own, copies])[order], np.concatenate([np.arange(samples), copied])[order]


def run(tmp_path: Path, shards: Sequence[Shard], **options) -> dict[str, list]:
    options = {"scratch": str(tmp_path), "clusters": 40, "iterations": 8} | options
    return pa.concat_tables(SemanticDuplicates(**options).score_all(shards)).to_pydict()


def same_group(groups: np.ndarray) -> np.ndarray:
    """(n, n), whether two samples are in one group, without each one and itself."""
    return (groups[:, None] == groups[None]) & ~np.eye(len(groups), dtype=bool)


def groups_of(found: dict[str, list]) -> np.ndarray:
    """A number for each group, and for each sample that is alone."""
    return np.array([-i - 1 if group is None else group for i, group in enumerate(found["semantic_group"])])


def brute_force(alike: np.ndarray) -> np.ndarray:
    """The smallest index of each connected component of an adjacency matrix."""
    _, labels = connected_components(scipy.sparse.csr_array(alike), directed=False)
    _, first = np.unique(labels, return_index=True)
    return first[labels]


def test_pairs_become_the_components_of_their_graph():
    rng = np.random.default_rng(0)
    for count, pairs in ((50, 20), (1000, 700), (1000, 3000)):
        a, b = rng.integers(0, count, (2, pairs))
        alike = np.zeros((count, count), bool)
        alike[a, b] = True
        first = np.arange(count)
        for part in np.array_split(np.arange(pairs), 3):
            connect(first, a[part], b[part])
        assert np.array_equal(first, brute_force(alike))
    chain = rng.permutation(100_000)
    first = np.arange(100_000)
    connect(first, chain[1:], chain[:-1])
    assert not first.any()


@pytest.mark.parametrize("pairs", [1 << 22, 500])
def test_groups_in_a_cluster_are_those_of_all_pairs(monkeypatch, pairs):
    monkeypatch.setattr(semantic_duplicates, "LARGEST_PAIRS", pairs)  # 500: in many blocks
    vectors = planted(400)[0]
    cosines = vectors.astype(np.float64) @ vectors.T.astype(np.float64)
    for threshold in (0.5, 0.8, 0.95):
        everyone = np.arange(len(vectors))
        assert np.array_equal(near_groups(vectors, everyone, threshold), brute_force(cosines > threshold))
        members = np.flatnonzero(everyone % 3 == 0)
        one_is_member = np.isin(everyone, members)
        alike = (cosines > threshold) & (one_is_member[:, None] | one_is_member[None])
        assert np.array_equal(near_groups(vectors, members, threshold), brute_force(alike))


def test_planted_duplicates_are_found_and_within_clusters_exactly_those_of_brute_force(tmp_path):
    vectors, groups = planted()
    found = run(tmp_path, cut(table_of(vectors), 4), threshold=0.95)
    stored = unit(vectors.astype(np.float16).astype(np.float32))
    clusters = np.array(found["semantic_cluster"])
    assert len(np.unique(clusters)) == 40
    alike = (stored @ stored.T > 0.95) & (clusters[:, None] == clusters[None])
    ours, first = groups_of(found), brute_force(alike)
    assert np.array_equal(same_group(ours), same_group(first))
    assert all(group is None or group == start for group, start in zip(found["semantic_group"], first, strict=True))

    true, told = same_group(groups), same_group(ours)
    recall, precision = (true & told).sum() / true.sum(), (true & told).sum() / told.sum()
    print(f"recall {recall:.4f}, precision {precision:.4f}")
    assert recall >= 0.95 and precision >= 0.98
    wider = same_group(groups_of(run(tmp_path, cut(table_of(vectors), 4), threshold=0.95, probes=2)))
    assert not (told & ~wider).any() and (true & wider).sum() > (true & told).sum()
    assert (true & wider).sum() / true.sum() >= 0.99


def test_the_best_of_each_group_ranks_first(tmp_path):
    rng = np.random.default_rng(0)
    base = unit(rng.normal(size=(50, WIDTH)))
    vectors = np.concatenate([base, base[:10], base[:5]])
    score = rng.random(len(vectors))
    score[[3, 53]] = np.nan  # of unknown score, last
    missing = np.arange(len(vectors)) == 20
    shards = cut(table_of(vectors, missing, beauty=score), 3)
    found = run(tmp_path, shards, best="beauty")
    for i in range(10):
        members = [i, 50 + i, *([60 + i] if i < 5 else [])]
        order = sorted(members, key=lambda m: (np.isnan(score[m]), -score[m] if score[m] == score[m] else 0, m))
        assert [found["semantic_rank"][m] for m in order] == list(range(len(members)))
        assert {found["semantic_group"][m] for m in members} == {i}
    assert [found["semantic_rank"][i] for i in range(10, 50)] == [0] * 10 + [None] + [0] * 29
    assert found["semantic_group"][10:50] == [None] * 40
    assert found["semantic_cluster"][20] is None
    by_place = run(tmp_path, shards)
    ranks = [0] * 50 + [1] * 10 + [2] * 5
    assert by_place["semantic_rank"] == [None if m else r for m, r in zip(missing, ranks, strict=True)]


def test_the_result_does_not_depend_on_shards_or_blocks_but_on_the_seed(tmp_path, monkeypatch):
    vectors = planted(1000)[0]
    whole = run(tmp_path, cut(table_of(vectors), 1))
    monkeypatch.setattr(semantic_duplicates, "BLOCK", 100)
    assert run(tmp_path, cut(table_of(vectors), 7)) == whole
    assert run(tmp_path, cut(table_of(vectors), 1), seed=1)["semantic_cluster"] != whole["semantic_cluster"]
    draw = run(tmp_path, cut(table_of(vectors), 1), training=20)
    assert draw["semantic_cluster"] != whole["semantic_cluster"]  # k-means saw other samples
    assert run(tmp_path, cut(table_of(vectors), 2), training=20) == draw


def test_nothing_and_next_to_nothing(tmp_path):
    none = table_of(np.zeros((4, WIDTH)), np.ones(4, bool))
    nothing = {name: [None] * 4 for name in SemanticDuplicates.columns.names}
    assert run(tmp_path, [Shard(none)]) == nothing
    assert run(tmp_path, [Shard(table_of(np.zeros((4, WIDTH))))]) == nothing  # embeddings of length zero
    two = table_of(np.ones((2, WIDTH)))
    found = run(tmp_path, [Shard(none), Shard(two)])
    assert found["semantic_rank"] == [None] * 4 + [0, 1] and found["semantic_group"][4:] == [4, 4]
    with pytest.raises(ValueError, match="32 numbers in some shards, 16 in others"):
        run(tmp_path, [Shard(two), Shard(table_of(np.ones((2, 16))))])


def write_shards(folder: Path, vectors: np.ndarray, shards: int) -> list[Manifest]:
    """Shards of captions alone, with embeddings beside them."""
    store = Store()
    parts = np.array_split(np.arange(len(vectors)), shards)
    for i, part in enumerate(parts):
        write_tar(folder / f"{i:05d}.tar", [(f"{row:06d}.txt", b"text") for row in part])
    manifests = ensure_indexed(store.expand(str(folder)), store)
    for manifest, part in zip(manifests, parts, strict=True):
        write_scores(manifest, "clip", table_of(vectors[part]), store)
    return manifests


def test_a_column_that_holds_no_embeddings_is_named(tmp_path):
    table = pa.table({"clip_similarity": pa.array([0.5, None, 0.25], pa.float32())})
    with pytest.raises(ConfigError, match="embedding='clip_similarity' is a column of float, not of embeddings"):
        run(tmp_path, [Shard(table)], embedding="clip_similarity")


@pytest.mark.slow
def test_the_job_shares_clusters_over_tasks_redoes_what_changed_and_cleans_up(tmp_path):
    vectors = planted(600)[0]
    manifests, scratch = write_shards(tmp_path / "data", vectors, 3), tmp_path / "scratch"
    left = scratch / f"semantic_duplicates-{platform.node()}-4194305-killed"
    left.mkdir(parents=True)
    options = {"clusters": 12, "iterations": 5, "scratch": str(scratch)}

    def scores() -> dict[str, bytes]:
        return {m.url: Path(score_url(m.url, "semantic_duplicates")).read_bytes() for m in manifests}

    curate(manifests, [SemanticDuplicates(**options)], Store())
    alone = scores()
    assert list(scratch.iterdir()) == []
    for m in manifests:
        Path(score_url(m.url, "semantic_duplicates")).unlink()
    curate(manifests, [SemanticDuplicates(**options)], Store(), tasks=Tasks(2))
    assert scores() == alone
    curate(manifests, [SemanticDuplicates(**options, threshold=0.9)], Store())
    assert scores() != alone
    told = pa.concat_tables(pq.read_table(score_url(m.url, "semantic_duplicates")) for m in manifests)
    assert told.schema.equals(SemanticDuplicates.columns)
