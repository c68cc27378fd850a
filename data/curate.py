"""The `curate` job: filters score every sample, each into a column file of its own beside the manifests.

A file is up to date if the shard, the filter's version and its settings are what they were; all others are made anew.
So a job that was stopped, at any moment, goes on where it was, and ends with the same bytes.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import pyarrow as pa

from conf.errors import ConfigError, mistakes
from data.clips import ensure_clips
from data.curation.base import Failure, Filter, GlobalFilter, Kind
from data.curation.everywhere import score_everywhere
from data.curation.media import read_media
from data.curation.passes import score_batch
from data.curation.report import make_report
from data.index import ensure_indexed
from data.manifest import Manifest
from data.media_size import media_member
from data.parquet import open_parquet
from data.scan import check_columns
from data.scores import (
    Recipe,
    Scored,
    ScoreError,
    as_json,
    error_counts,
    failures,
    read_scored,
    score_columns,
    write_scores,
)
from data.store import Store, redact, remove_leftovers
from data.tasks import Task, Tasks, run_tasks
from data.tracking import LogConfig, RunLog, job_log
from data.where import Where

_FAILURES_SHOWN = 20


@dataclass
class FunnelConfig:
    """What the report's funnel is of.

    Args:
        where: SQL predicate over manifest and score columns; null: there is none.
    """

    where: str | None = None


@dataclass
class Config:
    """What `millrace curate` takes.

    Args:
        shards: patterns (see `Store.expand`).
        filter: the filters, by any name; null leaves one out.
        cluster: tasks that share the shards.
        manifest: what to score: "samples", or the "clips" that the filter `cuts` found in them.
        manifest_folder: where manifests and scores go; beside the shards if null.
        side: pixels; JPEGs are decoded at 1/2, 1/4 or 1/8 of their size as long as both sides are at least this.
        batch: samples that filters get at a time.
        max_errors: share of a shard's samples that a filter may fail on.
        report: a folder, or URL of one, for a page about what the filters found; null: none. No single task writes it.
        funnel: whose `where` clause the page follows.
        store: where the shards lie.
        name: of the run, which writes what it tells of itself to <runs>/<name>.
        runs: folder of runs.
        log: whether in W&B too.
    """

    shards: str | list[str]
    filter: dict[str, Any] = field(default_factory=dict)
    cluster: Tasks = field(default_factory=Tasks)
    manifest: Literal["samples", "clips"] = "samples"
    manifest_folder: str | None = None
    side: int = 512
    batch: int = 64
    max_errors: float = 0.1
    report: str | None = None
    funnel: FunnelConfig = field(default_factory=FunnelConfig)
    store: Store = field(default_factory=Store)
    name: str = "curate"
    runs: str = "runs"
    log: LogConfig = field(default_factory=LogConfig)


@dataclass(frozen=True)
class Settings:
    """How samples are read; see `Config`."""

    side: int = 512
    batch: int = 64
    max_errors: float = 0.1

    def __post_init__(self) -> None:
        if self.side < 1 or self.batch < 1 or not 0 <= self.max_errors <= 1:
            raise ValueError(
                f"side={self.side} and batch={self.batch} must be positive, max_errors={self.max_errors} in [0, 1]"
            )


def run(config: Config) -> None:
    """Score the shards, then print what was done and what went wrong.

    Raises:
        ConfigError: no shards, filters that do not go together, a wrong clause.
        ValueError: a filter failed on too many samples.
        StoreError: a store fails.
    """
    from conf.schema import build

    patterns = [config.shards] if isinstance(config.shards, str) else list(config.shards)
    started = time.perf_counter()
    with mistakes():
        tasks = Tasks(config.cluster.tasks, config.cluster.task)
        settings = Settings(config.side, config.batch, config.max_errors)
        chosen = getattr(config, "filter", None) or {}  # filter=[] leaves no trace of the group
        filters = [build(node) for node in chosen.values() if node is not None]
        if not filters and not config.report:
            raise ConfigError("no filters and no report: choose some with filter=[sharpness,...]")
        store = build(config.store)
        folder = config.report if tasks.task is None else None
        if folder and not store.writable(f"{folder}/index.html", attempt=True):
            raise ConfigError(f"report={redact(folder)} cannot be written: name a folder, or one of an object store")
        clause = Where(config.funnel.where) if folder and config.funnel.where is not None else None
        manifests = ensure_indexed(store.expand(patterns), store, config.manifest_folder)
        if config.manifest == "clips":
            manifests = ensure_clips(manifests, store)
        if clause is not None:  # a mistake in it is to be told now, not when all is scored
            schemas = [*score_columns(manifests[0].url, store).values(), *(f.columns for f in filters)]
            check_columns(manifests, store, clause, {c for schema in schemas for c in schema.names})
    with job_log(config, tasks.part) as log:
        scored = curate(manifests, filters, store, settings, tasks, log)
        _log_tables(log, manifests, scored)
        page = None
        if folder:
            with mistakes():
                report = make_report(manifests, store, config.funnel.where)
            page = report.write(folder, store)
            report.show(log, sum(manifest.rows for manifest in manifests))
    print(summary(manifests, scored, time.perf_counter() - started))
    if page is not None:
        print(f"report: {redact(page)}")
    elif config.report:
        print("report: not of one task alone; the same command without cluster.task writes it")


def curate(
    manifests: Sequence[Manifest],
    filters: Sequence[Filter | GlobalFilter],
    store: Store,
    settings: Settings | None = None,
    tasks: Tasks | None = None,
    log: RunLog | None = None,
) -> dict[str, list[Scored | None]]:
    """Bring the score files of all filters up to date. Global filters come last, and not in a single task of several.

    Args:
        manifests: of the shards, in an order that is the same for all tasks.
        filters: with names and columns of their own.
        store: where the shards lie.
        settings: how samples are read.
        tasks: that share the shards.
        log: that gets rows about the progress.

    Returns:
        By filter, what there is for each shard: None only where that is another task's.

    Raises:
        ConfigError: filters that do not go together, lack a column that one of them needs, or see no sample.
        ValueError: a filter failed on too many samples of a shard.
        StoreError: the store fails.
        ChildProcessError: a task's process was killed.
    """
    settings, tasks = settings or Settings(), tasks or Tasks()
    _check(filters)
    _check_media(manifests, filters, store)
    for folder in sorted({m.url.rpartition("/")[0] for m in manifests}):
        remove_leftovers(folder)
    local = [f for f in filters if isinstance(f, Filter)]
    due = _due(manifests, local, store, settings)
    if any(shard.filters for shard in due):
        work = partial(score_shards, manifests, local, due, store, settings)
        run_tasks(work, tasks, tasks.totals([manifest.rows for manifest in manifests]), "curate", log)
    if tasks.task is None:
        for one in filters:
            if isinstance(one, GlobalFilter):
                score_everywhere(one, manifests, store, tasks.tasks, log)
    return {f.name: [read_scored(m, f.name, store) for m in manifests] for f in filters}


def recipe(one: Filter, settings: Settings) -> Recipe:
    """What makes a filter's scores what they are."""
    seen: dict[str, Any] = {"side": settings.side, "frames": ", ".join(one.frames)} if one.media == "image" else {}
    if one.batched:  # models round differently in other batches
        seen["samples_at_once"] = settings.batch
    return Recipe(one.version, as_json({**one.settings(), **seen}))


