"""A packed shard: its tar, and beside it what others look for.

    00000.tar                  the samples
    00000.manifest.parquet     as `index` writes it
    00000.parquet              img2dataset's table: a row for each sample, also for those that failed, and why
    00000_stats.json           img2dataset's counts; written last, it says that the shard is finished

Nothing in them tells when or where they were written, so that the same samples give the same bytes. That goes for the
tar's time of modification too, by which a manifest knows its shard: it is made from the tar's content.
"""

import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from data.describe import describe
from data.manifest import Checksum, manifest_url, read_manifest, write
from data.packing.samples import Packed
from data.store import Store, protocol_of, redact

ERRORS_SHOWN = 20
"""Errors of a shard that its report names; its table has all."""
_DATE = 946_684_800  # 2000-01-01, of every tar; the nanoseconds tell contents apart
_TABLE = {
    "key": pa.string(),
    "url": pa.string(),
    "caption": pa.string(),
    "status": pa.string(),
    "error_message": pa.string(),
    "width": pa.int32(),
    "height": pa.int32(),
    "original_width": pa.int32(),
    "original_height": pa.int32(),
    "source": pa.string(),
    "source_shard": pa.string(),
    "source_key": pa.string(),
}


@dataclass(frozen=True)
class Report:
    """What became of a shard's samples.

    Args:
        name: of the tar.
        samples: written.
        failed: left out, by status.
        errors: up to `ERRORS_SHOWN` lines about these.
    """

    name: str
    samples: int
    failed: dict[str, int]
    errors: tuple[str, ...] = ()


def beside(tar: str, ending: str) -> str:
    """URL of a file that belongs to a packed tar."""
    return tar.removesuffix(".tar") + ending


def read_report(tar: str, store: Store) -> Report | None:
    """Of a shard that is finished and whole, or None."""
    if not all(store.exists(url) for url in (beside(tar, "_stats.json"), beside(tar, ".parquet"), tar)):
        return None
    manifest = read_manifest(tar, manifest_url(tar, store), store)
    if manifest is None or manifest.identity != str(store.identity(tar)):
        return None
    stats = json.loads(store.read_all(beside(tar, "_stats.json")))
    failed = {status: stats[status] for status in ("failed_to_download", "failed_to_resize") if stats[status]}
    errors: list[str] = []
    if failed:
        columns = ["status", "source_shard", "source_key", "error_message"]
        rows = pq.read_table(io.BytesIO(store.read_all(beside(tar, ".parquet"))), columns=columns).to_pylist()
        lines = (
            _line(r["source_shard"], r["source_key"], r["error_message"]) for r in rows if r["status"] != "success"
        )
        errors = list(lines)[:ERRORS_SHOWN]
    return Report(_name(tar), stats["successes"], failed, tuple(errors))


def write_shard(
    tar: str,
    samples: Iterable[Packed],
    store: Store,
    types: Mapping[str, pa.DataType],
    checksum: Checksum | None,
    most_errors: float,
) -> Report:
    """Write a shard's files, each atomically.

    Args:
        tar: its URL.
        samples: in order.
        store: where it goes.
        types: of the columns that the table has beyond img2dataset's.
        checksum: for the manifest.
        most_errors: more failed samples than this stop the job.

    Raises:
        ValueError: too many samples failed; nothing was written then.
        StoreError: the store fails.
    """
    schema = pa.schema(_TABLE | {name: kind for name, kind in types.items() if name not in _TABLE})
    rows: dict[str, list[Any]] = {name: [] for name in schema.names}
    errors: list[str] = []
    with store.composing(tar) as path:
        with path.open("wb") as file:
            digest = _write_tar(file, _watch(samples, rows, errors, most_errors, tar))
        if protocol_of(tar) == "file":
            os.utime(path, ns=(time := _DATE * 10**9 + digest % 10**9, time))
        table, _, problems = describe(str(path), store, checksum)
    write(table, tar, store.identity(tar), problems, store, manifest_url(tar, store), checksum)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({f.name: column(rows[f.name], f.type) for f in schema}), sink, compression="zstd")
    store.write(beside(tar, ".parquet"), sink.getvalue().to_pybytes())
    status = Counter(rows["status"])
    stats = {
        "count": len(rows["status"]),
        "successes": status["success"],
        "failed_to_download": status["failed_to_download"],
        "failed_to_resize": status["failed_to_resize"],
        "status_dict": {"success": status["success"], **Counter(m for m in rows["error_message"] if m is not None)},
    }
    store.write(beside(tar, "_stats.json"), json.dumps(stats, indent=4, ensure_ascii=False).encode())
    written = status.pop("success", 0)
    return Report(_name(tar), written, dict(status), tuple(errors[:ERRORS_SHOWN]))


def column(values: list[Any], kind: pa.DataType) -> pa.Array:
    """Values of manifests or score files as a column; text where they are of several kinds."""
    if pa.types.is_string(kind):
        values = [v if v is None or isinstance(v, str) else json.dumps(v, default=str) for v in values]
    return pa.array(values, kind)


def _watch(
    samples: Iterable[Packed], rows: dict[str, list[Any]], errors: list[str], most_errors: float, tar: str
) -> Iterable[Packed]:
    """The samples that can be written; notes all of them in `rows`, and in `errors` those that cannot."""
    for packed in samples:
        row, success = packed.row, packed.status == "success"
        height, width = packed.size if packed.size is not None else (None, None)
        told = {
            **row.values,  # below what is ours to say
            "key": row.new_key,
            "caption": packed.caption if success else row.values["caption"],
            "status": packed.status,
            "error_message": packed.error,
            "width": width,
            "height": height,
            "original_width": row.values["original_width"] or row.size[1],
            "original_height": row.values["original_height"] or row.size[0],
            "source": row.source,
            "source_shard": _name(redact(row.shard)),
            "source_key": row.key,
        }
        for name, values in rows.items():
            values.append(told[name])
        if success:
            yield packed
            continue
        errors.append(_line(told["source_shard"], row.key, str(packed.error)))
        if len(errors) > most_errors:
            raise ValueError(
                f"{len(errors)} samples of {_name(tar)} cannot be packed, more than max_errors allows; the last is"
                f" {errors[-1]}: leave such samples out with `where`, or raise max_errors"
            )


def _write_tar(file: BinaryIO, samples: Iterable[Packed]) -> int:
    """Write a tar as webdataset's writer would, but with members in the order they come in: the first picture of a
    sample is the one that counts. Returns a hash of the content."""
    digested = _Digested(file)
    with tarfile.open(fileobj=digested, mode="w|", format=tarfile.GNU_FORMAT) as tar:  # type: ignore[call-overload]
        for packed in samples:
            for extension, data in packed.members:
                info = tarfile.TarInfo(f"{packed.row.new_key}.{extension}")
                info.size, info.mode = len(data), 0o444
                tar.addfile(info, io.BytesIO(data))
    return digested.digest.intdigest()


class _Digested:
    """A file that is only written, with a hash of what was."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, xxhash.xxh3_64()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self.file.write(data)


def _line(shard: str, key: str, reason: str) -> str:
    return f"{key!r} in {shard}: {reason}"


def _name(url: str) -> str:
    return Path(url).name
