"""A selection: the rows of all manifests that a `where` clause and the split keep, ordered by (shard, row).

It is made once and kept in a cache folder as memory-mapped arrays, so that a billion rows cost no memory to hold.
"""

import json
import math
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from data.manifest import STRUCTURE, Manifest, open_parquet
from data.scores import open_scores, score_identity, score_names
from data.store import Store, StoreError, cache_root, redact
from data.where import Where, WhereError, first_line

VERSION = 1
CHUNK_ROWS = 1 << 20
"""Rows that go through DuckDB at once."""
VALUES_HELD = 1 << 26
"""Values that are kept in memory between the passes of a quantile; more are read again for each pass."""

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
        ValueError: no shards; nothing selected; a wrong clause (one sentence); scores missing or of a changed shard.
        StoreError: a store fails, or the cache folder cannot be written to.
    """
    if not manifests:
        raise ValueError("no shards to select from")
    if not 0 <= holdout < 1:
        raise ValueError(f"holdout must be in [0, 1), got {holdout}")
    if split not in ("train", "validation"):
        raise ValueError(f"split must be 'train' or 'validation', got {split!r}")
    clause = Where(where) if where and where.strip() else None
    scan = _Scan(manifests, store, clause)
    key = _cache_key(scan, where, holdout, split)
    folder = cache_root(cache_folder) / "selections" / key
    if not (folder / "selection.json").exists():
        temporary = folder.with_name(f".{key}.{os.getpid()}-{threading.get_ident()}")
        temporary.mkdir(parents=True, exist_ok=True)
        try:
            _materialise(temporary, scan, clause, holdout, split)
            try:
                temporary.rename(folder)
            except OSError:  # another process was first, with the same content
                if not (folder / "selection.json").exists():
                    raise
        except StoreError:
            raise
        except OSError as error:
            raise StoreError(f"the selection cannot be written to {folder.parent}: {error}") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return Selection.open(folder)


def _cache_key(scan: "_Scan", where: str | None, holdout: float, split: str) -> str:
    digest = xxhash.xxh3_128(json.dumps([VERSION, where, holdout, split]).encode())
    for manifest in scan.manifests:
        digest.update(json.dumps([manifest.shard, manifest.url, manifest.identity, manifest.digest]).encode())
        for name in scan.filters:
            digest.update(f"{name} {score_identity(manifest, name, scan.store)}".encode())
    return digest.hexdigest()


# --- reading manifests --------------------------------------------------------------------------------------------


class _Scan:
    """Reads the columns that a clause needs from manifests and score files, in order and in bounded memory."""

    def __init__(self, manifests: Sequence[Manifest], store: Store, clause: Where | None) -> None:
        self.manifests, self.store = manifests, store
        self.filters: list[str] = []
        self._score_columns: dict[str, set[str]] = {}
        self._spelling: dict[str, str] = {}
        wanted = set(clause.columns) if clause is not None else set()
        if wanted - STRUCTURE.keys():
            self._find(wanted, clause)

    def _find(self, wanted: set[str], clause: Where | None) -> None:
        """Which filters' score files hold the wanted columns; raises if a column is nowhere."""
        assert clause is not None
        available = set(STRUCTURE)
        for name in score_names(self.manifests[0].url, self.store):
            with open_scores(self.manifests[0], name, self.store) as file:
                columns = set(file.schema_arrow.names)
            used = {c for c in columns if c.lower() in wanted}
            if used:
                self.filters.append(name)
                self._score_columns[name] = used
            available |= columns
        for manifest in self.manifests:  # a field may occur in some shards only
            if {c.lower() for c in available} >= wanted:
                break
            with open_parquet(manifest.url, self.store) as file:
                available |= set(file.schema_arrow.names)
        clause.check_columns(available)

    def chunks(self, columns: set[str]) -> Iterator[pa.Table]:
        """Tables of about CHUNK_ROWS rows with the columns, and `shard` and `row`, in order."""
        waiting: list[pa.Table] = []
        rows = 0
        with ThreadPoolExecutor(4) as pool:
            for table in _in_order(pool, lambda s: self._read(s, columns), range(len(self.manifests)), ahead=16):
                waiting.append(table)
                rows += table.num_rows
                if rows >= CHUNK_ROWS:
                    yield self._concatenate(waiting)
                    waiting, rows = [], 0
        if waiting:
            yield self._concatenate(waiting)

    def _read(self, shard: int, columns: set[str]) -> pa.Table:
        manifest = self.manifests[shard]
        scored = {c.lower() for used in self._score_columns.values() for c in used}
        with open_parquet(manifest.url, self.store) as file:
            names = [n for n in file.schema_arrow.names if n.lower() in columns and n.lower() not in scored]
            table = file.read(columns=names, use_threads=False)
            rows = file.metadata.num_rows
        for name in self.filters:
            with open_scores(manifest, name, self.store) as file:
                scores = file.read(columns=sorted(self._score_columns[name]), use_threads=False)
            for column in scores.column_names:
                table = table.append_column(column, scores[column])
        table = _nan_to_null(table.replace_schema_metadata(None))
        table = table.append_column("shard", pa.array(np.full(rows, shard, np.uint32)))
        table = table.append_column("row", pa.array(np.arange(rows, dtype=np.uint32)))
        for column in columns - {n.lower() for n in table.column_names}:
            table = table.append_column(column, pa.nulls(rows))
        return table

    def _concatenate(self, tables: list[pa.Table]) -> pa.Table:
        try:
            return pa.concat_tables(tables, promote_options="permissive")
        except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
            raise ValueError(
                f"a column of the where clause has different types in different shards: {error}"
            ) from error


