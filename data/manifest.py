"""The manifest: one Parquet file per shard, one row per sample.

Columns: `key`, `key_hash` (xxHash64 of the key), `extensions`, `offsets`, `sizes` and optionally `checksums` (lists, an
entry per member), `width`, `height`, `frames`, `fps`, `duration`, `caption`, and what the samples' `.json` hold, under
lower-case names. The file's metadata name the state of the shard that it describes; a shard that changed since is
noticed. Score files, one per filter, lie beside it with a row for each of its rows.
"""

import hashlib
import json
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from data.hashing import text64
from data.store import Identity, Store, StoreError, local_path, protocol_of, redact
from data.tar_index import Problem

VERSION = 1
SUFFIX = ".manifest.parquet"
ROW_GROUP = 4096
OPEN_MANIFESTS = 64
PROBLEMS_KEPT = 200
"""Problems listed in full per shard; all are counted."""

Checksum = Literal["xxh128", "sha256"]
HASHES: dict[str, Callable[[], Any]] = {"xxh128": xxhash.xxh3_128, "sha256": hashlib.sha256}
_META = b"millrace"

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


def score_url(manifest: str, name: str) -> str:
    """Where the scores of a filter lie, beside a manifest."""
    return manifest.removesuffix(SUFFIX) + f".{name}.parquet"


def score_names(manifest: str, store: Store) -> list[str]:
    """The filters whose scores lie beside a manifest."""
    prefix = score_url(manifest, "").removesuffix(".parquet")
    found = store.glob(f"{prefix}*.parquet")
    stem = prefix.rpartition("/")[2]
    names = [url.rpartition("/")[2].removeprefix(stem).removesuffix(".parquet") for url in found]
    return sorted(name for name in names if name != "manifest" and "." not in name)


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


# --- files ------------------------------------------------------------------------------------------------------


def write(
    table: pa.Table,
    shard: str,
    identity: Identity,
    problems: Sequence[Problem],
    store: Store,
    url: str,
    checksum: str | None = None,
) -> Manifest:
    """Write a shard's manifest, atomically."""
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
    store.write(url, to_parquet(table, {"version": VERSION, "shard": redact(shard).rpartition("/")[2], **told}))
    return manifest


def to_parquet(table: pa.Table, told: dict[str, Any]) -> bytes:
    """A table as Parquet, compressed with zstd, with our metadata."""
    sink = pa.BufferOutputStream()
    table = table.replace_schema_metadata({_META: json.dumps(told)})
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
    """Our metadata of a Parquet file; empty for a file that is not ours."""
    return json.loads((file.schema_arrow.metadata or {}).get(_META, b"{}"))


def read_manifest(shard: str, url: str, store: Store) -> Manifest | None:
    """What the manifest file says, or None where there is none that this version can read."""
    if not store.exists(url):
        return None
    try:
        with open_parquet(url, store) as file:
            told = told_by(file)
    except (pa.ArrowInvalid, json.JSONDecodeError):
        return None  # not a Parquet file: index again
    return _parse(told, shard, url) if told.get("version") == VERSION else None


def _parse(told: dict[str, Any], shard: str, url: str) -> Manifest:
    values = {f.name: told[f.name] for f in fields(Manifest) if f.name not in ("shard", "url")}
    values["problems"] = tuple(Problem(**p) for p in told["problems"])
    values["problem_counts"] = tuple((kind, count) for kind, count in told["problem_counts"])
    return Manifest(shard=shard, url=url, **values)


def write_scores(manifest: Manifest, name: str, scores: pa.Table, store: Store) -> str:
    """Write a filter's scores for a shard: a row for each manifest row, in order. Returns their URL."""
    if scores.num_rows != manifest.rows:
        raise ValueError(f"{name}: {scores.num_rows} scores for the {manifest.rows} rows of {redact(manifest.shard)}")
    if taken := sorted(set(scores.column_names) & (STRUCTURE.keys() | {"checksums", "row", "shard"})):
        raise ValueError(f"{name}: the score columns {taken} have names of the manifest's own")
    if name == "manifest" or "." in name or "/" in name:
        raise ValueError(f"{name!r} cannot be the name of a filter")
    url = score_url(manifest.url, name)
    store.write(url, to_parquet(scores, {"version": VERSION, "identity": manifest.identity, "digest": manifest.digest}))
    return url


def score_identity(manifest: Manifest, name: str, store: Store) -> Identity:
    """The state of a filter's scores for a shard.

    Raises:
        ValueError: there are none.
    """
    url = score_url(manifest.url, name)
    try:
        return store.identity(url)
    except StoreError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        shard = redact(manifest.shard)
        raise ValueError(
            f"{shard} has no scores of the filter {name!r} ({redact(url)}): run it on all shards"
        ) from error


def open_scores(manifest: Manifest, name: str, store: Store) -> pq.ParquetFile:
    """A filter's scores for a shard.

    Raises:
        ValueError: there are none, or they were made for another state of the shard.
    """
    score_identity(manifest, name, store)
    url = score_url(manifest.url, name)
    file = open_parquet(url, store)
    if told_by(file).get("identity") != manifest.identity or file.metadata.num_rows != manifest.rows:
        file.close()
        raise ValueError(
            f"{redact(url)}: these scores belong to another state of {redact(manifest.shard)}, which changed since: "
            f"run the filter {name!r} again"
        )
    return file


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


# --- reading rows -----------------------------------------------------------------------------------------------


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
            for name in score_names(self.manifests[shard], self.store):
                if column in self._file(shard, name).schema_arrow.names:
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
            return open_scores(_parse(told, told["shard"], url), name, self.store)
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
