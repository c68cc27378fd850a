"""A selection compiled for planning: each row's bucket, and how many rows of each bucket every block holds.

Both arrays are memory-mapped, so that all ranks of a node share one copy and only pages that are read take memory.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.buckets import Buckets
from data.cache import make_once

PADDING = 255
"""The bucket of the places that fill up the last block."""

_FORMAT = 1
_META = "compiled.json"


@dataclass(frozen=True, eq=False)
class Compiled:
    """What the plan knows of a selection. Block i holds its rows [i * block, (i + 1) * block).

    Args:
        rows: number of rows, N.
        bucket: (blocks, block) uint8, bucket of each row; `PADDING` past the last one.
        histogram: (blocks, buckets) unsigned, rows of each bucket in each block.
        totals: (buckets,) int64, rows of each bucket.
        buckets: the buckets themselves.
        fingerprint: of the selection, the buckets and the block size.
    """

    rows: int
    bucket: np.ndarray
    histogram: np.ndarray
    totals: np.ndarray
    buckets: Buckets
    fingerprint: str

    @property
    def block(self) -> int:
        """Rows in a block."""
        return self.bucket.shape[1]


def compile_sizes(
    sizes: Iterable[tuple[np.ndarray, np.ndarray]],
    rows: int,
    buckets: Buckets,
    folder: Path | str,
    selection: str,
    block: int = 256,
) -> Compiled:
    """Compile a selection, or open what an earlier run compiled.

    Nothing of `sizes` is read when the compiled selection is already there. Several processes may compile the same
    selection at once.

    Args:
        sizes: widths and heights in pixels of consecutive rows, in chunks of any length: ((n,), (n,)).
        rows: number of rows in all.
        buckets: where the images go.
        folder: of the cache; every compiled selection is a folder in it.
        selection: fingerprint of the selection.
        block: consecutive rows that stay together in every epoch's order.
    """
    if rows <= 0:
        raise ValueError("the selection is empty: nothing to train on")
    if block <= 0:
        raise ValueError(f"block {block} must be positive")
    identity = json.dumps([_FORMAT, selection, buckets.fingerprint, rows, block])
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()[:16]
    target = make_once(
        Path(folder), f"compiled-{fingerprint}", _META, lambda empty: _write(empty, sizes, rows, buckets, block)
    )
    return _open(target, rows, buckets, fingerprint)


def _open(folder: Path, rows: int, buckets: Buckets, fingerprint: str) -> Compiled:
    meta = json.loads((folder / _META).read_text())
    return Compiled(
        rows=rows,
        bucket=np.load(folder / "bucket.npy", mmap_mode="r"),
        histogram=np.load(folder / "histogram.npy", mmap_mode="r"),
        totals=np.array(meta["totals"], dtype=np.int64),
        buckets=buckets,
        fingerprint=fingerprint,
    )


def _write(
    folder: Path, sizes: Iterable[tuple[np.ndarray, np.ndarray]], rows: int, buckets: Buckets, block: int
) -> None:
    blocks = -(-rows // block)
    bucket = _create(folder / "bucket.npy", (blocks, block), np.uint8)
    histogram = _create(folder / "histogram.npy", (blocks, len(buckets)), np.min_scalar_type(block))
    flat = bucket.reshape(-1)
    flat[rows:] = PADDING
    filled = counted = 0
    for width, height in sizes:
        end = filled + len(width)
        if end > rows:
            raise ValueError(f"the selection says {rows} rows but gives more: compile it afresh")
        try:
            flat[filled:end] = buckets.assign(width, height)
        except ValueError as error:
            raise ValueError(f"selection rows {filled}..{end - 1}: {error}") from error
        filled = end
        whole = blocks if filled == rows else filled // block
        _count(bucket[counted:whole], out=histogram[counted:whole])
        counted = whole
    if filled != rows:
        raise ValueError(f"the selection says {rows} rows but gives {filled}: compile it afresh")
    bucket.flush()
    histogram.flush()
    totals = histogram.sum(axis=0, dtype=np.int64)
    # Its presence says that the folder is whole.
    (folder / _META).write_text(json.dumps({"rows": rows, "block": block, "totals": totals.tolist()}))


def _create(path: Path, shape: tuple[int, int], dtype: np.typing.DTypeLike) -> np.memmap:
    """A .npy file with its disk space reserved: a full disk is an error here, not a bus error while writing."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=shape)
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _count(bucket: np.ndarray, out: np.ndarray, chunk: int = 4096) -> None:
    """Count each bucket in each of n blocks, (n, block), into `out`, (n, buckets); `chunk` blocks at once."""
    columns = out.shape[1] + 1  # the last one counts PADDING and is cut off
    for start in range(0, len(bucket), chunk):
        part = bucket[start : start + chunk]
        column = np.minimum(part, columns - 1).astype(np.int32)
        column += (np.arange(len(part), dtype=np.int32) * columns)[:, None]
        flat = np.bincount(column.ravel(), minlength=len(part) * columns)
        out[start : start + chunk] = flat.reshape(len(part), columns)[:, :-1]
