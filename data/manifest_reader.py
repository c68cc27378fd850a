"""Rows of many manifests and of the score files beside them, by shard and row, for loaders."""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.manifest import parse_told
from data.parquet import ROW_GROUP, open_parquet, told_by
from data.scores import open_scores, score_columns
from data.store import Store, redact

OPEN_MANIFESTS = 64


class ManifestReader:
    """Rows of many manifests, and of the scores beside them, for a loader: remembers what it used last.

    Pickles as its arguments alone; each process has its own memory, of at most about `memory` bytes.

    Args:
        store: where the manifests lie.
        manifests: their URLs, by shard index (`Selection.manifests`).
        digests: of their rows (`Selection.digests`), to notice that one was written anew in the meantime.
        memory: bytes of decoded rows to keep.
    """

    def __init__(
        self, store: Store, manifests: Sequence[str], digests: Sequence[str] | None = None, memory: int = 64 << 20
    ) -> None:
        self.store, self.manifests, self.digests, self.memory = store, manifests, digests, memory
        self._files: OrderedDict[tuple[int, str | None], pq.ParquetFile] = OrderedDict()
        self._groups: OrderedDict[tuple[int, str | None, int, tuple[str, ...]], pa.Table] = OrderedDict()
        self._held = 0
        self._filter_of: dict[str, str | None] = {}

    def __reduce__(self) -> tuple:
        return ManifestReader, (self.store, self.manifests, self.digests, self.memory)

    def rows(self, shard: int, rows: Sequence[int] | np.ndarray, columns: Sequence[str]) -> dict[str, list]:
        """The values of some columns at some rows of a shard, in the rows' order.

        Columns are the manifest's or, if it has none of the name, those of score files. One that this shard does not
        have (a field of other shards' JSON) is None throughout.

        Raises:
            ValueError: the manifest is not the one that was selected from; scores are missing or of a changed shard.
            IndexError: a row beyond the manifest's end.
            StoreError: the store fails.
        """
        wanted = np.asarray(rows, dtype=np.int64)
        values: dict[str, list] = {name: [None] * len(wanted) for name in columns}
        if len(wanted) == 0:
            return values
        manifest = self._file(shard, None)
        count = manifest.metadata.num_rows
        if wanted.min() < 0 or wanted.max() >= count:
            raise IndexError(f"{redact(self.manifests[shard])} has {count} rows, row {wanted.max()} was asked for")
        own = set(manifest.schema_arrow.names)
        by_file: dict[str | None, list[str]] = {}
        for name in columns:
            source = None if name in own else self._find_filter(shard, name)
            if name in own or source is not None:
                by_file.setdefault(source, []).append(name)
        for group in np.unique(wanted // ROW_GROUP):
            places = np.flatnonzero(wanted // ROW_GROUP == group)
            within = pa.array(wanted[places] - group * ROW_GROUP)
            for source, names in by_file.items():
                table = self._group(shard, source, int(group), tuple(sorted(names))).take(within)
                for name in names:
                    for place, value in zip(places, table[name].to_pylist(), strict=True):
                        values[name][place] = value
        return values

    def _find_filter(self, shard: int, column: str) -> str | None:
        """The filter with a column of this name, as the first shard asked for tells."""
        if column not in self._filter_of:
            self._filter_of[column] = None
            for name, schema in score_columns(self.manifests[shard], self.store).items():
                if column in schema.names:
                    self._filter_of[column] = name
        return self._filter_of[column]

    def _file(self, shard: int, name: str | None) -> pq.ParquetFile:
        """A shard's manifest, or the scores of a filter."""
        key = shard, name
        if key not in self._files:
            self._files[key] = self._open(shard, name)
            if len(self._files) > OPEN_MANIFESTS:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(key)
        return self._files[key]

    def _open(self, shard: int, name: str | None) -> pq.ParquetFile:
        url = self.manifests[shard]
        if name is not None:
            told = told_by(self._file(shard, None))
            return open_scores(parse_told(told, told["shard"], url), name, self.store)
        file = open_parquet(url, self.store)
        if self.digests is not None and told_by(file).get("digest") != self.digests[shard]:
            file.close()
            raise ValueError(f"{redact(url)} was written anew since its rows were selected: start the run again")
        return file

    def _group(self, shard: int, name: str | None, group: int, columns: tuple[str, ...]) -> pa.Table:
        key = shard, name, group, columns
        if key in self._groups:
            self._groups.move_to_end(key)
            return self._groups[key]
        table = self._file(shard, name).read_row_group(group, columns=list(columns), use_threads=False)
        self._groups[key] = table
        self._held += table.nbytes
        while self._held > self.memory and len(self._groups) > 1:
            self._held -= self._groups.popitem(last=False)[1].nbytes
        return table
