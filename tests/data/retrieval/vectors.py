"""Databases of vectors in clusters, without a model."""

import json
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.index import ensure_indexed
from data.retrieval.database import Database, embedding_path, index_path, metadata_path, told_path
from data.retrieval.neighbours import columns_of
from data.scores import Recipe, write_scores
from data.store import Store


def clustered(count: int, width: int, clusters: int, spread: float = 0.5, seed: int = 0) -> np.ndarray:
    """(count, width) float32 of length one, around so many centres."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((clusters, width))
    vectors = centres[random.integers(clusters, size=count)] + spread * random.standard_normal((count, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def save_database(folder: Path, parts: list[np.ndarray], side: str = "image") -> Database:
    """As clip-retrieval would write it."""
    for i, vectors in enumerate(parts):
        path = embedding_path(folder, side, f"{i:05d}")
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, vectors.astype(np.float16))
        path = metadata_path(folder, f"{i:05d}")
        path.parent.mkdir(parents=True, exist_ok=True)
        keys = [f"{i}_{row}" for row in range(len(vectors))]
        pq.write_table(pa.table({"image_path": keys, "caption": [f"caption of {key}" for key in keys]}), path)
    return Database(folder)


def tell_model(database: Database, model: str) -> Database:
    """As Millrace tells of a database of its own that it is of a model."""
    told = {"version": 1, "model": model, "model_name": f"/models/{model}", "recipe": {"model": model}}
    told["parts"] = [[part.name, f"{database.fingerprint} {part.name}"] for part in database.parts]
    told_path(database.folder).write_text(json.dumps(told))
    return Database(database.folder)


def save_index(database: Database) -> Database:
    """An index that compares with all."""
    index = faiss.IndexFlatIP(database.width)
    index.add(database.vectors(np.arange(database.rows)))
    faiss.write_index(index, str(index_path(database.folder, "image")))
    return database


def write_neighbours(shards: Path, database: Database, k: int, column: str = "neighbours") -> None:
    """Random neighbours of every sample of a folder's tars, as `millrace retrieve` would write them."""
    manifests = ensure_indexed([str(path) for path in sorted(shards.glob("*.tar"))], Store())
    random = np.random.default_rng(0)
    for manifest in manifests:
        ids = [random.choice(database.rows, k, replace=False) for _ in range(manifest.rows)]
        similarities = [np.sort(random.uniform(0, 1, k))[::-1].astype(np.float32) for _ in ids]
        columns = {column: ids, f"{column}_similarity": similarities}
        recipe = Recipe(1, {"database": database.fingerprint, "k": k})
        write_scores(manifest, column, pa.table(columns, columns_of(column, k)), Store(), recipe)
