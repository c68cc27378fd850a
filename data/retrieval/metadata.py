"""What the rows of a database are of: its metadata, read a group of rows at a time."""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from conf.errors import ConfigError, first_line
from data.retrieval.marks import mark_at

_OPEN = 64


class MetadataReader:
    """Rows of a database's metadata, for loaders too: remembers what it used last.

    Pickles as its arguments alone; each process has its own memory.

    Args:
        paths: of the parts' files.
        rows: of each part, that its file must have.
        marks: of each file; None: whatever it holds is taken.
        remedy: what to do about a damaged file, for errors.
        memory: bytes of tables to keep, about.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        rows: Sequence[int],
        marks: Sequence[str | None],
        remedy: str,
        memory: int = 64 << 20,
    ) -> None:
        self._arguments = (paths, rows, marks, remedy, memory)
        self._paths, self._rows, self._marks, self._remedy, self._memory = self._arguments
        self._files: OrderedDict[int, tuple[pq.ParquetFile, np.ndarray]] = OrderedDict()
        self._tables: OrderedDict[tuple[int, int, tuple[str, ...]], pa.Table] = OrderedDict()
        self._held = 0

    def __reduce__(self) -> tuple:
        return MetadataReader, self._arguments

    def columns(self, part: int) -> list[str]:
        """That a part's file has."""
        return self._file(part)[0].schema_arrow.names

    def rows(self, part: int, rows: Sequence[int], columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """Some rows of a part, in the order given; of columns that its file lacks, nothing.

        Raises:
            ConfigError: the file cannot be read, is not what was written, or has other rows than the embeddings.
        """
        file, starts = self._file(part)
        names = tuple(n for n in file.schema_arrow.names if columns is None or n in columns)
        found = []
        for row in rows:
            group = int(np.searchsorted(starts, row, side="right")) - 1
            table = self._table(part, group, names)
            found += table.slice(row - int(starts[group]), 1).to_pylist()
        return found

    def _file(self, part: int) -> tuple[pq.ParquetFile, np.ndarray]:
        if part not in self._files:
            path, mark = self._paths[part], self._marks[part]
            try:
                file = pq.ParquetFile(path)
            except (OSError, pa.ArrowException) as error:
                raise self._unreadable(path, error) from error
            if mark is not None and mark_at(path) != mark:
                file.close()
                raise ConfigError(f"{path} is not what was written: {self._remedy}")
            told = file.metadata
            if told.num_rows != self._rows[part]:
                file.close()
                raise ConfigError(f"{path} has {told.num_rows} rows, its embeddings {self._rows[part]}: {self._remedy}")
            sizes = [told.row_group(i).num_rows for i in range(told.num_row_groups)]
            self._files[part] = file, np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
            if len(self._files) > _OPEN:
                self._files.popitem(last=False)[1][0].close()
        self._files.move_to_end(part)
        return self._files[part]

    def _table(self, part: int, group: int, columns: tuple[str, ...]) -> pa.Table:
        key = part, group, columns
        if key not in self._tables:
            file, _ = self._file(part)
            try:
                table = file.read_row_group(group, columns=list(columns), use_threads=False)
            except (OSError, pa.ArrowException) as error:
                raise self._unreadable(self._paths[part], error) from error
            self._tables[key] = table
            self._held += table.nbytes
            while self._held > self._memory and len(self._tables) > 1:
                self._held -= self._tables.popitem(last=False)[1].nbytes
        self._tables.move_to_end(key)
        return self._tables[key]

    def _unreadable(self, path: Path, error: Exception) -> ConfigError:
        return ConfigError(f"{path} cannot be read ({first_line(error)}): {self._remedy}")
