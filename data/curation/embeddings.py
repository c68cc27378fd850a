"""Columns of embeddings: fixed-size lists of half-precision numbers, null where a sample has none; FAISS's threads."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pyarrow as pa

from conf.errors import ConfigError
from data.curation.base import ShardColumns


def read_vectors(shard: ShardColumns, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Which of a shard's N rows have an embedding (of a length that is finite and not zero), (N,) bool, and those
    embeddings, (m, d) float32, scaled to length one.

    Raises:
        ConfigError: the column holds something else.
    """
    array = shard.read([column])[column].combine_chunks()
    kinds = (pa.types.is_null, pa.types.is_list, pa.types.is_fixed_size_list)
    if not any(kind(array.type) for kind in kinds):
        raise ConfigError(
            f"embedding={column!r} is a column of {array.type}, not of embeddings: choose one of the filter clip"
        )
    present = array.is_valid().to_numpy(zero_copy_only=False).copy()
    if not present.any():
        return present, np.zeros((0, 0), np.float32)
    vectors = array.flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(int(present.sum()), -1)
    lengths = np.linalg.norm(vectors, axis=1)
    usable = np.isfinite(lengths) & (lengths > 0)
    present[present] = usable
    return present, vectors[usable] / lengths[usable, None]


@contextmanager
def faiss_threads(count: int) -> Iterator[None]:
    """So many threads for FAISS, which takes all cores otherwise."""
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
