"""What a shard's samples are: a tar's members, looked at as briefly as possible, as rows of its manifest."""

import json
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from data.hashing import text64
from data.manifest import HASHES, STRUCTURE, Checksum, Manifest
from data.media_size import MediaSize, image_size, media_member, video_size
from data.parquet import open_parquet
from data.ranged_file import RangedFile
from data.store import Identity, Store, StoreError, redact
from data.tar_index import Member, Problem, Sample, read_samples

LARGEST_TEXT = 1 << 20
"""Captions and JSON beyond this many bytes are not taken into the manifest."""
CHECKSUM_BLOCK = 1 << 20

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


@dataclass(slots=True)
class _Detail:
    """What a look at one member gave."""

    size: MediaSize | None = None
    text: str | None = None
    fields: dict[str, Any] | None = None
    checksum: bytes | None = None


def describe(shard: str, store: Store, checksum: Checksum | None = None) -> tuple[pa.Table, Identity, list[Problem]]:
    """A shard's manifest rows, the state of the shard they describe, and what is wrong with it.

    Raises:
        StoreError: the store fails, or the shard changes while it is read.
    """
    if checksum is not None and checksum not in HASHES:
        raise ValueError(f"checksum must be one of {sorted(HASHES)} or null, got {checksum!r}")
    identity = store.identity(shard)
    file = store.open(shard)
    problems: list[Problem] = []
    samples, tar_problems = read_samples(file, partial(_inspect, file, checksum, problems))
    if store.identity(shard) != identity:
        raise StoreError(f"{redact(shard)} changed while it was being indexed; try again when it is complete")
    problems = tar_problems + problems + _missing_members(samples)
    return _table(samples, checksum), identity, problems


def _inspect(
    file: RangedFile, checksum: Checksum | None, problems: list[Problem], key: str, extension: str, member: Member
) -> _Detail:
    detail = _Detail()
    if checksum is not None:
        detail.checksum = _checksum(file, member, checksum)
    media = media_member([extension])
    try:
        if media is not None and media[1] == "image":
            detail.size = image_size(file.part(member.offset, member.size))
        elif media is not None:
            detail.size = video_size(file.part(member.offset, member.size, block=256 << 10))
    except ValueError as error:
        problems.append(Problem("unreadable media", f"{member.name!r}: {error}", key, member.offset))
    if extension in ("txt", "json"):
        if member.size > LARGEST_TEXT:
            problems.append(Problem("bad json", f"{member.name!r}: {member.size} bytes", key, member.offset))
            return detail
        text = file.pread(member.offset, member.size).decode(errors="replace")
        if extension == "txt":
            detail.text = text.strip()
            return detail
        try:
            detail.fields = _object(text)
        except ValueError as error:
            problems.append(Problem("bad json", f"{member.name!r}: {error}", key, member.offset))
    return detail


def _checksum(file: RangedFile, member: Member, algorithm: str) -> bytes:
    digest = HASHES[algorithm]()
    for begin in range(0, member.size, CHECKSUM_BLOCK):
        digest.update(file.pread(member.offset + begin, min(CHECKSUM_BLOCK, member.size - begin)))
    return digest.digest()


def _object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"holds a {type(value).__name__}, not an object")
    return value


def _missing_members(samples: list[Sample[_Detail]]) -> list[Problem]:
    """Samples that lack what more than half of the shard's samples have; one kind of picture is as good as another."""
    kinds = [{_kind(extension) for extension in sample.members} for sample in samples]
    counts = Counter(kind for own in kinds for kind in own)
    usual = {kind for kind, count in counts.items() if 2 * count > len(samples)}
    problems = []
    for sample, own in zip(samples, kinds, strict=True):
        if missing := sorted(usual - own):
            detail = f"{sample.key!r} has no {', '.join(missing)}, unlike most samples of the shard"
            problems.append(Problem("missing member", detail, sample.key, next(iter(sample.members.values())).offset))
    return problems


def _kind(extension: str) -> str:
    media = media_member([extension])
    return extension if media is None or "." in extension else media[1]


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
        arrays["checksums"] = pa.array(checksums, pa.list_(pa.binary(HASHES[checksum]().digest_size)))
    for name in sorted(fields):
        values = [fields[name].get(row) for row in range(len(samples))]
        arrays[name] = _field_array(name, values)
    return pa.table(arrays)


def _is_side(value: Any) -> bool:
    return isinstance(value, int) and 0 < value < 1 << 31


def standard_name(field: str) -> str:
    """The manifest's name of a JSON field, whatever its spelling."""
    lower = field.lower()
    return _UPPER_ALIASES.get(field) or _ALIASES.get(lower, lower)


def _standard_fields(raw: dict[str, Any]) -> dict[str, Any]:
    """The fields of a sample's JSON under their standard names; the first of several spellings that is set wins."""
    fields: dict[str, Any] = {}
    for name, value in raw.items():
        standard = standard_name(name)
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


def verify_shard(manifest: Manifest, store: Store) -> list[str]:
    """A line for each member whose bytes are not those of its checksum."""
    assert manifest.checksum is not None
    wrong = []
    file = store.open(manifest.shard)
    with open_parquet(manifest.url, store) as parquet:
        table = parquet.read(columns=["key", "extensions", "offsets", "sizes", "checksums"])
    for row in table.to_pylist():
        members = zip(row["extensions"], row["offsets"], row["sizes"], row["checksums"], strict=True)
        for extension, offset, size, expected in members:
            if offset + size > file.size or _checksum(file, Member("", offset, size), manifest.checksum) != expected:
                wrong.append(f"{row['key']}.{extension} at byte {offset} differs from its checksum")
    return wrong
