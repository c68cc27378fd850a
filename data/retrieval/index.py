"""Indexes of FAISS over a database: which kind, how it is built by several tasks, and how thoroughly it is searched.

    flat         compares with all                      4 d bytes a row     exact
    ivf_flat     k-means cells, the nearest are read    4 d bytes           exact within the cells
    ivf_sq8      likewise, a byte a number              d bytes             candidates are compared again, exactly
    ivf_pq       likewise, product codes of a rotation  memory's worth      likewise
    hnsw         a graph of neighbours                  4 d + 256 bytes     built by one task

The exact comparison of candidates reads the database's own embeddings, from disk: no second copy is held. `auto` is
flat where there are few rows, else the first ivf that fits the memory. Cells are trained on a sample of the rows. How
many of them are read is measured: as few as reach the target recall, on rows held against brute force.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
import xxhash

from conf.errors import ConfigError, first_line
from data.curation.embeddings import faiss_threads
from data.retrieval.database import Database, Part, Side, index_path, told_path
from data.retrieval.marks import mark_at
from data.store import Store
from data.tasks import Task

Kind = Literal["auto", "flat", "ivf_flat", "ivf_sq8", "ivf_pq", "hnsw"]

_FAISS: Any = faiss  # its stubs lack much of what it has
FEW = 20_000
"""Rows that are compared one by one: brute force takes a millisecond or so."""
_BLOCK = 1 << 16
_CODES = (128, 96, 64, 48, 32, 16, 8)
_OF_CODES = 10_000  # rows that the 256 values of a code are learned from; fewer learn 16
_ROTATIONS = 5  # steps of fitting a rotation; FAISS takes 50, for little more recall
_REFINE = (4, 8, 16, 32, 64)
_HEAD = 1 << 26
"""Bytes of an index that its mark has without a gap: centres of cells, codes and the lists' lengths lie there, by which
FAISS allocates."""


@dataclass(frozen=True)
class IndexSettings:
    """What an index is to be.

    Args:
        kind: see above.
        memory_gib: that it may take.
        recall: share of the true `k` neighbours that a search is to find.
        k: for which recall is measured.
        queries: rows that it is measured with.
        cells: of k-means; null: four square roots of the rows, to a power of two.
        training: rows to each cell that k-means is fitted to.
        links: of each row in a graph.
        seed: of what is drawn.
    """

    kind: Kind = "auto"
    memory_gib: float = 8.0
    recall: float = 0.95
    k: int = 20
    queries: int = 1000
    cells: int | None = None
    training: int = 50
    links: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.recall <= 1 or self.memory_gib <= 0:
            raise ValueError(f"index.recall={self.recall} is a share, index.memory_gib={self.memory_gib} positive")
        if min(self.k, self.queries, self.training, self.links, self.cells or 1) < 1:
            raise ValueError("index.k, queries, cells, training and links must be positive")


@dataclass(frozen=True)
class IndexPlan:
    """An index that is to be built.

    Args:
        kind: of the table above.
        factory: as FAISS's `index_factory` has it.
        refined: whether candidates are compared again with the database's embeddings.
        cells: of k-means, 0 without.
        bytes: that it takes.
    """

    kind: str
    factory: str
    refined: bool
    cells: int
    bytes: int


def plan_index(rows: int, width: int, settings: IndexSettings) -> IndexPlan:
    """The kind of index for so many rows.

    Raises:
        ConfigError: none fits the memory.
    """
    memory = settings.memory_gib * (1 << 30)
    cells = settings.cells or 1 << max(0, round(np.log2(4 * rows**0.5)))
    cells = max(1, min(cells, rows // 4))
    overhead = rows * 8 + cells * width * 4
    bits = 8 if rows >= _OF_CODES else 4
    code = next((m for m in _CODES if width % m == 0 and rows * m * bits // 8 + overhead <= memory), None)
    options = {
        "flat": IndexPlan("flat", "Flat", False, 0, rows * width * 4),
        "ivf_flat": IndexPlan("ivf_flat", f"IVF{cells},Flat", False, cells, rows * width * 4 + overhead),
        "ivf_sq8": IndexPlan("ivf_sq8", f"IVF{cells},SQ8", True, cells, rows * width + overhead),
        "hnsw": IndexPlan("hnsw", f"HNSW{settings.links},Flat", False, 0, rows * (width * 4 + settings.links * 8)),
    }
    if code is not None:
        factory = f"OPQ{code},IVF{cells},PQ{code}x{bits}"
        options["ivf_pq"] = IndexPlan("ivf_pq", factory, True, cells, rows * code * bits // 8 + overhead)
    if settings.kind == "auto":
        order = ["flat"] if rows <= FEW else []
        order += ["ivf_flat", "ivf_sq8", "ivf_pq"]
    else:
        order = [settings.kind]
    for kind in order:
        if kind in options and options[kind].bytes <= memory:
            return options[kind]
    least = min(one.bytes for one in options.values()) / (1 << 30)
    raise ConfigError(
        f"index.memory_gib={settings.memory_gib} is too little for index.kind={settings.kind} over {rows} rows of"
        f" {width} numbers: {least:.2f} GiB is the least of any kind"
    )


class IndexBuilder:
    """Builds the index of one side of a database in steps, each of which is kept and not done again.

    Args:
        database: with all of its parts.
        side: "image" or "text".
        settings: what it is to be.
        plan: that follows from them, unless it is given.
    """

    def __init__(self, database: Database, side: Side, settings: IndexSettings, plan: IndexPlan | None = None) -> None:
        self.database, self.side, self.settings = database, side, settings
        self.plan = plan or plan_index(database.rows, database.width, settings)
        told = [asdict(settings), *(database.told.get(key) for key in ("recipe", "parts")), side, database.marks(side)]
        self.identity = xxhash.xxh3_64_hexdigest(json.dumps(told, sort_keys=True).encode())
        self._work = database.folder / f"{side}.index.work"

    @property
    def done(self) -> bool:
        """Whether the index that is there is this one, whole."""
        told = self.database.told.get("indexes", {}).get(self.side, {})
        path = index_path(self.database.folder, self.side)
        return told.get("identity") == self.identity and told.get("mark") == mark_at(path, _HEAD)

    @property
    def blocks(self) -> list[list[Part]]:
        """Parts that are added together, about a million rows each; a graph cannot be merged, and is one block."""
        if self.plan.kind == "hnsw":
            return [self.database.parts]
        found: list[list[Part]] = [[]]
        for part in self.database.parts:
            if found[-1] and sum(one.rows for one in found[-1]) + part.rows > 1 << 20:
                found.append([])
            found[-1].append(part)
        return found

    def train(self, threads: int) -> None:
        """Fit cells and codes to a sample of the rows, unless that is done."""
        path = self._work / f"trained-{self.identity}.index"
        if path.exists():
            return
        index: Any = faiss.index_factory(self.database.width, self.plan.factory, faiss.METRIC_INNER_PRODUCT)
        if self.plan.kind == "hnsw":
            index.hnsw.efConstruction = 200
        if self.plan.kind == "ivf_pq":
            rotation: Any = faiss.downcast_VectorTransform(index.chain.at(0))
            rotation.niter, rotation.niter_pq_0 = _ROTATIONS, 2 * _ROTATIONS
        if not index.is_trained:
            count = min(self.database.rows, max(self.plan.cells * self.settings.training, 256 * 40))
            drawn = np.random.default_rng(self.settings.seed).choice(self.database.rows, count, replace=False)
            with faiss_threads(threads), _on_gpus(index, self.plan.cells):
                index.train(self.database.vectors(np.sort(drawn), self.side))
        _write(index, path)

    def add(self, task: Task) -> None:
        """What one task does: add its own blocks, each to an index of its own."""
        for number in task.own(range(len(self.blocks))):
            path, rows = self._block(number), sum(part.rows for part in self.blocks[number])
            if path.exists():
                task.skip(rows)
                continue
            index = faiss.read_index(str(self._work / f"trained-{self.identity}.index"))
            with faiss_threads(1):
                for part in self.blocks[number]:
                    vectors = self.database.of_part(part, self.side)
                    if self.plan.cells:
                        index.add_with_ids(vectors, np.arange(part.start, part.start + part.rows))
                    else:
                        index.add(vectors)
                    task.advance(part.rows)
            _write(index, path)

    def finish(self, threads: int) -> dict[str, Any]:
        """Merge the blocks, measure how to search, and put the index in its place; what the database tells of it."""
        index: Any = faiss.read_index(str(self._block(0)))
        for number in range(1, len(self.blocks)):
            _merge(index, faiss.read_index(str(self._block(number))), self.plan)
        assert index.ntotal == self.database.rows
        with faiss_threads(threads):
            told = tune(index, self.database, self.side, self.plan, self.settings)
        _keep(index, told["search"])
        path = index_path(self.database.folder, self.side)
        _write(index, path)
        known = {"identity": self.identity, "mark": mark_at(path, _HEAD), "asked": self.settings.recall}
        return {**known, **asdict(self.plan), **told}

    def clean(self) -> None:
        """Remove what was kept of the steps."""
        for path in self._work.glob("*") if self._work.exists() else []:
            path.unlink()
        if self._work.exists():
            self._work.rmdir()

    def _block(self, number: int) -> Path:
        return self._work / f"block-{number:05d}-{self.identity}.index"


def tune(index: Any, database: Database, side: Side, plan: IndexPlan, settings: IndexSettings) -> dict[str, Any]:
    """How an index must be searched to reach the target recall, as cheaply as may be, and the recall measured then.

    Queries are rows of the database, each of which is left out of its own neighbours.
    """
    k = min(settings.k, database.rows - 1)
    if plan.kind == "flat" or k < 1:
        return {"recall": 1.0, "search": {}}
    drawn = np.random.default_rng(settings.seed + 1).choice(
        database.rows, min(settings.queries, database.rows), replace=False
    )
    queries = database.vectors(drawn, side)
    true = brute_force(database, side, queries, k, drawn)

    def recall(search: dict[str, int]) -> float:
        found, _ = searched(index, database, side, queries, k + 1, search)
        return recall_of([row[row != own][:k] for row, own in zip(found, drawn, strict=True)], true)

    def fewest(options: Sequence[dict[str, int]]) -> tuple[dict[str, int], float]:
        """The first of ever more thorough searches that reaches the target; the last, if none does. Ever larger steps
        lead there, since the most thorough ones take longest."""
        last, low, high = len(options) - 1, 0, 0
        reached = {0: recall(options[0])}
        while reached[high] < settings.recall and high < last:
            low, high = high + 1, min(2 * high + 1, last)
            reached[high] = recall(options[high])
        while low < high:
            middle = (low + high) // 2
            reached[middle] = recall(options[middle])
            low, high = (low, middle) if reached[middle] >= settings.recall else (middle + 1, high)
        return options[low], reached[low]

    if plan.kind == "hnsw":
        search, reached = fewest([{"ef": ef} for ef in (16, 32, 64, 128, 256, 512, 1024)])
    else:
        probes = sorted({min(plan.cells, max(1, round(2 ** (i / 2)))) for i in range(2 * plan.cells.bit_length())})
        for refine in _REFINE if plan.refined else (1,):
            search, reached = fewest([{"probes": n, "refine": refine} for n in probes])
            if reached >= settings.recall:
                break
    return {"recall": round(reached, 4), "search": search}


def searched(
    index: Any, database: Database, side: Side, queries: np.ndarray, k: int, search: dict[str, int]
) -> tuple[np.ndarray, np.ndarray]:
    """The neighbours of n queries (n, d) of length one: ids (n, k) int64, -1 where there are none, and cosines (n, k).

    Args:
        index: of the database's side.
        database, side: whose embeddings candidates are compared with, where `search` says "refine".
        k: how many.
        search: "probes" or "ef", how thorough; "refine", times `k` candidates to compare again.
    """
    refine = search.get("refine", 1)
    parameters: Any = None
    if "probes" in search:
        parameters = _FAISS.SearchParametersIVF(nprobe=search["probes"])
        if isinstance(faiss.downcast_index(index), faiss.IndexPreTransform):
            parameters = _FAISS.SearchParametersPreTransform(index_params=parameters)
    elif "ef" in search:
        parameters = _FAISS.SearchParametersHNSW(efSearch=max(search["ef"], k))
    similarities, ids = index.search(np.ascontiguousarray(queries), min(k * refine, database.rows), params=parameters)
    if refine > 1:
        for start in range(0, len(queries), 256):
            rows = slice(start, start + 256)
            exact = np.einsum("qd,qcd->qc", queries[rows], database.vectors(np.maximum(ids[rows], 0), side))
            exact = np.where(ids[rows] < 0, -np.inf, exact)
            order = np.argsort(-exact, axis=1, kind="stable")
            similarities[rows] = np.take_along_axis(exact, order, 1)
            ids[rows] = np.take_along_axis(ids[rows], order, 1)
    found, short = ids[:, :k], max(0, k - ids.shape[1])
    return np.pad(found, ((0, 0), (0, short)), constant_values=-1), np.pad(similarities[:, :k], ((0, 0), (0, short)))


def brute_force(
    database: Database, side: Side, queries: np.ndarray, k: int, without: np.ndarray | None = None
) -> np.ndarray:
    """The true neighbours, (n, k) int64, of n queries; `without` (n,) are ids that are no neighbours of theirs."""
    best = np.full((len(queries), k), -np.inf, np.float32)
    ids = np.full((len(queries), k), -1, np.int64)
    for part in database.parts:
        for start in range(0, part.rows, _BLOCK):
            vectors = database.of_part(part, side, slice(start, start + _BLOCK))
            first = part.start + start
            similar = queries @ vectors.T
            if without is not None:
                inside = np.flatnonzero((without >= first) & (without < first + len(vectors)))
                similar[inside, without[inside] - first] = -np.inf
            joined = np.concatenate([best, similar], axis=1)
            of_block = np.arange(first, first + len(vectors))
            all_ids = np.concatenate([ids, np.broadcast_to(of_block, similar.shape)], axis=1)
            top = np.argpartition(-joined, min(k, joined.shape[1]) - 1, axis=1)[:, :k]
            best, ids = np.take_along_axis(joined, top, 1), np.take_along_axis(all_ids, top, 1)
    return np.take_along_axis(ids, np.argsort(-best, axis=1, kind="stable"), 1)


def recall_of(found: Sequence[np.ndarray], true: np.ndarray) -> float:
    """The share of true neighbours that were found."""
    return float(np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in zip(found, true, strict=True)]))


class Searcher:
    """Neighbours in a database, through its index.

    Args:
        database: to search.
        side: whose embeddings.

    Raises:
        ConfigError: there is no index, or it is damaged, or of another database.
    """

    def __init__(self, database: Database, side: Side = "image") -> None:
        self.database, self.side = database, side
        path, told = index_path(database.folder, side), database.told.get("indexes", {}).get(side)
        if not path.exists():
            linked = "" if database.told else "; where clip-retrieval wrote its index to another folder, link it there"
            raise ConfigError(f"{path} is missing: {database.remedy}{linked}")
        if database.told and told is None:
            raise ConfigError(f"{path} is none that {told_path(database.folder)} tells of: {database.remedy}")
        # FAISS trusts the lengths that a file tells: of a damaged one it may allocate without bounds, or crash.
        if told is not None and told.get("mark") not in (None, mark_at(path, _HEAD)):
            raise ConfigError(f"{path} is damaged, it is not what was written: {database.remedy}")
        try:
            self._index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            raise ConfigError(f"{path} is damaged ({first_line(error)[:200]}): {database.remedy}") from error
        if (self._index.d, self._index.ntotal) != (database.width, database.rows):
            database.check_files()
            raise ConfigError(
                f"{path} holds {self._index.ntotal} embeddings of {self._index.d} numbers, the database"
                f" {database.rows} of {database.width}: {database.remedy}"
            )
        if self._index.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise ConfigError(
                f"{path} does not compare by inner products, as cosines are: build it with"
                " `clip-retrieval index`, or by FAISS with METRIC_INNER_PRODUCT"
            )
        self.search: dict[str, int] = (told or {}).get("search", {})

    def __call__(
        self, queries: np.ndarray, k: int, search: dict[str, int] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `searched`; `search` takes the place of what reached the recall asked for.

        Raises:
            ConfigError: the database is smaller than k, or the queries are of another width.
        """
        if k > self.database.rows:
            raise ConfigError(f"k={k} neighbours of a database of {self.database.rows} rows: choose a smaller k")
        if queries.shape[1] != self.database.width:
            raise ConfigError(
                f"queries of {queries.shape[1]} numbers, and the database {self.database.folder} has"
                f" {self.database.width}: they are of another model"
            )
        return searched(self._index, self.database, self.side, queries.astype(np.float32), k, search or self.search)


