"""Indexes are held against brute force in numpy."""

from dataclasses import replace

import faiss
import numpy as np
import pytest
from vectors import clustered, save_database

from conf.errors import ConfigError
from data.retrieval.database import Database, index_path
from data.retrieval.index import (
    IndexBuilder,
    IndexSettings,
    Searcher,
    brute_force,
    plan_index,
    recall_of,
    searched,
    tune,
)
from data.retrieve import summary
from data.tasks import Tasks, run_tasks

PARTS = [700, 1300, 0, 2000]
GIB = 1 << 30
DRAWN = clustered(sum(PARTS) + 300, 32, 40)
QUERIES = DRAWN[sum(PARTS) :]
SMALL = 0.0001  # GiB, for which codes are of 16 bytes


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    return save_database(tmp_path_factory.mktemp("database"), np.split(DRAWN[: sum(PARTS)], np.cumsum(PARTS)[:-1]))


def built(database, settings, side="image", tasks=1):
    builder = IndexBuilder(database, side, settings)
    builder.train(1)
    rows = [sum(part.rows for part in block) for block in builder.blocks]
    run_tasks(builder.add, Tasks(tasks), Tasks(tasks).totals(rows), "index")
    told = builder.finish(1)
    builder.clean()
    database.told["indexes"] = {side: told}
    return told


def true_neighbours(database, queries, k):
    everything = np.concatenate([database.of_part(part) for part in database.parts])
    return np.argsort(-(queries @ everything.T), axis=1, kind="stable")[:, :k]


def test_brute_force_is_sorting_all(database):
    queries = QUERIES[:50]
    assert (brute_force(database, "image", queries, 7) == true_neighbours(database, queries, 7)).all()
    own = np.arange(50)
    found = brute_force(database, "image", database.vectors(own), 7, own)
    assert (found == true_neighbours(database, database.vectors(own), 8)[:, 1:]).all()


def test_brute_force_reads_each_row_once(database, monkeypatch):
    read, of_part = [], Database.of_part

    def counted(*args):
        read.append(of_part(*args))
        return read[-1]

    monkeypatch.setattr(Database, "of_part", counted)
    monkeypatch.setattr("data.retrieval.index._BLOCK", 300)
    found = brute_force(database, "image", QUERIES[:50], 7)
    assert sum(map(len, read)) == database.rows and max(map(len, read)) == 300
    assert (found == true_neighbours(database, QUERIES[:50], 7)).all()


@pytest.mark.parametrize("kind", ["flat", "ivf_flat", "ivf_sq8", "ivf_pq", "hnsw"])
def test_every_kind_reaches_the_recall_that_it_tells(database, kind):
    memory = SMALL if kind == "ivf_pq" else 1.0
    told = built(database, IndexSettings(kind=kind, memory_gib=memory, recall=0.95, k=10, queries=200, cells=64))
    assert told["kind"] == kind and told["recall"] >= 0.95
    found, similarities = Searcher(database)(QUERIES, 10)
    recall = recall_of(list(found), true_neighbours(database, QUERIES, 10))
    assert recall == 1.0 if kind == "flat" else recall >= 0.93
    assert np.allclose(similarities, (QUERIES[:, None] * database.vectors(found)).sum(-1), atol=1e-3)
    assert (np.diff(similarities, axis=1) <= 1e-6).all()
    written = faiss.read_index(str(index_path(database.folder, "image")))  # as others search it
    if "probes" in told["search"]:
        assert faiss.extract_index_ivf(written).nprobe == told["search"]["probes"] > 1
    elif kind == "hnsw":
        assert written.hnsw.efSearch == told["search"]["ef"]


def test_recall_that_is_not_reached_is_said(tmp_path):
    random = np.random.default_rng(0).standard_normal((2000, 64))
    database = save_database(tmp_path, [random / np.linalg.norm(random, axis=1, keepdims=True)])
    settings = IndexSettings(kind="hnsw", links=2, recall=1.0, k=20, queries=100)
    told = built(database, settings)
    assert told["recall"] < 1 and told["search"] == {"ef": 1024}
    assert f"recall {told['recall']:.3f} with ef 1024, less than the 1.0 asked for" in summary(database, [], "", 0.0)
    built(database, replace(settings, links=32, recall=0.5))
    assert "asked for" not in summary(database, [], "", 0.0)


def test_a_search_is_no_more_thorough_than_it_must_be(database):
    probes = [
        built(database, IndexSettings(kind="ivf_flat", recall=recall, k=10, cells=64))["search"]["probes"]
        for recall in (0.5, 0.9, 0.99)
    ]
    assert probes[0] < probes[1] < probes[2] <= 64


@pytest.mark.parametrize("kind", ["ivf_flat", pytest.param("ivf_pq", marks=pytest.mark.slow)])
def test_blocks_of_several_tasks_are_those_of_one(database, kind, monkeypatch):
    settings = IndexSettings(kind=kind, memory_gib=SMALL if kind == "ivf_pq" else 1.0, k=10, queries=100, cells=32)
    whole = built(database, settings)
    one = Searcher(database)(QUERIES, 10)
    monkeypatch.setattr(IndexBuilder, "blocks", property(lambda self: [[part] for part in self.database.parts]))
    merged = built(database, settings)
    assert merged["search"] == whole["search"]
    several = Searcher(database)(QUERIES, 10)
    assert (one[0] == several[0]).all() and np.allclose(one[1], several[1])


