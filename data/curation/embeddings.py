"""Columns of embeddings: fixed-size lists of half-precision numbers, null where a sample has none."""

import io
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.manifest import Manifest, open_parquet
from data.scores import open_scores
from data.store import Store


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


def export_embeddings(
    manifests: Sequence[Manifest], store: Store, folder: str, filter_name: str = "clip", column: str | None = None
) -> int:
    """Write stored embeddings in clip-retrieval's layout: for shard N `img_emb/img_emb_N.npy`, (rows, d) float16, and
    beside it `metadata/metadata_N.parquet` with `image_path` (the key), `caption` and, where there is one, `url`, row
    by row. Samples without an embedding are left out; numbers have leading zeros, so that names sort as they count.

    Args:
        manifests: of the shards.
        store: where they lie, and the folder.
        folder: to write to.
        filter_name: whose score files hold the embeddings.
        column: of the embeddings; `<filter_name>_embedding` by default.

    Returns:
        How many embeddings were written.

    Raises:
        ValueError: a shard has no such scores.
        StoreError: the store fails.
    """
    column = column or f"{filter_name}_embedding"
    digits, total = len(str(max(len(manifests) - 1, 0))), 0
    for i, manifest in enumerate(manifests):
        with open_scores(manifest, filter_name, store) as file:
            embeddings = file.read(columns=[column], use_threads=False)[column].combine_chunks()
        with open_parquet(manifest.url, store) as file:
            own = [name for name in ("key", "caption", "url") if name in file.schema_arrow.names]
            rows = file.read(columns=own, use_threads=False).replace_schema_metadata(None)
        rows = rows.filter(embeddings.is_valid()).rename_columns({"key": "image_path"})
        vectors = embeddings.flatten().to_numpy(zero_copy_only=False).reshape(rows.num_rows, embeddings.type.list_size)
        number = f"{i:0{digits}d}"
        array, table = io.BytesIO(), io.BytesIO()
        np.save(array, vectors)
        pq.write_table(rows, table)
        store.write(f"{folder}/img_emb/img_emb_{number}.npy", array.getvalue())
        store.write(f"{folder}/metadata/metadata_{number}.parquet", table.getvalue())
        total += rows.num_rows
    return total