def _merge(index: Any, other: Any, plan: IndexPlan) -> None:
    if plan.kind == "flat":
        index.add(
            faiss.rev_swig_ptr(_FAISS.downcast_index(other).get_xb(), other.ntotal * other.d).reshape(-1, other.d)
        )
        return
    own, its = faiss.extract_index_ivf(index), faiss.extract_index_ivf(other)
    own.merge_from(its, 0)
    index.ntotal = own.ntotal


def _keep(index: Any, search: dict[str, int]) -> None:
    """Have an index's file tell others how thoroughly it is searched."""
    if "probes" in search:
        faiss.extract_index_ivf(index).nprobe = search["probes"]
    elif "ef" in search:
        index.hnsw.efSearch = search["ef"]


def _write(index: Any, path: Path) -> None:
    """Whole or not at all."""
    with Store().composing(str(path)) as scratch:
        faiss.write_index(index, str(scratch))


@contextmanager
def _on_gpus(index: Any, cells: int) -> Iterator[None]:
    """Let GPUs, where FAISS has them, do the k-means that finds the cells."""
    to_gpus: Callable[..., Any] | None = getattr(faiss, "index_cpu_to_all_gpus", None)
    if to_gpus is None or not cells or not getattr(faiss, "get_num_gpus", lambda: 0)():
        yield
        return
    own: Any = faiss.extract_index_ivf(index)
    own.clustering_index = comparing = to_gpus(faiss.IndexFlatIP(own.d))
    yield
    own.clustering_index = None
    del comparing  # which FAISS, that has a pointer to it, does not keep