@pytest.mark.parametrize("kind", ["ivf_flat", "ivf_sq8", "ivf_pq", "hnsw"])
def test_cells_are_found_on_gpus_where_faiss_has_them(database, kind, monkeypatch):
    """A processor's index stands for the GPUs' own, which this FAISS lacks."""
    settings = IndexSettings(kind=kind, memory_gib=SMALL if kind == "ivf_pq" else 1.0, cells=16)
    builder = IndexBuilder(database, "image", settings)
    builder.train(1)
    (path,) = builder._work.glob("trained-*")
    alone = path.read_bytes()
    builder.clean()
    made = []

    def to_gpus(index):
        made.append(faiss.IndexFlatIP(index.d))
        return made[-1]

    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", to_gpus, raising=False)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1, raising=False)
    builder.train(1)
    assert path.read_bytes() == alone
    assert [one.ntotal for one in made] == ([] if kind == "hnsw" else [16])  # the centres, that k-means left in it
    builder.clean()


def test_steps_that_were_done_are_not_done_again(database):
    builder = IndexBuilder(database, "image", IndexSettings(kind="ivf_flat", cells=32))
    builder.train(1)
    trained = next(builder._work.glob("trained-*"))
    before = trained.stat().st_mtime_ns
    builder.train(1)
    assert trained.stat().st_mtime_ns == before
    run_tasks(builder.add, Tasks(1), [database.rows], "index")
    block = builder._block(0)
    before = block.stat().st_mtime_ns
    run_tasks(builder.add, Tasks(1), [database.rows], "index")
    assert block.stat().st_mtime_ns == before
    other = IndexBuilder(database, "image", IndexSettings(kind="ivf_flat", cells=16))
    other.train(1)
    assert len(list(builder._work.glob("trained-*"))) == 2
    builder.clean()
    assert not builder._work.exists()


def test_the_kind_follows_from_rows_and_memory():
    def kind(rows, memory, width=512):
        plan = plan_index(rows, width, IndexSettings(memory_gib=memory))
        assert plan.bytes <= memory * GIB
        return plan.kind

    assert [kind(10_000, 8), kind(1_000_000, 8), kind(20_927_907, 64)] == ["flat", "ivf_flat", "ivf_flat"]
    assert [kind(20_927_907, 16), kind(20_927_907, 4)] == ["ivf_sq8", "ivf_pq"]
    assert plan_index(20_927_907, 512, IndexSettings(memory_gib=4)).factory == "OPQ128,IVF16384,PQ128x8"
    with pytest.raises(ConfigError, match=r"memory_gib=0\.1 is too little.* is the least"):
        kind(20_927_907, 0.1)
    with pytest.raises(ConfigError, match=r"index\.kind=hnsw"):
        plan_index(20_927_907, 512, IndexSettings(kind="hnsw"))


def test_what_cannot_be_searched_is_refused(database, tmp_path):
    vectors = np.split(clustered(100, 8, 4), 2)
    small = save_database(tmp_path, vectors)
    with pytest.raises(ConfigError, match=r"image\.index is missing"):
        Searcher(small)
    built(small, IndexSettings())
    searcher = Searcher(small)
    with pytest.raises(ConfigError, match="k=101 neighbours of a database of 100 rows"):
        searcher(vectors[0], 101)
    with pytest.raises(ConfigError, match="queries of 9 numbers"):
        searcher(np.zeros((1, 9)), 3)
    path = index_path(tmp_path, "image")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"image\.index is damaged"):
        Searcher(small)
    other = faiss.IndexFlatL2(8)
    other.add(np.concatenate(vectors))
    faiss.write_index(other, str(path))
    with pytest.raises(ConfigError, match=r"image\.index does not compare by inner products"):
        Searcher(Database(tmp_path))  # of which nothing is told
    path.write_bytes(whole)
    (tmp_path / "img_emb" / "img_emb_00001.npy").unlink()
    with pytest.raises(ConfigError, match="holds 100 embeddings of 8 numbers, the database 50"):
        Searcher(Database(tmp_path))
    np.save(tmp_path / "img_emb" / "img_emb_00001.npy", np.zeros((50, 9), np.float16))
    with pytest.raises(ConfigError, match=r"img_emb_00001\.npy has the shape \(50, 9\)"):
        Database(tmp_path)


def test_embeddings_of_others_are_read_at_length_one(tmp_path):
    vectors = clustered(20, 8, 4)
    database = save_database(tmp_path, [3 * vectors[:12], 0.5 * vectors[12:]])
    assert np.allclose(database.vectors(np.array([[15, 2]])), vectors[[15, 2]][None], atol=2e-3)
    assert np.allclose(database.of_part(database.parts[1]), vectors[12:], atol=2e-3)


def test_fewer_rows_than_asked_for_are_told_by_their_absence(database):
    """Of cells that are read, too few may hold k rows."""
    settings = replace(IndexSettings(), kind="ivf_flat", cells=64, k=1, recall=0.01)
    builder = IndexBuilder(database, "image", settings)
    builder.train(1)
    run_tasks(builder.add, Tasks(1), [database.rows], "index")
    index = faiss.read_index(str(builder._block(0)))
    found, _ = searched(index, database, "image", database.vectors(np.arange(3)), 4000, {"probes": 1})
    assert found.shape == (3, 4000) and (found[:, -1] == -1).all() and (found[:, 0] == np.arange(3)).all()
    assert tune(index, database, "image", builder.plan, settings)["search"]["probes"] == 1
    builder.clean()
