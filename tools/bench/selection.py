"""A selection by quantiles over several score columns, against DuckDB asked the same of the same Parquet files.

Each measurement is taken in a process of its own, without anything cached, so that seconds and memory are of one
selection from start to end.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data.hashing import text64
from data.manifest import STRUCTURE, Manifest, manifest_url, read_manifest, write
from data.scores import score_url, write_scores
from data.selection import select
from data.store import Store
from tools.bench.processes import in_process, memory

_PROBABILITY = 0.25


def run(
    rows: int = 10_000_000, shards: int = 100, columns: int = 5, repeats: int = 5, folder: str | None = None
) -> dict[str, Any]:
    """Seconds, wall clock and CPU, and peak memory of selecting the rows whose scores all are above their lowest
    quarter: medians of alternating measurements.

    Args:
        rows: of all manifests together.
        shards: manifests.
        columns: scores, each of a filter, and so in a file, of its own; a hundredth of them are missing.
        repeats: measurements behind each median.
        folder: for the manifests and scores (30 bytes a row, and 5 a score), which are deleted afterwards; a temporary
            one by default.
    """
    if rows % shards:
        raise ValueError(f"shards={shards} must divide rows={rows}")
    with tempfile.TemporaryDirectory(prefix="millrace-bench-selection-", dir=folder) as scratch:
        in_process(_write, scratch, rows // shards, shards, columns)
        ways: dict[str, Callable[[str, int, int], int]] = {"select": _by_select, "duckdb": _by_duckdb}
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
        for repeat in range(repeats + 1):  # the first one warms the disk's cache
            for name, way in ways.items():
                measured = in_process(_measure, way, scratch, shards, columns)
                if repeat:
                    runs[name].append(measured)
    medians = {
        name: {key: statistics.median(one[key] for one in measured) for key in measured[0]}
        for name, measured in runs.items()
    }
    return {
        "rows": rows,
        "shards": shards,
        "columns": columns,
        **medians,
        "ratio_of_seconds": medians["select"]["seconds"] / medians["duckdb"]["seconds"],
    }


def _measure(way: Callable[[str, int, int], int], folder: str, shards: int, columns: int) -> dict[str, float]:
    before, used, begin = memory()["VmHWM"], time.process_time(), time.perf_counter()
    selected = way(folder, shards, columns)
    return {
        "seconds": time.perf_counter() - begin,
        "cpu_seconds": time.process_time() - used,
        "peak_resident_mib": memory()["VmHWM"],
        "imports_alone_mib": before,
        "selected": selected,
    }


def _by_select(folder: str, shards: int, columns: int) -> int:
    store = Store()
    manifests = [_manifest(folder, shard, store) for shard in range(shards)]
    where = " AND ".join(f"{_score(i)} > quantile({_PROBABILITY})" for i in range(columns))
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        return len(select(manifests, store, where, cache_folder=cache))


def _by_duckdb(folder: str, shards: int, columns: int) -> int:
    """The obvious way: put the files side by side, ask for the quantiles, then for the rows."""
    urls = [manifest_url(_shard(folder, shard), Store()) for shard in range(shards)]
    files = [urls, *([score_url(url, _score(i)) for url in urls] for i in range(columns))]
    joined = " POSITIONAL JOIN ".join(f"read_parquet({of_one})" for of_one in files)
    with duckdb.connect() as database:
        names = [_score(i) for i in range(columns)]
        quantiles = ", ".join(f"quantile_disc({name}, {_PROBABILITY})" for name in names)
        values = database.execute(f"SELECT {quantiles} FROM {joined}").fetchone()
        assert values is not None
        where = " AND ".join(f"{name} > {value!r}" for name, value in zip(names, values, strict=True))
        kept = database.execute(f"SELECT key_hash, width, height FROM {joined} WHERE {where}").fetchnumpy()
        return len(kept["width"])


# Simulated manifests and scores


def _write(folder: str, rows: int, shards: int, columns: int) -> None:
    store = Store()
    for shard in range(shards):
        random = np.random.default_rng(shard)
        keys = pa.array(np.char.add(f"{shard:05d}", np.char.zfill(np.arange(rows).astype(str), 8)))
        members = pa.array(np.arange(rows + 1), pa.int32())
        own = {
            "key": keys,
            "key_hash": pa.array([text64(key) for key in keys.to_pylist()], pa.uint64()),
            "extensions": pa.ListArray.from_arrays(members, pa.array(np.full(rows, "jpg"))),
            "offsets": pa.ListArray.from_arrays(members, pa.array(np.arange(rows) * 65536)),
            "sizes": pa.ListArray.from_arrays(members, pa.array(random.integers(10_000, 60_000, rows))),
            "width": pa.array(random.integers(256, 4096, rows), pa.uint32()),
            "height": pa.array(random.integers(256, 4096, rows), pa.uint32()),
        }
        table = pa.table({name: own.get(name, pa.nulls(rows, kind)) for name, kind in STRUCTURE.items()})
        url = manifest_url(_shard(folder, shard), store)
        manifest = write(table, _shard(folder, shard), "simulated", (), store, url)
        for i in range(columns):
            scores = pa.array(random.normal(size=rows).astype(np.float32))
            missing = pa.array(random.random(rows) < 0.01)
            told = pa.table({_score(i): pc.if_else(missing, None, scores)})
            write_scores(manifest, _score(i), told, store)


def _manifest(folder: str, shard: int, store: Store) -> Manifest:
    url = manifest_url(_shard(folder, shard), store)
    found = read_manifest(_shard(folder, shard), url, store)
    assert found is not None, "it was written before"
    return found


def _shard(folder: str, shard: int) -> str:
    return str(Path(folder) / f"{shard:05d}.tar")


def _score(i: int) -> str:
    return f"score{i}"