def _check(filters: Sequence[Filter | GlobalFilter]) -> None:
    names = Counter(f.name for f in filters)
    columns = Counter(column for f in filters for column in f.columns.names)
    for what, counts in (("filters have the name", names), ("filters write the column", columns)):
        if twice := [name for name, count in counts.items() if count > 1]:
            raise ConfigError(f"two {what} {twice[0]!r}")


def _check_media(manifests: Sequence[Manifest], filters: Sequence[Filter | GlobalFilter], store: Store) -> None:
    of_videos = [f.name for f in filters if isinstance(f, Filter) and f.kinds == {"video"}]
    if not of_videos or not any(manifest.rows for manifest in manifests):
        return
    for manifest in manifests:
        with open_parquet(manifest.url, store) as file:
            extensions = file.read(columns=["extensions"], use_threads=False)["extensions"].to_pylist()
        if any(member is not None and member[1] == "video" for member in map(media_member, extensions)):
            return
    first = redact(manifests[0].shard)
    raise ConfigError(f"the filter {of_videos[0]!r} scores videos, and no sample has one (the first shard is {first})")


@dataclass(frozen=True)
class Due:
    """What is to be done of a shard.

    Args:
        filters: whose scores are to be made.
        errors: of the others, whose scores are up to date, by filter and reason.
    """

    filters: list[str]
    errors: dict[str, int] = field(default_factory=dict)


def _due(manifests: Sequence[Manifest], filters: Sequence[Filter], store: Store, settings: Settings) -> list[Due]:
    """For each shard."""
    recipes = {f.name: recipe(f, settings) for f in filters}

    def of_shard(manifest: Manifest) -> Due:
        due = Due([])
        for name, wanted in recipes.items():
            found = read_scored(manifest, name, store)
            if found is None or found.recipe != wanted:
                due.filters.append(name)
            else:
                due.errors.update((_reason(name, reason), count) for reason, count in found.error_counts)
        return due

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(of_shard, manifests))


