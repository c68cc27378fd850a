"""What an index over many rows would take, from indexes over fewer, which are built and measured.

    memory   computed, of what FAISS's structures hold for a row and a cell
    train    k-means compares the rows drawn for it with all cells, in each of its steps: seconds go with drawn x cells;
             codes are fitted to 65,536 rows at most
    add      each row is compared with all cells: rows x cells, shared by the tasks
    search   a query is compared with all cells, then with the rows of those read, cells + probes x rows / cells; each
             takes some time besides (candidates are compared again)
    probes   a power of the rows, fitted to those that reached the recall

A graph takes rows x log(rows) to build, and log(rows) to search. What is told is for one thread of this machine.
"""

import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from conf.errors import ConfigError
from data.curation.embeddings import faiss_threads
from data.retrieval.database import Database, embedding_path, index_path
from data.retrieval.index import IndexBuilder, IndexPlan, IndexSettings, Searcher, plan_index
from data.tasks import Tasks, run_tasks

_FITTED = 1 << 16  # rows that FAISS fits codes to
_QUERIES = 200

Draw = Callable[[int], np.ndarray]
"""So many embeddings, (n, d) float32 of length one."""


@dataclass(frozen=True)
class Trial:
    """An index that was built, or would be.

    Args:
        rows: of it.
        cells: of k-means.
        gib: that it takes; measured where it was built.
        train, add: seconds of one thread.
        ms: a query, of one thread, in batches.
        search: how thoroughly it is searched: "probes" or "ef".
        recall: of that.
    """

    rows: int
    cells: int
    gib: float
    train: float
    add: float
    ms: float
    search: dict[str, int]
    recall: float


