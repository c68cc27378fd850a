"""The manifest: one Parquet file per shard, one row per sample.

Columns: `key`, `key_hash` (xxHash64 of the key), `extensions`, `offsets`, `sizes` and optionally `checksums` (lists, one
entry per member), `width`, `height`, `frames`, `fps`, `duration`, `caption`, and what the samples' `.json` hold, under
lower-case names. The file's metadata name the state of the shard that it describes; a shard that changed since is
noticed. Score files, one per filter, lie beside it with a row for each of its rows.
"""

import hashlib
import json
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from data.hashing import text64
from data.media_size import MediaSize, image_size, media_member, video_size
from data.store import Identity, RangedFile, Store, StoreError, local_path, protocol_of, redact
from data.tar_index import Member, Problem, Sample, read_samples

VERSION = 1
SUFFIX = ".manifest.parquet"
ROW_GROUP = 4096
LARGEST_TEXT = 1 << 20
"""Captions and JSON beyond this many bytes are not taken into the manifest."""
PROBLEMS_KEPT = 200
"""Problems listed in full per shard; all are counted."""

Checksum = Literal["xxh128", "sha256"]
_HASHES: dict[str, Callable[[], Any]] = {"xxh128": xxhash.xxh3_128, "sha256": hashlib.sha256}
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

_ALIASES = {  # LAION's and img2dataset's names for one thing, in lower case
    "text": "caption",
    "aesthetic": "aesthetic_score",
    "aesthetics_score": "aesthetic_score",
    "sample_id": "id",
}
_UPPER_ALIASES = {"WIDTH": "original_width", "HEIGHT": "original_height"}  # LAION's: of the picture on the web
_LEFT_OUT = {"key", "exif"}
_TYPES = {
    "url": pa.string(),
    "caption": pa.string(),
    "similarity": pa.float64(),
    "punsafe": pa.float64(),
    "pwatermark": pa.float64(),
    "aesthetic_score": pa.float64(),
    "original_width": pa.int64(),
    "original_height": pa.int64(),
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

    def score_url(self, name: str) -> str:
        """Where the scores of a filter lie."""
        return self.url.removesuffix(SUFFIX) + f".{name}.parquet"


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


# --- building ---------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Detail:
    """What a look at one member gave."""

    size: MediaSize | None = None
    text: str | None = None
    fields: dict[str, Any] | None = None
    checksum: bytes | None = None


def build(shard: str, store: Store, checksum: Checksum | None = None) -> tuple[pa.Table, Identity, list[Problem]]:
    """A shard's manifest rows, the state of the shard they describe, and what is wrong with it.

    Raises:
        StoreError: the store fails, or the shard changes while it is read.
    """
    if checksum is not None and checksum not in _HASHES:
        raise ValueError(f"checksum must be one of {sorted(_HASHES)} or null, got {checksum!r}")
    identity = store.identity(shard)
    file = store.open(shard)
    problems: list[Problem] = []
    samples, tar_problems = read_samples(file, partial(_inspect, file, checksum, problems))
    if store.identity(shard) != identity:
        raise StoreError(f"{redact(shard)} changed while it was being indexed; try again when it is complete")
    problems = tar_problems + problems + _missing_members(samples)
    return _table(samples, checksum), identity, problems


def _inspect(
    file: RangedFile, checksum: Checksum | None, problems: list[Problem], extension: str, member: Member
) -> _Detail:
    detail = _Detail()
    if checksum is not None:
        digest = _HASHES[checksum]()
        for begin in range(0, member.size, file.block):
            digest.update(file.pread(member.offset + begin, min(file.block, member.size - begin)))
        detail.checksum = digest.digest()
    media = media_member([extension])
    try:
        if media is not None and media[1] == "image":
            detail.size = image_size(file.part(member.offset, member.size))
        elif media is not None:
            detail.size = video_size(file.part(member.offset, member.size, block=256 << 10))
    except ValueError as error:
        problems.append(Problem("unreadable media", f"{member.name!r}: {error}", member.name, member.offset))
    if extension in ("txt", "json"):
        if member.size > LARGEST_TEXT:
            problems.append(Problem("bad json", f"{member.name!r}: {member.size} bytes", member.name, member.offset))
            return detail
        text = file.pread(member.offset, member.size).decode(errors="replace")
        if extension == "txt":
            detail.text = text.strip()
            return detail
        try:
            detail.fields = _object(text)
        except ValueError as error:
            problems.append(Problem("bad json", f"{member.name!r}: {error}", member.name, member.offset))
    return detail


def _object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"holds a {type(value).__name__}, not an object")
    return value


