"""Global filters: from columns of all shards to a score file for each."""

import json
from collections.abc import Sequence

import pyarrow as pa
import xxhash

from conf.errors import ConfigError
from data.curation.base import GlobalFilter
from data.manifest import Manifest
from data.parquet import open_parquet
from data.scores import Recipe, as_json, open_scores, read_scored, score_columns, write_scores
from data.store import Store, redact
from data.tracking import RunLog


class Columns:
    """A shard's columns, wherever they lie.

    Args:
        manifest: of the shard.
        store: where it lies.
        filters: by column, those whose score files hold it.
    """

    def __init__(self, manifest: Manifest, store: Store, filters: dict[str, str]) -> None:
        self._manifest, self._store, self._filters = manifest, store, filters

    @property
    def rows(self) -> int:
        """Number of samples."""
        return self._manifest.rows

    def read(self, columns: Sequence[str]) -> pa.Table:
        """See `ShardColumns`."""
        found: dict[str, pa.ChunkedArray | pa.Array] = {}
        with open_parquet(self._manifest.url, self._store) as file:
            own = [c for c in columns if c not in self._filters and c in file.schema_arrow.names]
            table = file.read(columns=own, use_threads=False)
            found |= {name: table[name] for name in own}
        for name in sorted({self._filters[c] for c in columns if c in self._filters}):
            with open_scores(self._manifest, name, self._store) as file:
                table = file.read(columns=[c for c in columns if self._filters.get(c) == name], use_threads=False)
            found |= {c: table[c] for c in table.column_names}
        return pa.table({c: found.get(c, pa.nulls(self.rows)) for c in columns})


def score_everywhere(
    one: GlobalFilter, manifests: Sequence[Manifest], store: Store, tasks: int = 1, log: RunLog | None = None
) -> None:
    """Bring the score files of a global filter up to date, in all shards, with the help of so many processes. The log
    gets rows about the progress.

    Raises:
        ConfigError: a column that it needs is nowhere.
        ValueError: likewise, in some shards.
        StoreError: the store fails.
    """
    filters = _providers(one, manifests, store)
    recipe = Recipe(one.version, as_json(one.settings()), _inputs(manifests, sorted(set(filters.values())), store))
    scored = [read_scored(manifest, one.name, store) for manifest in manifests]
    due = [found is None or found.recipe != recipe for found in scored]
    if not any(due):
        return
    tables = one.score_all([Columns(manifest, store, filters) for manifest in manifests], tasks, log)
    for manifest, is_due, table in zip(manifests, due, tables, strict=True):
        if is_due:
            write_scores(manifest, one.name, table.cast(one.columns), store, recipe)


def _providers(one: GlobalFilter, manifests: Sequence[Manifest], store: Store) -> dict[str, str]:
    """By needed column, the filter that writes it; those of manifests are left out."""
    own: set[str] = set()
    for manifest in manifests:  # a field may occur in some shards only
        if own >= set(one.needs):
            return {}
        with open_parquet(manifest.url, store) as file:
            own.update(file.schema_arrow.names)
    filters: dict[str, str] = {}
    for name, schema in score_columns(manifests[0].url, store).items():
        filters |= {c: name for c in schema.names if c in one.needs and c not in own and name != one.name}
    if missing := sorted(set(one.needs) - own - filters.keys()):
        raise ConfigError(
            f"the filter {one.name!r} needs the column {missing[0]!r}, which neither {redact(manifests[0].url)} nor a "
            "score file beside it has: run the filter that writes it, before this one or together with it"
        )
    return filters


def _inputs(manifests: Sequence[Manifest], filters: Sequence[str], store: Store) -> str:
    """A hash of all that a global filter reads, from the hashes that the files' metadata hold."""
    digest = xxhash.xxh3_128()
    for manifest in manifests:
        digest.update(manifest.digest.encode())
        for name in filters:
            scored = read_scored(manifest, name, store)
            digest.update(json.dumps([name, scored.content if scored else None]).encode())
    return digest.hexdigest()