def _nan_to_null(table: pa.Table) -> pa.Table:
    """SQL ranks NaN above every number: a score that could not be computed would pass `score > 0.5`."""
    for i, name in enumerate(table.column_names):
        column = table[name]
        if pa.types.is_floating(column.type):
            table = table.set_column(i, name, pc.if_else(pc.is_nan(column), None, column))
    return table


def _in_order(pool: ThreadPoolExecutor, function: Any, items: Sequence[int], ahead: int) -> Iterator[Any]:
    """The function's results in the items' order, computed a few items ahead."""
    pending: list[Any] = []
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > ahead:
            yield pending.pop(0).result()
    while pending:
        yield pending.pop(0).result()


# --- making a selection -------------------------------------------------------------------------------------------


def _materialise(folder: Path, scan: _Scan, clause: Where | None, holdout: float, split: Split) -> None:
    condition = "true" if clause is None else clause.sql(_quantiles(scan, clause))
    threshold = int(holdout * 2**64)
    in_split = f"key_hash {'<' if split == 'validation' else '>='} {threshold}::UBIGINT"
    query = f"SELECT shard, row, width, height FROM rows WHERE {in_split} AND ({condition})"
    columns = {"key_hash", "width", "height"} | set(clause.columns if clause is not None else ())
    side = np.dtype(np.uint16 if max(m.largest_side for m in scan.manifests) < 1 << 16 else np.uint32)
    fingerprint = xxhash.xxh3_128(json.dumps([m.digest for m in scan.manifests]).encode())
    per_shard = np.zeros(len(scan.manifests), dtype=np.int64)
    total = in_this_split = without_size = 0
    with (
        _database() as database,
        _ArrayFile(folder / "row.npy", np.dtype(np.uint32)) as row,
        _ArrayFile(folder / "width.npy", side) as width,
        _ArrayFile(folder / "height.npy", side) as height,
    ):
        for chunk in scan.chunks(columns):
            total += chunk.num_rows
            validation = int(np.count_nonzero(chunk["key_hash"].to_numpy() < np.uint64(threshold)))
            in_this_split += validation if split == "validation" else chunk.num_rows - validation
            kept = _query(database, query, chunk, clause)
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
        raise ValueError(_nothing_selected(counts, scan, clause, holdout, split))
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