def _missing_members(samples: list[Sample[_Detail]]) -> list[Problem]:
    """Samples that lack an extension that more than half of the shard's samples have."""
    counts = Counter(extension for sample in samples for extension in sample.members)
    usual = {extension for extension, count in counts.items() if 2 * count > len(samples)}
    problems = []
    for sample in samples:
        if missing := sorted(usual - sample.members.keys()):
            detail = f"{sample.key!r} has no {', '.join(missing)}, unlike most samples of the shard"
            problems.append(Problem("missing member", detail, sample.key, next(iter(sample.members.values())).offset))
    return problems


def _table(samples: list[Sample[_Detail]], checksum: Checksum | None) -> pa.Table:
    columns: dict[str, list] = {name: [] for name in STRUCTURE}
    checksums: list[list[bytes | None]] = []
    fields: dict[str, dict[int, Any]] = {}
    for row, sample in enumerate(samples):
        extensions = list(sample.members)
        details = [sample.details[e] for e in extensions]
        chosen = media_member(extensions)
        size = details[chosen[0]].size if chosen is not None else None
        own = _standard_fields(next((d.fields for d in details if d.fields is not None), {}))
        text = next((d.text for d in details if d.text is not None), None)
        caption = own.pop("caption", None)
        width, height = own.pop("width", None), own.pop("height", None)
        if chosen is None and _is_side(width) and _is_side(height):
            size = MediaSize(width, height)  # precomputed latents and the like: only the JSON knows
        columns["key"].append(sample.key)
        columns["key_hash"].append(text64(sample.key))
        columns["extensions"].append(extensions)
        columns["offsets"].append([m.offset for m in sample.members.values()])
        columns["sizes"].append([m.size for m in sample.members.values()])
        for name in ("width", "height", "frames", "fps", "duration"):
            columns[name].append(None if size is None else getattr(size, name))
        columns["caption"].append(text if text is not None else _convert(caption, pa.string()))
        checksums.append([d.checksum for d in details])
        for name, value in own.items():
            fields.setdefault(name, {})[row] = value
    arrays = {name: pa.array(values, STRUCTURE[name]) for name, values in columns.items()}
    if checksum is not None:
        arrays["checksums"] = pa.array(checksums, pa.list_(pa.binary(_HASHES[checksum]().digest_size)))
    for name in sorted(fields):
        values = [fields[name].get(row) for row in range(len(samples))]
        arrays[name] = _field_array(name, values)
    return pa.table(arrays)


def _is_side(value: Any) -> bool:
    return isinstance(value, int) and 0 < value < 1 << 31


def _standard_fields(raw: dict[str, Any]) -> dict[str, Any]:
    """The fields of a sample's JSON under their standard names; the first of several spellings that is set wins."""
    fields: dict[str, Any] = {}
    for name, value in raw.items():
        lower = name.lower()
        standard = _UPPER_ALIASES.get(name) or _ALIASES.get(lower, lower)
        if standard in _LEFT_OUT or value is None:
            continue
        if (standard in STRUCTURE and standard not in ("caption", "width", "height")) or standard == "checksums":
            standard = "json_" + standard
        fields.setdefault(standard, value)
    return fields


def _field_array(name: str, values: list[Any]) -> pa.Array:
    """A typed column: the standard type of a standard field, else the narrowest that holds all values."""
    kinds = {type(v) for v in values if v is not None}
    if name in _TYPES:
        target = _TYPES[name]
    elif kinds == {bool}:
        target = pa.bool_()
    elif kinds == {int} and all(v is None or -(1 << 63) <= v < 1 << 63 for v in values):
        target = pa.int64()
    elif kinds <= {int, float}:
        target = pa.float64()
    else:
        target = pa.string()
    return pa.array([_convert(v, target) for v in values], target)


