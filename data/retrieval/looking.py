"""What one looks at: the nearest pictures of a question, the neighbours of random samples, and what recall costs an
index in time."""

import time
from collections.abc import Sequence

import numpy as np

from conf.errors import ConfigError
from data.curation.embeddings import faiss_threads
from data.curation.sheets import Sheets
from data.index import ensure_indexed
from data.page import Page
from data.retrieval.database import Database, Side
from data.retrieval.embedding import Embedding, embed_query
from data.retrieval.index import Searcher, brute_force, recall_of
from data.store import Store

_SAMPLES, _NEIGHBOURS = 12, 5
_QUERIES = 200


class Shelf:
    """Contact sheets of a database's rows.

    Args:
        database: whose metadata tell shards and rows.
        store: where the shards lie.
        manifest_folder: where manifests lie that are not beside them.
    """

    def __init__(self, database: Database, store: Store, manifest_folder: str | None = None) -> None:
        self.database, self._store, self._folder = database, store, manifest_folder

    def draw(self, ids: Sequence[int], texts: Sequence[str]) -> bytes:
        """PNG of the pictures of these rows, six in a row; of patches, the pictures that they are of.

        Raises:
            ConfigError: the metadata do not tell where the pictures are, or the shards changed since.
            StoreError: a store fails.
        """
        if not self.database.tells_shards:
            raise ConfigError(f"the metadata of {self.database.folder} do not tell the shards that its pictures are in")
        told = self.database.metadata(ids)
        shards = sorted({one["shard"] for one in told})
        manifests = ensure_indexed(shards, self._store, self._folder)
        digests = {shard: manifest.digest for shard, manifest in zip(shards, manifests, strict=True)}
        for i, one in zip(ids, told, strict=True):
            self.database.check_shard(i, one["shard"], digests[one["shard"]])
        sheets = Sheets(manifests, self._store)
        places = [(shards.index(one["shard"]), one["row"]) for one in told]
        patches = [f"{tuple(one['patch'][:2])} " if one.get("patch") else "" for one in told]
        return sheets.draw(places, [patch + text for patch, text in zip(patches, texts, strict=True)])


def answer(query: str, searcher: Searcher, embedding: Embedding, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and cosines, (k,) each, of the pictures nearest to a text, or to the picture whose file it names."""
    (ids,), (similarities,) = searcher(embed_query(query, embedding.embedder()), k)
    return ids[ids >= 0], similarities[ids >= 0]


def trade(searcher: Searcher, k: int, seed: int = 0) -> list[tuple[str, float, float]]:
    """How the index is searched, its recall of the true k neighbours, and milliseconds a query on one thread, for ever
    more thorough searches; rows of the database are asked for."""
    database, side = searcher.database, searcher.side
    k = min(k, database.rows - 1)
    drawn = np.random.default_rng(seed).choice(database.rows, min(_QUERIES, database.rows), replace=False)
    queries = database.vectors(drawn, side)
    true = brute_force(database, side, queries, k, drawn)
    rows = []
    for search in _around(searcher.search, database.told.get("indexes", {}).get(side, {}).get("cells") or None):
        with faiss_threads(1):
            started = time.perf_counter()
            found, _ = searcher(queries, k + 1, search)
            took = time.perf_counter() - started
        recall = recall_of([row[row != own][:k] for row, own in zip(found, drawn, strict=True)], true)
        rows.append(
            (", ".join(f"{key} {value}" for key, value in search.items()) or "all", recall, 1e3 * took / len(drawn))
        )
    return rows


def page(
    database: Database, sides: Sequence[Side], store: Store, k: int, manifest_folder: str | None, seed: int
) -> Page:
    """The neighbours of random samples, and the trade of each index."""
    told = Page(f"Neighbours in {database.folder}")
    told.paragraph(f"{database.rows} embeddings of {database.width} numbers, of {database.told.get('model_name', '?')}")
    for side in sides:
        searcher = Searcher(database, side)
        index = database.told.get("indexes", {}).get(side, {})
        told.heading(f"{side}.index: {index.get('factory', 'of others')}")
        rows = [(search, f"{recall:.3f}", f"{ms:.3f}") for search, recall, ms in trade(searcher, k, seed)]
        told.table(("search", f"recall@{k}", "ms a query, one thread"), rows, f"{side}_index")
    told.heading("Neighbours of random samples, each the first of its row")
    searcher, shelf = Searcher(database), Shelf(database, store, manifest_folder)
    drawn = np.random.default_rng(seed).choice(database.rows, min(_SAMPLES, database.rows), replace=False)
    ids, similarities = searcher(database.vectors(drawn), min(_NEIGHBOURS + 1, database.rows))
    for number, (own, found, similar) in enumerate(zip(drawn, ids, similarities, strict=True)):
        others = [(int(i), float(s)) for i, s in zip(found, similar, strict=True) if i not in (own, -1)][:_NEIGHBOURS]
        texts = ["sample", *(f"{s:.3f}" for _, s in others)]
        told.picture(f"neighbours_{number:02d}", shelf.draw([int(own), *(i for i, _ in others)], texts), f"row {own}")
    return told


def _around(search: dict[str, int], cells: int | None) -> list[dict[str, int]]:
    """Searches from less to more thorough than this one, none twice; of cells there are so many."""
    key = next((key for key in ("probes", "ef") if key in search), None)
    if key is None:
        return [search]
    steps = (max(1, round(search[key] * factor)) for factor in (0.25, 0.5, 1, 2, 4))
    return [{**search, key: step} for step in dict.fromkeys(min(step, cells or step) for step in steps)]
