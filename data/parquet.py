"""Parquet files of any store, which tell in their metadata what they are of.

What a file tells is one JSON object under a key of ours: for a manifest the shard that it describes, for scores also
the filter and its settings.
"""

import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data.store import Store, StoreError, local_path, protocol_of

ROW_GROUP = 4096
_KEY = b"millrace"


def to_parquet(table: pa.Table, told: dict[str, Any]) -> bytes:
    """A table as Parquet, compressed with zstd, that tells what it is of."""
    sink = pa.BufferOutputStream()
    table = table.replace_schema_metadata({_KEY: json.dumps(told)})
    # Dictionaries pay for repeated strings, and only cost where numbers hardly repeat.
    texts = [f.name for f in table.schema if pa.types.is_string(f.type)] + ["extensions.list.element"]
    pq.write_table(
        table, sink, compression="zstd", row_group_size=ROW_GROUP, use_dictionary=texts, write_statistics=False
    )
    return sink.getvalue().to_pybytes()


def open_parquet(url: str, store: Store) -> pq.ParquetFile:
    """A Parquet file of any store."""
    if protocol_of(url) == "file":
        return pq.ParquetFile(local_path(url))
    return pq.ParquetFile(pa.PythonFile(store.open(url, block=1 << 20), mode="r"))


def told_by(file: pq.ParquetFile) -> dict[str, Any]:
    """What a file tells; nothing if it is not ours."""
    return json.loads((file.schema_arrow.metadata or {}).get(_KEY, b"{}"))


def told_at(url: str, store: Store) -> dict[str, Any]:
    """What the file at a URL tells; nothing where there is none, or it is damaged: it is to be made anew."""
    if not store.exists(url):
        return {}
    try:
        with open_parquet(url, store) as file:
            return told_by(file)
    except StoreError:
        raise
    except (pa.ArrowException, ValueError):
        return {}
    except FileNotFoundError:  # another task has taken it away meanwhile
        return {}
    except OSError as error:
        if error.errno is not None:
            raise
        return {}  # Arrow's own, for damage