def _convert(value: Any, target: pa.DataType) -> Any:
    """The value in the column's type, or None where it cannot be."""
    if value is None:
        return None
    if pa.types.is_string(target):
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    try:
        if pa.types.is_floating(target):
            return float(value)
        if pa.types.is_integer(target):
            return int(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return value


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
    pq.write_table(table, sink, compression="zstd", row_group_size=ROW_GROUP, write_statistics=False)
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
    if told.pop("version", None) != VERSION:
        return None
    told.pop("shard")
    told["problems"] = tuple(Problem(**p) for p in told["problems"])
    told["problem_counts"] = tuple((k, n) for k, n in told["problem_counts"])
    return Manifest(shard=shard, url=url, **told)


def write_scores(manifest: Manifest, name: str, scores: pa.Table, store: Store) -> str:
    """Write a filter's scores for a shard: a row for each manifest row, in order. Returns their URL."""
    if scores.num_rows != manifest.rows:
        raise ValueError(f"{name}: {scores.num_rows} scores for the {manifest.rows} rows of {redact(manifest.shard)}")
    if taken := sorted(set(scores.column_names) & (STRUCTURE.keys() | {"checksums", "row", "shard"})):
        raise ValueError(f"{name}: the score columns {taken} have names of the manifest's own")
    if name == "manifest" or "." in name or "/" in name:
        raise ValueError(f"{name!r} cannot be the name of a filter")
    url = manifest.score_url(name)
    store.write(url, to_parquet(scores, {"version": VERSION, "identity": manifest.identity, "digest": manifest.digest}))
    return url


def open_scores(manifest: Manifest, name: str, store: Store) -> pq.ParquetFile:
    """A filter's scores for a shard.

    Raises:
        ValueError: there are none, or they were made for another state of the shard.
    """
    url = manifest.score_url(name)
    if not store.exists(url):
        raise ValueError(
            f"{redact(manifest.shard)} has no scores of the filter {name!r} ({redact(url)}): run it on all shards"
        )
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
    digest = _HASHES[algorithm]()
    digest.update(payload)
    return digest.digest()


# --- reading rows -----------------------------------------------------------------------------------------------


class ManifestReader:
    """Rows of many manifests, for a loader: opens what it needs and remembers what it used last.

    Pickles as its arguments alone; each process has its own memory, of at most about `memory` bytes.

    Args:
        store: where the manifests lie.
        manifests: their URLs, by shard index (`Selection.manifests`).
        memory: bytes of decoded rows to keep.
    """

    def __init__(self, store: Store, manifests: Sequence[str], memory: int = 64 << 20) -> None:
        self.store, self.manifests, self.memory = store, manifests, memory
        self._files: OrderedDict[str, pq.ParquetFile] = OrderedDict()
        self._groups: OrderedDict[tuple[str, int, tuple[str, ...]], pa.Table] = OrderedDict()
        self._held = 0

    def __reduce__(self) -> tuple:
        return ManifestReader, (self.store, self.manifests, self.memory)

    def rows(self, shard: int, rows: Sequence[int] | np.ndarray, columns: Sequence[str]) -> dict[str, list]:
        """The values of some columns at some rows of a shard, in the rows' order.

        A column that this shard's samples do not have (a field of other shards' JSON) is None throughout.

        Raises:
            IndexError: a row beyond the manifest's end: it changed under a selection made before.
            StoreError: the store fails.
        """
        url = self.manifests[shard]
        wanted = np.asarray(rows, dtype=np.int64)
        file = self._file(url)
        names = tuple(sorted(set(columns) & set(file.schema_arrow.names)))
        values: dict[str, list] = {name: [None] * len(wanted) for name in columns}
        if len(wanted) == 0:
            return values
        if wanted.min() < 0 or wanted.max() >= file.metadata.num_rows:
            raise IndexError(
                f"{redact(url)} has {file.metadata.num_rows} rows, row {wanted.max()} was asked for: index and select again"
            )
        for group in np.unique(wanted // ROW_GROUP):
            places = np.flatnonzero(wanted // ROW_GROUP == group)
            table = self._group(url, int(group), names).take(pa.array(wanted[places] - group * ROW_GROUP))
            for name in names:
                for place, value in zip(places, table[name].to_pylist(), strict=True):
                    values[name][place] = value
        return values

    def _file(self, url: str) -> pq.ParquetFile:
        if url not in self._files:
            self._files[url] = open_parquet(url, self.store)
            if len(self._files) > 64:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(url)
        return self._files[url]

    def _group(self, url: str, group: int, names: tuple[str, ...]) -> pa.Table:
        key = url, group, names
        if key in self._groups:
            self._groups.move_to_end(key)
            return self._groups[key]
        table = self._file(url).read_row_group(group, columns=list(names), use_threads=False)
        self._groups[key] = table
        self._held += table.nbytes
        while self._held > self.memory and len(self._groups) > 1:
            self._held -= self._groups.popitem(last=False)[1].nbytes
        return table


def summary(manifests: Iterable[Manifest]) -> dict[str, int]:
    """How often each kind of problem occurs in all shards together."""
    total: Counter[str] = Counter()
    for manifest in manifests:
        total.update(dict(manifest.problem_counts))
    return dict(total)
