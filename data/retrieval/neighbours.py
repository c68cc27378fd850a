"""The neighbours of samples in a database, as columns beside their manifests: `<name>`, k ids, the nearest first, and
`<name>_similarity`, their cosines. Samples without a picture have none."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from data.manifest import Manifest
from data.retrieval.database import Database
from data.retrieval.embedding import Embedding, embedded
from data.retrieval.index import Searcher
from data.scores import Recipe, ScoreError, as_json, read_scored, write_scores
from data.store import Store
from data.tasks import Task

VERSION = 1


def columns_of(name: str, k: int) -> pa.Schema:
    """The columns of neighbours."""
    return pa.schema({name: pa.list_(pa.int64(), k), f"{name}_similarity": pa.list_(pa.float32(), k)})


def recipe_of(database: Database, embedding: Embedding, k: int) -> Recipe:
    """What makes neighbours what they are."""
    settings = {"database": database.fingerprint, "embedding": embedding.recipe() | {"texts": False}, "k": k}
    return Recipe(VERSION, as_json(settings))


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
    store: Store,
    task: Task,
) -> None:
    """What one task does: the neighbours of its own shards' samples, whole pictures, where they are due."""
    searcher = Searcher(database)
    recipe = recipe_of(database, embedding, k)
    for i in task.own(range(len(manifests))):
        manifest = manifests[i]
        if not is_due[i]:
            task.skip(manifest.rows)
            continue
        ids: list[np.ndarray | None] = [None] * manifest.rows
        similarities: list[np.ndarray | None] = [None] * manifest.rows
        errors: list[ScoreError] = []
        row = 0
        for samples, told, vectors, failed in embedded(manifest, embedding, store):
            seen = [one["row"] for one in told]
            if told:
                found, similar = searcher(vectors["image"], k)
                for place, one_ids, one_similar in zip(seen, found, similar, strict=True):
                    ids[place], similarities[place] = one_ids, one_similar
            missing = sorted(set(range(row, row + len(samples))) - set(seen))
            errors += [ScoreError(place, samples[place - row].key, "no picture to embed") for place in missing]
            row += len(samples)
            task.advance(len(samples), failed)
        columns: dict[str, Any] = {name: ids, f"{name}_similarity": similarities}
        write_scores(manifest, name, pa.table(columns, columns_of(name, k)), store, recipe, errors)
