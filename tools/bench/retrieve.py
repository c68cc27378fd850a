"""Searching a database of clustered vectors: recall against brute force, and queries a second against FAISS alone."""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from data.curation.embeddings import faiss_threads
from data.retrieval.database import Database, embedding_path, index_path
from data.retrieval.index import IndexBuilder, IndexSettings, Searcher, brute_force, recall_of
from data.tasks import Tasks, run_tasks

_PART = 50_000


def run(
    rows: int = 1_000_000,
    width: int = 512,
    clusters: int = 10_000,
    spread: float = 0.5,
    dimension: int | None = None,
    queries: int = 1000,
    k: int = 20,
    kind: str = "auto",
    memory_gib: float = 8.0,
    threads: int = 1,
    repeats: int = 5,
    folder: str | None = None,
) -> dict[str, Any]:
    """Recall, and queries a second as medians of alternating measurements, of queries that are drawn as the rows are.

    Args:
        rows: of the database, of `width` numbers each, around so many clusters: a centre, and noise of `spread` of its
            length. The wider the spread and the fewer the clusters, the more they overlap, and the more cells of an
            index have to be read.
        dimension: of the subspace that centres and noise lie in, with a tenth as much noise in all directions: the
            neighbours of a row are then nearer than most rows, as those of pictures are; null: all of the width.
        queries: asked at once, each for `k` neighbours.
        kind, memory_gib: see `IndexSettings`.
        threads: of both ways.
        repeats: measurements behind each median.
        folder: for the database (2 bytes a number) and the index, which are deleted afterwards; a temporary one by
            default.
    """
    settings = IndexSettings(kind=kind, memory_gib=memory_gib, k=k)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory(prefix="millrace-bench-retrieve-", dir=folder) as scratch:
        asked = _write(Path(scratch), rows, width, clusters, spread, dimension or width, queries)
        database = Database(scratch)
        seconds: dict[str, float] = {}
        builder = IndexBuilder(database, "image", settings)
        with _timed(seconds, "train"):
            builder.train(threads)
        with _timed(seconds, "add"):
            sizes = [sum(part.rows for part in block) for block in builder.blocks]
            run_tasks(builder.add, Tasks(1), Tasks(1).totals(sizes), "index")
        with _timed(seconds, "merge_and_tune"):
            told = builder.finish(threads)
        builder.clean()
        database.told["indexes"] = {"image": told}
        searcher = Searcher(database)
        bare: Any = faiss.read_index(str(index_path(Path(scratch), "image")))
        ways: dict[str, Callable[[], np.ndarray]] = {
            "searcher": lambda: searcher(asked, k)[0],
            "faiss": lambda: bare.search(asked, k)[1],
        }
        per_second: dict[str, list[float]] = {name: [] for name in ways}
        found: dict[str, np.ndarray] = {}
        with faiss_threads(threads):
            true = brute_force(database, "image", asked, k)
            for repeat in range(repeats + 1):  # the first one maps the files
                for name, way in ways.items():
                    started = time.perf_counter()
                    found[name] = way()
                    if repeat:
                        per_second[name].append(queries / (time.perf_counter() - started))
    medians = {name: statistics.median(measured) for name, measured in per_second.items()}
    return {
        "rows": rows,
        "width": width,
        "k": k,
        "index": {key: told[key] for key in ("factory", "bytes", "search", "recall")},
        "build_seconds": seconds,
        "recall": {name: recall_of(list(ids), true) for name, ids in found.items()},
        "queries_per_second": medians,
        "ratio": medians["searcher"] / medians["faiss"],
    }


def _write(
    folder: Path, rows: int, width: int, clusters: int, spread: float, dimension: int, queries: int
) -> np.ndarray:
    """The database's parts; and the queries, (queries, width) float32."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((clusters, dimension), np.float32)
    basis = np.linalg.qr(random.standard_normal((width, dimension), np.float32))[0].T if dimension < width else None

    def draw(count: int) -> np.ndarray:
        noise = random.standard_normal((count, dimension), np.float32)
        vectors = centres[random.integers(clusters, size=count)] + spread * noise
        if basis is not None:
            share = 0.1 * spread * (dimension / width) ** 0.5
            vectors = vectors @ basis + share * random.standard_normal((count, width), np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    for number, start in enumerate(range(0, rows, _PART)):
        path = embedding_path(folder, "image", f"{number:05d}")
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, draw(min(_PART, rows - start)).astype(np.float16))
    return draw(queries)


class _timed:
    """Adds the seconds of a block under a name."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self._seconds, self._name = seconds, name

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._seconds[self._name] = round(time.perf_counter() - self._started, 2)
