"""The neighbours of samples in a database, as columns beside their manifests: `<name>`, k ids, the nearest first, and
`<name>_similarity`, their cosines, -1 and 0 in the place of those that are missing. Samples without a picture have
none."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from conf.errors import ConfigError
from data.manifest import Manifest
from data.retrieval.database import Database
from data.retrieval.embedding import Embedding, embedded
from data.retrieval.index import Searcher
from data.scores import Recipe, ScoreError, as_json, read_scored, write_scores
from data.store import Store, redact
from data.tasks import Task

VERSION = 1


def columns_of(name: str, k: int) -> pa.Schema:
    """The columns of neighbours."""
    return pa.schema({name: pa.list_(pa.int64(), k), f"{name}_similarity": pa.list_(pa.float32(), k)})


class OwnRows:
    """The rows of a database that are of samples themselves: their pictures, and patches of them.

    Args:
        database: made of their shards, by digest, wherever these lie.

    Raises:
        ConfigError: it does not tell what it was made of.
    """

    def __init__(self, database: Database) -> None:
        if "parts" not in database.told:
            raise ConfigError(
                f"without_itself=true: the database {database.folder} does not tell the shards that it was made of:"
                " leave it out; a field's most_similar=0.999 leaves out whole pictures that are the sample itself"
            )
        self._database, self._digests = database, dict(database.told["parts"])

    def of(self, manifest: Manifest) -> tuple[np.ndarray, np.ndarray]:
        """Of a shard: the ids, (m,) ascending, and whose they are, (m,) rows of the manifest.

        Raises:
            ConfigError: the database was made of another state of the shard.
        """
        ids: list[int] = []
        for part in self._database.parts:
            if not part.rows:
                continue
            if self._digests.get(part.name) == manifest.digest:
                ids += range(part.start, part.start + part.rows)
            elif self._database.shards[part.name] == redact(manifest.shard):
                self._database.check_shard(part.start, redact(manifest.shard), manifest.digest)
        rows = [one["row"] for one in self._database.metadata(ids, ["row"])]
        return np.array(ids, np.int64), np.array(rows, np.int64)


def recipe_of(database: Database, embedding: Embedding, k: int, without_itself: bool) -> Recipe:
    """What makes neighbours what they are."""
    settings = {"database": database.fingerprint, "embedding": embedding.recipe() | {"texts": False}, "k": k}
    return Recipe(VERSION, as_json(settings | {"without_itself": without_itself}))


def due(manifests: Sequence[Manifest], name: str, recipe: Recipe, store: Store) -> list[bool]:
    """Of each shard, whether its neighbours are still to be found."""
    found = [read_scored(manifest, name, store) for manifest in manifests]
    return [one is None or one.recipe != recipe for one in found]


def find_neighbours(
    manifests: Sequence[Manifest],
    is_due: Sequence[bool],
    database: Database,
    embedding: Embedding,
    name: str,
    k: int,
    own: OwnRows | None,
    store: Store,
    task: Task,
) -> None:
    """What one task does: the neighbours of its own shards' samples, whole pictures, where they are due; without those
    that `own` tells to be of the sample itself."""
    searcher = Searcher(database)
    recipe = recipe_of(database, embedding, k, own is not None)
    for i in task.own(range(len(manifests))):
        manifest = manifests[i]
        if not is_due[i]:
            task.skip(manifest.rows)
            continue
        ids: list[np.ndarray | None] = [None] * manifest.rows
        similarities: list[np.ndarray | None] = [None] * manifest.rows
        errors: list[ScoreError] = []
        row = 0
        of_shard = own.of(manifest) if own is not None else None
        for samples, told, vectors, failed in embedded(manifest, embedding, store):
            seen = [one["row"] for one in told]
            if told:
                found, similar = _found(searcher, vectors["image"], k, np.array(seen), of_shard)
                for place, one_ids, one_similar in zip(seen, found, similar, strict=True):
                    ids[place], similarities[place] = one_ids, one_similar
            missing = sorted(set(range(row, row + len(samples))) - set(seen))
            errors += [ScoreError(place, samples[place - row].key, "no picture to embed") for place in missing]
            row += len(samples)
            task.advance(len(samples), failed)
        columns: dict[str, Any] = {name: ids, f"{name}_similarity": similarities}
        write_scores(manifest, name, pa.table(columns, columns_of(name, k)), store, recipe, errors)


def _found(
    searcher: Searcher, queries: np.ndarray, k: int, rows: np.ndarray, of_shard: tuple[np.ndarray, np.ndarray] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and cosines, (n, k), of what is nearest to n samples of a shard, of these rows of its manifest, without what
    `of_shard` (`OwnRows.of`) tells to be theirs."""
    if of_shard is None or not len(of_shard[0]):
        return searcher(queries, k)
    ids, whose = of_shard
    most = int(np.bincount(whose).max())
    found, similar = searcher(queries, min(k + most, searcher.database.rows))
    places = np.searchsorted(ids, found).clip(max=len(ids) - 1)
    left_out = (found < 0) | (ids[places] == found) & (whose[places] == rows[:, None])
    order = np.argsort(left_out, axis=1, kind="stable")[:, :k]
    found, similar = (np.where(left_out, missing, one) for one, missing in ((found, -1), (similar, 0)))
    found, similar = (np.take_along_axis(one, order, 1) for one in (found, similar))
    short = ((0, 0), (0, k - found.shape[1]))
    return np.pad(found, short, constant_values=-1), np.pad(similar, short).astype(np.float32)
