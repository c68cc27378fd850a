"""Columns of embeddings: fixed-size lists of half-precision numbers, null where a sample has none."""

import numpy as np
import pyarrow as pa


def vectors_of(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Which of N rows have an embedding (of a length that is finite and not zero), (N,) bool, and those embeddings,
    (m, d) float32, scaled to length one."""
    array = column.combine_chunks()
    present = array.is_valid().to_numpy(zero_copy_only=False).copy()
    if not present.any():
        return present, np.zeros((0, 0), np.float32)
    vectors = array.flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(int(present.sum()), -1)
    lengths = np.linalg.norm(vectors, axis=1)
    usable = np.isfinite(lengths) & (lengths > 0)
    present[present] = usable
    return present, vectors[usable] / lengths[usable, None]
