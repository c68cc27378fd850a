"""A selection: the rows of all manifests that a `where` clause and the split keep, ordered by (shard, row).

It is made once and kept in a cache folder as memory-mapped arrays, so that a billion rows cost no memory to hold.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import pyarrow.compute as pc
import xxhash

from data.cache import make_once
from data.manifest import Manifest
from data.scan import Scan, ask, database, quantile_values
from data.scores import score_identity
from data.store import Store, cache_root, redact
from data.where import Where

VERSION = 1

Split = Literal["train", "validation"]


@dataclass(frozen=True)
class Counts:
    """What became of the rows.

    Args:
        total: rows in all manifests.
        held_out: rows of the other split.
        filtered: rows of this split that the clause does not keep.
        without_size: rows that it keeps but that have no picture or clip whose size could be read; never selected.
        selected: rows of this selection.
    """

    total: int
    held_out: int
    filtered: int
    without_size: int
    selected: int


@dataclass(frozen=True, eq=False)
class Selection:
    """N selected rows, at positions 0 .. N-1. Pickles as its folder.

    Args:
        folder: where it is kept.
        shards: URLs of all S shards, also of those with no row selected.
        manifests: URLs of their manifests.
        digests: of the manifests' rows, by which a `ManifestReader` notices that one was written anew.
        row: (N,) uint32, row in the shard's manifest.
        width: (N,) uint16 (uint32 where a side is beyond), pixels, upright.
        height: as width.
        shard_offsets: (S + 1,) int64; shard s has the positions shard_offsets[s] .. shard_offsets[s + 1] - 1.
        fingerprint: hash of the selected rows and of the samples in all shards: two selections with one fingerprint are
            the same data in the same order, wherever they lie.
        counts: what became of all rows.
    """

    folder: Path
    shards: tuple[str, ...]
    manifests: tuple[str, ...]
    digests: tuple[str, ...]
    row: np.ndarray
    width: np.ndarray
    height: np.ndarray
    shard_offsets: np.ndarray
    fingerprint: str
    counts: Counts

    @classmethod
    def open(cls, folder: str | Path) -> "Selection":
        """A selection made before."""
        folder = Path(folder)
        told = json.loads((folder / "selection.json").read_text())
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("row", "width", "height")}
        return cls(
            folder=folder,
            shards=tuple(told["shards"]),
            manifests=tuple(told["manifests"]),
            digests=tuple(told["digests"]),
            shard_offsets=np.load(folder / "shard_offsets.npy"),
            fingerprint=told["fingerprint"],
            counts=Counts(**told["counts"]),
            **arrays,
        )

    def __reduce__(self) -> tuple:
        return Selection.open, (self.folder,)

    def __len__(self) -> int:
        return len(self.row)

    def locate(self, positions: Sequence[int] | np.ndarray) -> list[tuple[int, int]]:
        """(shard index, manifest row) of each position."""
        positions = np.asarray(positions, dtype=np.int64)
        if len(positions) and not 0 <= positions.min() <= positions.max() < len(self):
            raise IndexError(f"positions {positions.min()} .. {positions.max()} of a selection of {len(self)} rows")
        shards = np.searchsorted(self.shard_offsets, positions, side="right") - 1
        return list(zip(shards.tolist(), self.row[positions].tolist(), strict=True))


class NothingSelectedError(ValueError):
    """No row is selected; says what became of all rows."""


def select(
    manifests: Sequence[Manifest],
    store: Store,
    where: str | None = None,
    holdout: float = 0.0,
    split: Split = "train",
    cache_folder: str | None = None,
) -> Selection:
    """The rows that `where` keeps, of one split; from the cache if the same was asked for before.

    Rows with hash(key) < holdout * 2**64 are the validation split, whatever else the data hold; all others are the
    training split. Rows without a width and height are never selected. Quantiles in `where` are over all rows of all
    manifests, of both splits.

    Raises:
        NothingSelectedError: a ValueError; nothing is selected.
        ValueError: no shards; a wrong clause (one sentence); scores missing or of a changed shard.
        StoreError: a store fails, or the cache folder cannot be written to.
    """
    if not manifests:
        raise ValueError("no shards to select from")
    if not 0 <= holdout < 1:
        raise ValueError(f"holdout must be in [0, 1), got {holdout}")
    if split not in ("train", "validation"):
        raise ValueError(f"split must be 'train' or 'validation', got {split!r}")
    clause = Where(where) if where and where.strip() else None
    scan = Scan(manifests, store, clause)
    key = _cache_key(scan, where, holdout, split)
    folder = make_once(
        cache_root(cache_folder),
        f"selections/{key}",
        "selection.json",
        lambda empty: _materialise(empty, scan, clause, holdout, split),
    )
    return Selection.open(folder)


def _cache_key(scan: "Scan", where: str | None, holdout: float, split: str) -> str:
    digest = xxhash.xxh3_128(json.dumps([VERSION, where, holdout, split]).encode())
    for manifest in scan.manifests:
        digest.update(json.dumps([manifest.shard, manifest.url, manifest.identity, manifest.digest]).encode())
        for name in scan.filters:
            digest.update(f"{name} {score_identity(manifest, name, scan.store)}".encode())
    return digest.hexdigest()


def _materialise(folder: Path, scan: Scan, clause: Where | None, holdout: float, split: Split) -> None:
    condition = "true" if clause is None else clause.sql(quantile_values(scan, clause))
    threshold = int(holdout * 2**64)
    in_split = f"key_hash {'<' if split == 'validation' else '>='} {threshold}::UBIGINT"
    query = f"SELECT shard, row, width, height FROM rows WHERE {in_split} AND ({condition})"
    columns = {"key_hash", "width", "height"} | set(clause.columns if clause is not None else ())
    side = np.dtype(np.uint16 if max(m.largest_side for m in scan.manifests) < 1 << 16 else np.uint32)
    fingerprint = xxhash.xxh3_128(json.dumps([m.digest for m in scan.manifests]).encode())
    per_shard = np.zeros(len(scan.manifests), dtype=np.int64)
    total = in_this_split = without_size = 0
    with (
        database() as connection,
        _ArrayFile(folder / "row.npy", np.dtype(np.uint32)) as row,
        _ArrayFile(folder / "width.npy", side) as width,
        _ArrayFile(folder / "height.npy", side) as height,
    ):
        for chunk in scan.chunks(columns):
            total += chunk.num_rows
            validation = int(np.count_nonzero(chunk["key_hash"].to_numpy() < np.uint64(threshold)))
            in_this_split += validation if split == "validation" else chunk.num_rows - validation
            kept = ask(connection, query, chunk, clause)
            sized = kept
            if kept["width"].null_count or kept["height"].null_count:
                sized = kept.filter(pc.and_(pc.is_valid(kept["width"]), pc.is_valid(kept["height"])))
            without_size += kept.num_rows - sized.num_rows
            per_shard += np.bincount(sized["shard"].to_numpy(), minlength=len(per_shard))
            for file, name in ((row, "row"), (width, "width"), (height, "height")):
                fingerprint.update(file.append(sized[name].to_numpy()))
    offsets = np.concatenate([[0], np.cumsum(per_shard)]).astype(np.int64)
    fingerprint.update(offsets.tobytes())
    counts = Counts(
        total, total - in_this_split, in_this_split - without_size - int(offsets[-1]), without_size, int(offsets[-1])
    )
    if counts.selected == 0:
        raise NothingSelectedError(_nothing_selected(counts, scan, clause, holdout, split))
    np.save(folder / "shard_offsets.npy", offsets)
    told = {
        "shards": [m.shard for m in scan.manifests],
        "manifests": [m.url for m in scan.manifests],
        "digests": [m.digest for m in scan.manifests],
        "fingerprint": fingerprint.hexdigest(),
        "counts": asdict(counts),
        "where": clause.text if clause is not None else None,
        "holdout": holdout,
        "split": split,
    }
    (folder / "selection.json").write_text(json.dumps(told))


def _nothing_selected(counts: Counts, scan: Scan, clause: Where | None, holdout: float, split: str) -> str:
    where = f"where={clause.text!r}" if clause is not None else "no where clause"
    return (
        f"the selection is empty: of {counts.total} rows in {len(scan.manifests)} shards (the first is "
        f"{redact(scan.manifests[0].shard)}), {counts.held_out} are outside the {split} split (holdout={holdout}), "
        f"{counts.filtered} are not kept by {where}, and {counts.without_size} have no picture of known size"
    )


class _ArrayFile:
    """A one-dimensional .npy file that grows: numpy pads its header so that the length can be set at the end."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.dtype = dtype
        self.length = 0
        self._file: BinaryIO = path.open("wb")
        self._write_header()

    def append(self, values: np.ndarray) -> bytes:
        """Write the values; returns the bytes written."""
        data = values.astype(self.dtype).tobytes()
        self._file.write(data)
        self.length += len(values)
        return data

    def _write_header(self) -> None:
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def __enter__(self) -> "_ArrayFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.seek(0)
        self._write_header()
        self._file.close()
