"""The manifest: one Parquet file per shard, one row per sample.

Columns: `key`, `key_hash` (xxHash64 of the key), `extensions`, `offsets`, `sizes` and optionally `checksums` (lists, an
entry per member), `width`, `height`, `frames`, `fps`, `duration`, `caption`, and what the samples' `.json` hold, under
lower-case names. The file's metadata name the state of the shard that it describes; a shard that changed since is
noticed. Score files (data/scores.py), one per filter, lie beside it with a row for each of its rows.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import xxhash

from data.hashing import text64
from data.parquet import to_parquet, told_at
from data.store import Identity, Store, local_path, protocol_of, redact
from data.tar_index import Problem

VERSION = 1
SUFFIX = ".manifest.parquet"
PROBLEMS_KEPT = 200
"""Problems listed in full per shard; all are counted."""

Checksum = Literal["xxh128", "sha256"]
HASHES: dict[str, Callable[[], Any]] = {"xxh128": xxhash.xxh3_128, "sha256": hashlib.sha256}

STRUCTURE = {
    "key": pa.string(),
    "key_hash": pa.uint64(),
    "extensions": pa.list_(pa.string()),
    "offsets": pa.list_(pa.int64()),
    "sizes": pa.list_(pa.int64()),
    "width": pa.uint32(),
    "height": pa.uint32(),
    "frames": pa.uint32(),
    "fps": pa.float64(),
    "duration": pa.float64(),
    "caption": pa.string(),
}


@dataclass(frozen=True)
class Manifest:
    """What a manifest file's metadata say.

    Args:
        shard: URL of the tar.
        url: URL of the manifest.
        identity: state of the shard that was indexed.
        rows: number of samples.
        digest: hash of everything in the rows but checksums: equal digests mean equal samples.
        checksum: algorithm of the members' checksums, if any.
        largest_side: of any picture, in pixels.
        problems: what was wrong, at most `PROBLEMS_KEPT` entries.
        problem_counts: how often, by kind.
    """

    shard: str
    url: str
    identity: str
    rows: int
    digest: str
    checksum: str | None
    largest_side: int
    problems: tuple[Problem, ...] = ()
    problem_counts: tuple[tuple[str, int], ...] = ()


def manifest_url(shard: str, store: Store, folder: str | None = None) -> str:
    """Where a shard's manifest lies: beside it, or in a folder of its own (for stores that cannot be written to).

    In such a folder, the shards of each source folder get a subfolder, named after it and a hash of its whole URL.

    Raises:
        ValueError: no folder is given and nothing can be written beside the shard.
    """
    bare = redact(shard).removesuffix("/...").partition("?")[0]
    if protocol_of(shard) == "pipe":
        bare = f"pipe/{text64(shard):016x}.tar"
    parent, _, name = bare.rpartition("/")
    stem = name.removesuffix(".tar")
    if folder is None:
        beside = f"{parent}/{stem}{SUFFIX}" if parent else stem + SUFFIX
        if not store.writable(shard) and not (protocol_of(shard) == "file" and local_path(beside).exists()):
            raise ValueError(
                f"{redact(shard)}: nothing can be written beside it; set data.manifest_folder to a folder for manifests"
            )
        return beside
    where = parent if protocol_of(shard) != "file" else str(local_path(shard).absolute().parent)
    return f"{folder.rstrip('/')}/{PurePosixPath(parent).name or 'shards'}-{text64(where):016x}/{stem}{SUFFIX}"


def write(
    table: pa.Table,
    shard: str,
    identity: Identity | str,
    problems: Sequence[Problem],
    store: Store,
    url: str,
    checksum: str | None = None,
    made_from: dict[str, Any] | None = None,
) -> Manifest:
    """Write a shard's manifest, atomically. `made_from` goes into its metadata."""
    sides = [
        np.max(c.to_numpy(zero_copy_only=False), initial=0)
        for c in (table["width"].fill_null(0), table["height"].fill_null(0))
    ]
    kept = [Problem(p.kind, p.detail, _printable(p.key), p.offset) for p in problems[:PROBLEMS_KEPT]]
    manifest = Manifest(
        shard=shard,
        url=url,
        identity=str(identity),
        rows=table.num_rows,
        digest=_digest(table),
        checksum=checksum,
        largest_side=int(max(sides)),
        problems=tuple(kept),
        problem_counts=tuple(sorted(Counter(p.kind for p in problems).items())),
    )
    told = {k: v for k, v in asdict(manifest).items() if k not in ("shard", "url")}
    name = redact(shard).rpartition("/")[2]
    store.write(url, to_parquet(table, {"version": VERSION, "shard": name, "made_from": made_from, **told}))
    return manifest


def read_manifest(shard: str, url: str, store: Store) -> Manifest | None:
    """What the manifest file says, or None where there is none that this version can read."""
    told = told_at(url, store)
    return parse_told(told, shard, url) if told.get("version") == VERSION else None


def parse_told(told: dict[str, Any], shard: str, url: str) -> Manifest:
    """A manifest of what `told_by` says of its file."""
    values = {f.name: told[f.name] for f in fields(Manifest) if f.name not in ("shard", "url")}
    values["problems"] = tuple(Problem(**p) for p in told["problems"])
    values["problem_counts"] = tuple((kind, count) for kind, count in told["problem_counts"])
    return Manifest(shard=shard, url=url, **values)


def _digest(table: pa.Table) -> str:
    digest = xxhash.xxh3_128()
    for name in sorted(set(table.column_names) - {"checksums"}):
        digest.update(name.encode() + b"\0")
        digest.update(json.dumps(table[name].to_pylist(), default=str).encode())
    return digest.hexdigest()


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def checksum_of(payload: bytes, algorithm: str) -> bytes:
    """A payload's checksum, as the manifest's `checksums` column holds it."""
    digest = HASHES[algorithm]()
    digest.update(payload)
    return digest.digest()