@dataclass(frozen=True)
class Forecast:
    """The index that would be, and those that it is told from, the smallest first."""

    plan: IndexPlan
    told: Trial
    measured: list[Trial]
    growth: float

    def __str__(self) -> str:
        """A table, for people."""
        lines = [("rows", "cells", "GiB", "train s", "add s", "ms a query", "recall", "searched")]
        for one in (*self.measured, self.told):
            search = ", ".join(f"{key} {value}" for key, value in one.search.items()) or "all"
            times = f"{one.train:,.1f}", f"{one.add:,.1f}", f"{one.ms:.3f}"
            lines.append((f"{one.rows:,}", f"{one.cells:,}", f"{one.gib:.3f}", *times, f"{one.recall:.3f}", search))
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        table = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        law = f"probes grow as rows^{self.growth:.2f}; " if "probes" in self.told.search else ""
        return "\n".join(
            [
                f"{self.plan.factory}, told from indexes over fewer rows; seconds of one thread, add shared by tasks",
                *table[:-1],
                f"{table[-1]}   <- told: {law}train as rows drawn x cells, add as rows x cells",
            ]
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def clustered(rows: int, width: int, clusters: int, spread: float = 0.5, seed: int = 0) -> np.ndarray:
    """(rows, width) float32 of length one: around so many centres, normal noise of `spread` of their length."""
    random = np.random.default_rng(seed)
    vectors = random.standard_normal((clusters, width), np.float32)[random.integers(clusters, size=rows)]
    vectors += spread * random.standard_normal((rows, width), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def rows_of(database: Database) -> Draw:
    """Draws rows of a database."""

    def draw(count: int) -> np.ndarray:
        drawn = np.random.default_rng(0).choice(database.rows, min(count, database.rows), replace=False)
        return database.vectors(np.sort(drawn))

    return draw


def forecast(rows: int, width: int, settings: IndexSettings, draw: Draw, largest: int) -> Forecast:
    """What an index over so many rows would take.

    Args:
        rows, width: of the embeddings.
        settings: of the index.
        draw: embeddings like those that it would hold.
        largest: rows of the largest index that is built to tell; a half and a quarter of it are built, too.

    Raises:
        ConfigError: an index that does not fit its memory, or too few rows to tell from.
    """
    plan = plan_index(rows, width, settings)
    vectors = draw(min(largest, rows))
    if len(vectors) < 400:
        raise ConfigError(f"{len(vectors)} embeddings are too few to tell an index from")
    measured = [_measure(vectors[: len(vectors) // part], plan, settings) for part in (4, 2, 1)]
    last, cells = measured[-1], plan.cells
    growth = 0.0
    search = dict(last.search)
    if "probes" in search:
        known = np.log([[one.rows, one.search["probes"]] for one in measured])
        growth = float(np.clip(np.polyfit(known[:, 0], known[:, 1], 1)[0], 0, 1))
        search["probes"] = min(cells, round(last.search["probes"] * (rows / last.rows) ** growth))
    if plan.kind == "hnsw":
        log = float(np.log(rows) / np.log(last.rows))
        train, add, ms = 0.0, last.add * rows / last.rows * log, last.ms * log
    elif cells:
        train = _fit([_work(one.rows, one.cells, plan, settings) for one in measured], [one.train for one in measured])(
            _work(rows, cells, plan, settings)
        )
        add = last.add * rows * cells / (last.rows * last.cells)
        read = [[one.cells + one.search["probes"] * one.rows / one.cells, 1] for one in measured]
        ms = _fit(read, [one.ms for one in measured])([cells + search["probes"] * rows / cells, 1])
    else:
        train, add, ms = 0.0, last.add * rows / last.rows, last.ms * rows / last.rows
    told = Trial(rows, cells, plan.bytes / (1 << 30), train, add, ms, search, last.recall)
    return Forecast(plan, told, measured, growth)


def _measure(vectors: np.ndarray, plan: IndexPlan, settings: IndexSettings) -> Trial:
    """Build an index of the plan's make over fewer rows."""
    cells = plan_index(len(vectors), vectors.shape[1], replace(settings, kind="ivf_flat", memory_gib=1e6)).cells
    small = replace(plan, factory=re.sub(r"IVF\d+", f"IVF{cells}", plan.factory), cells=cells if plan.cells else 0)
    with tempfile.TemporaryDirectory(prefix="millrace-forecast-") as folder:
        path = embedding_path(Path(folder), "image", "00000")
        path.parent.mkdir()
        np.save(path, vectors.astype(np.float16))
        database = Database(folder)
        builder = IndexBuilder(database, "image", settings, small)
        started = time.perf_counter()
        builder.train(1)
        trained = time.perf_counter()
        run_tasks(builder.add, Tasks(1), Tasks(1).totals([len(vectors)]), f"index of {len(vectors)}")
        added = time.perf_counter()
        told = builder.finish(1)
        database.told["indexes"] = {"image": told}
        searcher, queries = Searcher(database), vectors[:_QUERIES]
        with faiss_threads(1):
            searcher(queries, settings.k)
            asked = time.perf_counter()
            searcher(queries, settings.k)
            ms = 1e3 * (time.perf_counter() - asked) / len(queries)
        gib = index_path(Path(folder), "image").stat().st_size / (1 << 30)
    search = {key: value for key, value in told["search"].items() if key != "refine" or value > 1}
    return Trial(len(vectors), small.cells, gib, trained - started, added - trained, ms, search, float(told["recall"]))


def _drawn(rows: int, cells: int, settings: IndexSettings) -> int:
    """Rows that training draws; see `IndexBuilder.train`."""
    return min(rows, max(cells * settings.training, 256 * 40))


def _work(rows: int, cells: int, plan: IndexPlan, settings: IndexSettings) -> list[float]:
    """What training's seconds are made of: comparisons of k-means, and rows that codes are fitted to."""
    drawn = _drawn(rows, cells, settings)
    return [drawn * cells, *([min(drawn, _FITTED)] if plan.kind == "ivf_pq" else [])]


def _fit(work: Sequence[Sequence[float]], seconds: Sequence[float]) -> Callable[[Sequence[float]], float]:
    """Time as a sum of the kinds of work, none of which takes less than nothing; the largest weigh most."""
    from scipy.optimize import nnls

    scales = np.max(np.array(work), axis=0)
    rates, _ = nnls(np.array(work) / scales, np.array(seconds))
    return lambda asked: float(np.array(asked) / scales @ rates)