def _nothing_selected(counts: Counts, scan: _Scan, clause: Where | None, holdout: float, split: str) -> str:
    where = f"where={clause.text!r}" if clause is not None else "no where clause"
    return (
        f"the selection is empty: of {counts.total} rows in {len(scan.manifests)} shards (the first is "
        f"{redact(scan.manifests[0].shard)}), {counts.held_out} are outside the {split} split (holdout={holdout}), "
        f"{counts.filtered} are not kept by {where}, and {counts.without_size} have no picture of known size"
    )


def _database() -> duckdb.DuckDBPyConnection:
    """A database that sees only what is registered: no files, no network, no extensions."""
    return duckdb.connect(config={"enable_external_access": "false", "preserve_insertion_order": "true"})


def _query(database: duckdb.DuckDBPyConnection, query: str, rows: pa.Table, clause: Where | None) -> pa.Table:
    try:
        database.register("rows", rows)
        return database.sql(query).to_arrow_table()
    except duckdb.Error as error:
        # What stands around the clause is ours and right, so the fault is the clause's.
        raise WhereError(f"where={clause.text if clause else None!r}: {first_line(error)}") from error


def _quantiles(scan: _Scan, clause: Where) -> list[float | None]:
    """The values of a clause's quantiles over all rows: exact, and the same on every machine.

    The p-quantile of n values is the one at rank ceil(p n) (as SQL's PERCENTILE_DISC); NaN and NULL do not count. Found
    by radix: each of three passes over the manifests settles a third of the bits; memory does not grow with the rows.
    """
    wanted = clause.quantiles
    if not wanted:
        return []
    columns = set(clause.columns)
    expressions = ", ".join(f"CAST({q.expression} AS DOUBLE) AS q{i}" for i, q in enumerate(wanted))
    rank = [0] * len(wanted)
    prefix = [0] * len(wanted)
    empty = [False] * len(wanted)

    def chunks() -> Iterator[list[np.ndarray]]:
        with _database() as database:
            for chunk in scan.chunks(columns):
                table = _query(database, f"SELECT {expressions} FROM rows", chunk, clause)
                yield [_ordered_bits(table[f"q{i}"].drop_null().to_numpy()) for i in range(len(wanted))]

    small = sum(m.rows for m in scan.manifests) * len(wanted) <= VALUES_HELD
    held = list(chunks()) if small else None
    for shift, width in ((42, 22), (21, 21), (0, 21)):
        counts = np.zeros((len(wanted), 1 << width), dtype=np.int64)
        for chunk in held if held is not None else chunks():
            for i, bits in enumerate(chunk):
                if shift < 42:
                    bits = chunk[i] = bits[bits >> np.uint64(shift + width) == np.uint64(prefix[i])]
                digit = (bits >> np.uint64(shift) & np.uint64((1 << width) - 1)).view(np.int64)
                counts[i] += np.bincount(digit, minlength=1 << width)
        for i, quantile in enumerate(wanted):
            if shift == 42:
                n = int(counts[i].sum())
                empty[i] = n == 0
                rank[i] = max(math.ceil(quantile.probability * n), 1) - 1
            below = np.cumsum(counts[i])
            chosen = int(np.searchsorted(below, rank[i], side="right"))
            rank[i] -= int(below[chosen - 1]) if chosen else 0
            prefix[i] = prefix[i] << width | chosen
    return [None if none else _from_ordered_bits(bits) for none, bits in zip(empty, prefix, strict=True)]


_SIGN = np.uint64(1 << 63)


def _ordered_bits(values: np.ndarray) -> np.ndarray:
    """Doubles as integers of the same order (Herf 2001, "Radix tricks"); NaNs are left out."""
    numbers = values[~np.isnan(values)]
    numbers += 0.0  # -0.0 becomes 0.0
    flips = numbers.view(np.int64) >> 63  # all bits of negative numbers, the sign of others
    flips |= _SIGN.view(np.int64)
    bits = numbers.view(np.uint64)
    bits ^= flips.view(np.uint64)
    return bits


def _from_ordered_bits(bits: int) -> float:
    ordered = np.uint64(bits)
    return float((ordered ^ _SIGN if ordered & _SIGN else ~ordered).view(np.float64))


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
