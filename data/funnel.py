"""What a `where` clause removes, condition by condition: the survival funnel, values about each threshold, and the rows
just on either side of it."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from data.manifest import Manifest
from data.scan import Scan, ask, database, quantile_values
from data.store import Store
from data.where import Where

BINS = 60
SHOWN = (0.001, 0.999)
"""Quantiles between which a histogram is drawn; what lies beyond counts to its ends."""


@dataclass
class Histogram:
    """Values of a column.

    Args:
        edges: (B + 1,) float64.
        counts: (B,) int64, over all rows.
        survivors: (B,) int64, over the rows that all earlier conditions keep.
    """

    edges: np.ndarray
    counts: np.ndarray
    survivors: np.ndarray


@dataclass(frozen=True, order=True)
class Near:
    """A row near a threshold: how far from it (or a number as good as random where there is none), and where it is."""

    distance: float
    shard: int
    row: int
    value: float | None = field(default=None, compare=False)


@dataclass
class Stage:
    """One of the conditions that all must hold.

    Args:
        text: the condition.
        removed_alone: rows of all that it does not keep.
        removed: rows that it does not keep, of those that all before it keep.
        left: rows that it and all before it keep.
        column: that is compared with a number, if that is what the condition is.
        threshold: the number.
        histogram: of that column.
        kept: rows nearest to the threshold that it keeps, of those that all before it keep.
        dropped: likewise, that it does not keep.
    """

    text: str
    removed_alone: int = 0
    removed: int = 0
    left: int = 0
    column: str | None = None
    threshold: float | None = None
    histogram: Histogram | None = None
    kept: list[Near] = field(default_factory=list)
    dropped: list[Near] = field(default_factory=list)


@dataclass
class Funnel:
    """What a clause removes of a number of rows, stage by stage."""

    total: int
    stages: list[Stage]


def funnel(manifests: Sequence[Manifest], store: Store, where: str, near: int = 12) -> Funnel:
    """What each condition of a clause removes of all rows: alone, and after those before it.

    A row for which a condition is NULL (a score that could not be told) is not kept by it. Quantiles are over all rows.
    Memory does not grow with the rows.

    Args:
        manifests: of the shards.
        store: where they lie.
        where: the clause.
        near: rows to find on either side of each threshold.

    Raises:
        ValueError: a wrong clause, or scores that are missing.
        StoreError: the store fails.
    """
    clause = Where(where)
    scan = Scan(manifests, store, clause)
    parts = clause.conjuncts()
    values = [quantile_values(scan, part) for part in parts]
    stages = [_stage(scan, part, of_part) for part, of_part in zip(parts, values, strict=True)]
    conditions = [part.sql(of_part) for part, of_part in zip(parts, values, strict=True)]
    names = [f"(({condition}) IS TRUE) AS keep{i}" for i, condition in enumerate(conditions)]
    names += [f"CAST({_quoted(s.column)} AS DOUBLE) AS value{i}" for i, s in enumerate(stages) if s.column is not None]
    query = f"SELECT shard, row, key_hash, {', '.join(names)} FROM rows"
    total = 0
    with database() as connection:
        for chunk in scan.chunks({"key_hash", *clause.columns}):
            found = ask(connection, query, chunk, clause)
            arrays = {name: found[name].to_numpy(zero_copy_only=False) for name in found.column_names}
            total += found.num_rows
            before = np.ones(found.num_rows, bool)
            for i, stage in enumerate(stages):
                before = _count(stage, arrays, i, before, near)
    for stage in stages:
        stage.kept.sort()
        stage.dropped.sort()
    return Funnel(total, stages)


def _stage(scan: Scan, part: Where, values: list[float | None]) -> Stage:
    stage = Stage(part.text)
    if (found := part.threshold(values)) is not None:
        stage.column, stage.threshold = found
        ends = Where(" OR ".join(f"{_quoted(stage.column)} > quantile({p})" for p in SHOWN))
        low, high = quantile_values(scan, ends)
        if low is not None and high is not None and np.isfinite([low, high, stage.threshold]).all():
            low, high = min(low, stage.threshold), max(high, stage.threshold)
            edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
            stage.histogram = Histogram(edges, np.zeros(BINS, np.int64), np.zeros(BINS, np.int64))
    return stage


def _count(stage: Stage, arrays: dict[str, np.ndarray], number: int, before: np.ndarray, near: int) -> np.ndarray:
    """Add a chunk of rows to a stage; returns which rows it and all before it keep."""
    keep = arrays[f"keep{number}"].astype(bool)
    after = before & keep
    stage.removed_alone += int(np.count_nonzero(~keep))
    stage.removed += int(np.count_nonzero(before & ~keep))
    stage.left += int(np.count_nonzero(after))
    if stage.threshold is None:
        values = np.full(len(keep), np.nan)
        distance = arrays["key_hash"].astype(np.float64)
    else:
        values = arrays[f"value{number}"].astype(np.float64)
        distance = abs(values - stage.threshold)
    if stage.histogram is not None:
        edges = stage.histogram.edges
        for counts, chosen in ((stage.histogram.counts, slice(None)), (stage.histogram.survivors, before)):
            of_chosen = values[chosen]
            counts += np.histogram(np.clip(of_chosen[~np.isnan(of_chosen)], edges[0], edges[-1]), edges)[0]
    for collected, chosen in ((stage.kept, after), (stage.dropped, before & ~keep)):
        rows = np.flatnonzero(chosen & ~np.isnan(distance))
        rows = rows[np.argsort(distance[rows], kind="stable")[:near]]
        found = [
            Near(
                float(distance[r]),
                int(arrays["shard"][r]),
                int(arrays["row"][r]),
                None if np.isnan(values[r]) else float(values[r]),
            )
            for r in rows
        ]
        collected[:] = heapq.nsmallest(near, [*collected, *found])
    return after


def _quoted(column: str | None) -> str:
    assert column is not None
    return '"' + column.replace('"', '""') + '"'
