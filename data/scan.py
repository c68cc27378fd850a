"""Columns of many manifests and score files, in order and in bounded memory, for questions about all rows.

`database` and `ask` put such rows to DuckDB; `quantile_values` answers a clause's quantiles over all of them.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from conf.errors import first_line
from data.manifest import STRUCTURE, Manifest
from data.parquet import open_parquet
from data.scores import open_scores, score_columns
from data.store import Store
from data.where import Where, WhereError

CHUNK_ROWS = 1 << 20
"""Rows that go through DuckDB at once."""
VALUES_HELD = 1 << 26
"""Values that are kept in memory between the passes of a quantile; more are read again for each pass."""


class Scan:
    """Reads the columns that a clause needs from manifests and score files, in order and in bounded memory.

    Args:
        manifests: of the shards.
        store: where they lie.
        clause: the clause, if any.

    Raises:
        WhereError: a column that it needs is nowhere.
        StoreError: the store fails.
    """

    def __init__(self, manifests: Sequence[Manifest], store: Store, clause: Where | None) -> None:
        self.manifests, self.store = manifests, store
        self.filters: list[str] = []
        self._score_columns: dict[str, set[str]] = {}
        self._spelling: dict[str, str] = {}
        wanted = set(clause.columns) if clause is not None else set()
        if clause is None or not wanted - STRUCTURE.keys():
            return
        scored = score_columns(manifests[0].url, store)
        for name, schema in scored.items():
            if used := {c for c in schema.names if c.lower() in wanted}:
                self.filters.append(name)
                self._score_columns[name] = used
        check_columns(manifests, store, clause, {c for schema in scored.values() for c in schema.names})

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


def check_columns(manifests: Sequence[Manifest], store: Store, clause: Where, scored: Collection[str]) -> None:
    """Raise WhereError for the first column of the clause that is neither in a manifest nor one of those scored."""
    available = {*STRUCTURE, *scored}
    for manifest in manifests:  # a field may occur in some shards only
        if {c.lower() for c in available} >= set(clause.columns):
            break
        with open_parquet(manifest.url, store) as file:
            available |= set(file.schema_arrow.names)
    clause.check_columns(available)


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


def database() -> duckdb.DuckDBPyConnection:
    """A database that sees only what is registered: no files, no network, no extensions."""
    return duckdb.connect(config={"enable_external_access": "false", "preserve_insertion_order": "true"})


def ask(connection: duckdb.DuckDBPyConnection, query: str, rows: pa.Table, clause: Where | None) -> pa.Table:
    """The result of a query over the table `rows`, part of which is the clause.

    Raises:
        WhereError: the query fails.
    """
    try:
        connection.register("rows", rows)
        return connection.sql(query).to_arrow_table()
    except duckdb.Error as error:
        # What stands around the clause is ours and right, so the fault is the clause's.
        raise WhereError(f"where={clause.text if clause else None!r}: {first_line(error)}") from error


def quantile_values(scan: Scan, clause: Where) -> list[float | None]:
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
        with database() as connection:
            for chunk in scan.chunks(columns):
                table = ask(connection, f"SELECT {expressions} FROM rows", chunk, clause)
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
