"""Score files: what a filter tells of each sample of a shard, in a Parquet file of its own beside the manifest.

A score file has a row for each of the manifest's, in order. Its metadata name what made it (filter, version, settings),
the state of the shard that it belongs to, a hash of its rows, and what went wrong with which samples.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from data.manifest import STRUCTURE, SUFFIX, Manifest
from data.parquet import open_parquet, to_parquet, told_at, told_by
from data.store import Identity, Store, StoreError, redact

VERSION = 1
ERRORS_KEPT = 200
"""Errors listed one by one per score file; all are counted."""


@dataclass(frozen=True)
class Recipe:
    """What makes a filter's scores what they are: equal recipes on an equal shard give equal scores.

    Args:
        version: of the filter's code.
        settings: JSON values: all that changes the scores.
        inputs: hash of the other scores (of all shards) that these are made from, or "".
    """

    version: int = 1
    settings: dict[str, Any] = field(default_factory=dict)
    inputs: str = ""


@dataclass(frozen=True)
class ScoreError:
    """A sample that a filter could not score.

    Args:
        row: in the manifest.
        key: of the sample.
        reason: a few words, the same for all samples that fail in this way.
        detail: what is particular to this one.
    """

    row: int
    key: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Scored:
    """What a score file's metadata say.

    Args:
        recipe: what made it.
        content: hash of its rows.
        error_counts: how many samples could not be scored, by reason.
        errors: at most `ERRORS_KEPT` of them.
    """

    recipe: Recipe
    content: str
    error_counts: tuple[tuple[str, int], ...] = ()
    errors: tuple[ScoreError, ...] = ()


@dataclass(frozen=True)
class SampleFailure:
    """A sample that filters could not score, for one reason that they share.

    Args:
        shard: its shard, fit for logs.
        key: of the sample.
        reason, detail: see `ScoreError`.
        filters: that failed so.
    """

    shard: str
    key: str
    reason: str
    detail: str
    filters: list[str] = field(default_factory=list)


def error_counts(files: Sequence[Scored | None]) -> Counter[str]:
    """A filter's errors by reason, over all shards."""
    counts: Counter[str] = Counter()
    for file in files:
        counts.update(dict(file.error_counts if file is not None else ()))
    return counts


def failures(manifests: Sequence[Manifest], scored: Mapping[str, Sequence[Scored | None]]) -> list[SampleFailure]:
    """The samples that are known to have failed, each once for each reason, in the order of shards and rows.

    Args:
        manifests: of the shards.
        scored: by filter, what there is for each shard.
    """
    found: list[SampleFailure] = []
    for i, manifest in enumerate(manifests):
        errors = [(error, name) for name, files in scored.items() if (file := files[i]) for error in file.errors]
        of_shard: dict[ScoreError, SampleFailure] = {}
        for error, name in sorted(errors, key=lambda one: one[0].row):
            first = SampleFailure(redact(manifest.shard), error.key, error.reason, error.detail)
            of_shard.setdefault(error, first).filters.append(name)
        found += of_shard.values()
    return found


def as_json(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as a score file's metadata give them back."""
    return json.loads(json.dumps(settings, sort_keys=True))


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


def score_columns(manifest: str, store: Store) -> dict[str, pa.Schema]:
    """The columns of the score files beside a manifest, by filter, whatever state of the shard they were made for;
    damaged files count as none."""
    schemas: dict[str, pa.Schema] = {}
    for name in score_names(manifest, store):
        try:
            with open_parquet(score_url(manifest, name), store) as file:
                schemas[name] = file.schema_arrow
        except pa.ArrowInvalid:
            continue
    return schemas


def write_scores(
    manifest: Manifest,
    name: str,
    scores: pa.Table,
    store: Store,
    recipe: Recipe | None = None,
    errors: Sequence[ScoreError] = (),
) -> str:
    """Write a filter's scores for a shard, atomically: a row for each manifest row, in order. Returns their URL.

    Raises:
        ValueError: another number of rows, a column of the manifest's own, or no name for a filter.
        StoreError: the store fails.
    """
    if scores.num_rows != manifest.rows:
        raise ValueError(f"{name}: {scores.num_rows} scores for the {manifest.rows} rows of {redact(manifest.shard)}")
    if taken := sorted(set(scores.column_names) & (STRUCTURE.keys() | {"checksums", "row", "shard"})):
        raise ValueError(f"{name}: the score columns {taken} have names of the manifest's own")
    if name == "manifest" or "." in name or "/" in name:
        raise ValueError(f"{name!r} cannot be the name of a filter")
    told = {
        "version": VERSION,
        "filter": name,
        "recipe": asdict(recipe or Recipe()),
        "identity": manifest.identity,
        "digest": manifest.digest,
        "content": _content(scores),
        "error_counts": sorted(Counter(error.reason for error in errors).items()),
        "errors": [asdict(error) for error in errors[:ERRORS_KEPT]],
    }
    url = score_url(manifest.url, name)
    store.write(url, to_parquet(scores, told))
    return url


def read_scored(manifest: Manifest, name: str, store: Store) -> Scored | None:
    """What is known of a filter's scores for a shard; None where there are none of the shard as it is now."""
    told = told_at(score_url(manifest.url, name), store)
    if told.get("version") != VERSION or not _belongs(told, manifest) or "recipe" not in told:
        return None
    return Scored(
        recipe=Recipe(**told["recipe"]),
        content=told["content"],
        error_counts=tuple((reason, count) for reason, count in told["error_counts"]),
        errors=tuple(ScoreError(**error) for error in told["errors"]),
    )


def _belongs(told: dict[str, Any], manifest: Manifest) -> bool:
    return told.get("identity") == manifest.identity and told.get("digest") == manifest.digest


def _content(scores: pa.Table) -> str:
    plain = scores.replace_schema_metadata(None).combine_chunks()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, plain.schema) as stream:
        stream.write_table(plain)
    return xxhash.xxh3_128(sink.getvalue()).hexdigest()


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
    if not _belongs(told_by(file), manifest):
        file.close()
        raise ValueError(
            f"{redact(url)}: these scores belong to another state of {redact(manifest.shard)}, which changed since: "
            f"run the filter {name!r} again"
        )
    return file