def _reason(name: str, reason: str) -> str:
    """Why a filter failed, among those of all filters."""
    return f"{name}: {reason}"


def score_shards(
    manifests: Sequence[Manifest],
    filters: Sequence[Filter],
    due: Sequence[Due],
    store: Store,
    settings: Settings,
    task: Task,
) -> None:
    """What one task does: score its own shards, each with those of the filters that are due for it."""
    for shard in task.own(range(len(manifests))):
        manifest, wanted = manifests[shard], due[shard].filters
        task.skip(0 if wanted else manifest.rows, due[shard].errors)
        if wanted:
            _score_shard(manifest, [f for f in filters if f.name in wanted], store, settings, task)


def _score_shard(manifest: Manifest, filters: Sequence[Filter], store: Store, settings: Settings, task: Task) -> None:
    """Read a shard once for all filters, and write a file for each."""
    needs = sorted({"caption", *(name for f in filters for name in f.needs)})
    kinds: frozenset[Kind] = frozenset().union(*(f.kinds for f in filters))
    columns: dict[str, dict[str, list]] = {f.name: {column: [] for column in f.columns.names} for f in filters}
    errors: dict[str, list[ScoreError]] = {f.name: [] for f in filters}
    row = 0
    for samples in read_media(manifest, store, needs, kinds, settings.side, settings.batch):
        failed: Counter[str] = Counter()
        for one, outcomes in zip(filters, score_batch(filters, samples), strict=True):
            for i, outcome in enumerate(outcomes):
                if isinstance(outcome, Failure):
                    errors[one.name].append(ScoreError(row + i, samples[i].key, outcome.reason, outcome.detail))
                    failed[_reason(one.name, outcome.reason)] += 1
                values = outcome if isinstance(outcome, Mapping) else {}
                for column, collected in columns[one.name].items():
                    collected.append(values.get(column))
        row += len(samples)
        task.advance(len(samples), failed)
    for one in filters:
        wrong = errors[one.name]
        if len(wrong) > settings.max_errors * manifest.rows:
            raise ValueError(_too_many(one, manifest, wrong, settings.max_errors))
        table = pa.table(columns[one.name], one.columns)
        write_scores(manifest, one.name, table, store, recipe(one, settings), wrong)


def _too_many(one: Filter, manifest: Manifest, errors: Sequence[ScoreError], limit: float) -> str:
    reason, count = Counter(error.reason for error in errors).most_common(1)[0]
    first = next(error for error in errors if error.reason == reason)
    return (
        f"the filter {one.name!r} failed on {len(errors)} of the {manifest.rows} samples of {redact(manifest.shard)}, "
        f"more than max_errors={limit} allows: {count} times {reason}, first {first.key!r} ({first.detail or reason}). "
        "Raise max_errors to go on without scores for these"
    )


def summary(manifests: Sequence[Manifest], scored: Mapping[str, Sequence[Scored | None]], seconds: float) -> str:
    """What there is and what went wrong, for people."""
    rows = sum(m.rows for m in manifests)
    lines = [f"{len(manifests)} shards, {rows} samples, {seconds:.1f} s"]
    for name, files in scored.items():
        counts, missing = error_counts(files), sum(file is None for file in files)
        lines.append(f"  {name}: {len(files) - missing} of {len(files)} shards scored, {counts.total()} errors")
        lines += [f"    {reason} ({count})" for reason, count in counts.most_common()]
    failed = failures(manifests, scored)
    for one in failed[:_FAILURES_SHOWN]:
        lines.append(f"  {one.shard}: {one.key}: {one.detail or one.reason} ({', '.join(one.filters)})")
    if len(failed) > _FAILURES_SHOWN:
        lines.append(f"  and {len(failed) - _FAILURES_SHOWN} more; report=<folder> lists them")
    return "\n".join(lines)


def _log_tables(log: RunLog, manifests: Sequence[Manifest], scored: Mapping[str, Sequence[Scored | None]]) -> None:
    """What there is and what went wrong, for W&B."""
    at, errors = sum(m.rows for m in manifests), {name: error_counts(files) for name, files in scored.items()}
    filters = [
        (name, sum(file is not None for file in files), len(files), errors[name].total())
        for name, files in scored.items()
    ]
    log.log_table("filters", ["filter", "shards scored", "shards", "errors"], filters, at)
    reasons = [(name, *counted) for name in scored for counted in errors[name].most_common()]
    log.log_table("errors", ["filter", "reason", "samples"], reasons, at)
