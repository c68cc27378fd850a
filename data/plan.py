"""The plan: which samples make up the slice (step, lane), computed directly at any step of any epoch.

A run has L lanes for life and every global batch is one slice of m = G / L samples per lane. What a slice holds depends
on the plan's ingredients, the step and the lane alone: not on ranks, workers, or what was served before. Resuming
needs the step and the plan's fingerprint, and a run may resume on any world size that divides its lanes.

`data.stream` has the order of one source, `data.mixing` the turns of several.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count

import numpy as np

from data.batch import PlannedSlice
from data.buckets import Buckets
from data.compiled import Compiled
from data.hashing import mix64, text64
from data.mixing import Mixture
from data.stream import SourceStream

logger = logging.getLogger(__name__)

_VERSION = 1
_MAX_DEFAULT_LANES = 64


@dataclass(frozen=True)
class PlanSource:
    """A source of samples in a plan.

    Args:
        name: tells the source from the others of the run, and seeds its order.
        compiled: its selection.
        weight: its share of the slices is this over the sum of all sources' weights.
    """

    name: str
    compiled: Compiled
    weight: float = 1.0


class Plan:
    """Slices of one or several sources, at random or in sequence.

    Args:
        sources: all compiled with the same buckets.
        lanes: L, slices in a global batch; fixed for the run's life.
        slice_size: m, samples in a slice.
        seed: of the run.
        window: blocks that are shuffled together; a rank touches window * block rows per lane at a time.
        start: the step of the run at which this plan begins (another than 0 after a change of data or lanes).
        inputs: what samples come with that is not of their shards, by name: an ingredient, too.

    Raises:
        ValueError: for sources that are empty, share a name or differ in buckets, and for sizes that are not positive.
    """

    def __init__(
        self,
        sources: Sequence[PlanSource],
        lanes: int,
        slice_size: int,
        seed: int,
        window: int = 16,
        start: int = 0,
        inputs: Mapping[str, str] | None = None,
    ) -> None:
        for name, value in (("lanes", lanes), ("slice_size", slice_size), ("window", window)):
            if value <= 0:
                raise ValueError(f"{name} {value} must be positive")
        names = [source.name for source in sources]
        if len(set(names)) != len(names):
            raise ValueError(f"the names of sources must differ, not {names}")
        self._mixture = Mixture([source.weight for source in sources], mix64(seed, start))
        self.buckets: Buckets = sources[0].compiled.buckets
        for source in sources:
            if source.compiled.buckets.fingerprint != self.buckets.fingerprint:
                raise ValueError(f"source {source.name!r} was compiled with other buckets than {names[0]!r}")
            _warn_of_rare_buckets(source, slice_size)
        self.sources = tuple(sources)
        self.lanes, self.slice_size, self.seed, self.window, self.start = lanes, slice_size, seed, window, start
        self.inputs = dict(inputs or {})
        self._streams = [
            SourceStream(source.compiled, mix64(seed, start, text64(source.name)), lanes, slice_size, window)
            for source in sources
        ]

    @property
    def global_batch(self) -> int:
        """G, samples in a step."""
        return self.lanes * self.slice_size

    @property
    def steps_per_epoch(self) -> float:
        """Steps in which as many samples are served as all sources hold together; rarely whole."""
        return sum(source.compiled.rows for source in self.sources) / self.global_batch

    def epoch_of(self, step: int, source: int = 0) -> int:
        """The source's epoch when the step begins."""
        turns = self._mixture.turns_before(self._own(step), lane=0)[source]
        return self._streams[source].epoch_of(turns * self.lanes)

    def slice(self, step: int, lane: int) -> PlannedSlice:
        """The slice (step, lane), from nothing but the tables of its epoch."""
        self._check_lanes(range(lane, lane + 1))
        source, turn = self._mixture.at(self._own(step), lane)
        bucket, rows = self._streams[source].at(turn, lane)
        return PlannedSlice(step, lane, source, bucket, rows)

    def iterate(self, start_step: int, lanes: range) -> Iterator[PlannedSlice]:
        """All slices of some lanes from a step on, without end: (step, lane), (step, lane + 1), ... (step + 1, lane).

        The same slices as `slice` gives, but each window is sorted only once and the next epoch's tables are built in
        the background.
        """
        self._check_lanes(lanes)
        walks = [self._walk(start_step, lane) for lane in lanes]
        return (next(walk) for _ in count() for walk in walks)

    def _walk(self, start_step: int, lane: int) -> Iterator[PlannedSlice]:
        own = self._own(start_step)
        turns = self._mixture.turns_before(own, lane)
        slices = [stream.walk(turn, lane) for stream, turn in zip(self._streams, turns, strict=True)]
        for step, source in zip(count(start_step), self._mixture.walk(own, lane), strict=False):
            bucket, rows = next(slices[source])
            yield PlannedSlice(step, lane, source, bucket, rows)

    def _own(self, step: int) -> int:
        if step < self.start:
            raise ValueError(f"step {step} is before this plan, which begins at step {self.start}")
        return step - self.start

    def _check_lanes(self, lanes: range) -> None:
        if not lanes or lanes[0] < 0 or lanes[-1] >= self.lanes:
            raise ValueError(f"{lanes} is not within the plan's {self.lanes} lanes")

    @property
    def ingredients(self) -> dict[str, str]:
        """All that the slices, and what samples come with, depend on, by name; JSON-able."""
        described = {
            "version": _VERSION,
            "lanes": self.lanes,
            "slice size": self.slice_size,
            "seed": self.seed,
            "window": self.window,
            "start": self.start,
            "buckets": self.buckets.fingerprint,
        }
        for index, source in enumerate(self.sources):
            described[f"source {source.name}"] = f"index {index}, rows {source.compiled.fingerprint}"
            described[f"turns of {source.name}"] = f"{self._mixture.quotas[index]} of {self._mixture.round}"
        return {name: str(value) for name, value in (described | self.inputs).items()}

    @property
    def fingerprint(self) -> str:
        """Of the ingredients: two plans with the same fingerprint give the same slices."""
        return hashlib.sha256(json.dumps(self.ingredients, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class PlanSegment:
    """One of the plans a run has followed: from which step on, and what it was made of."""

    start: int
    fingerprint: str
    ingredients: dict[str, str]


class PlanSegments:
    """The plans that a run has followed, one after another; the last is the one to follow.

    Args:
        plan: the last.
        history: one segment per plan, the last included.
    """

    def __init__(self, plan: Plan, history: Sequence[PlanSegment]) -> None:
        assert history[-1].fingerprint == plan.fingerprint, "the last segment is the plan's"
        self.plan, self.history = plan, tuple(history)

    @classmethod
    def begin(cls, build: Callable[[int], Plan]) -> "PlanSegments":
        """A new run's.

        Args:
            build: makes the plan that starts at a given step.
        """
        plan = build(0)
        return cls(plan, [PlanSegment(0, plan.fingerprint, plan.ingredients)])

    @classmethod
    def resume(
        cls, record: list[dict], step: int, build: Callable[[int], Plan], replan: bool = False
    ) -> "PlanSegments":
        """Go on where a checkpoint stopped.

        Args:
            record: what `record` gave for the checkpoint.
            step: the next step to be served.
            build: makes the plan that starts at a given step, from the configuration of now.
            replan: follow another plan from this step on if it is no longer the same.

        Raises:
            ValueError: if the plan is no longer the same and `replan` is false; names what differs.
        """
        history = [PlanSegment(**segment) for segment in record]
        last = history[-1]
        plan = build(last.start)
        if plan.fingerprint == last.fingerprint:
            return cls(plan, history)
        if not replan:
            differs = [
                f"{name}: {last.ingredients.get(name, 'none')} -> {plan.ingredients.get(name, 'none')}"
                for name in sorted(last.ingredients.keys() | plan.ingredients.keys())
                if last.ingredients.get(name) != plan.ingredients.get(name)
            ]
            raise ValueError(
                f"the data plan is not the one this run followed ({'; '.join(differs)}), so it cannot resume exactly:"
                f" restore the data configuration, or set data.replan=true to follow the new plan from step {step} on"
            )
        plan = build(step)
        return cls(plan, [*history, PlanSegment(step, plan.fingerprint, plan.ingredients)])

    @property
    def record(self) -> list[dict]:
        """JSON-able, for the checkpoint."""
        return [asdict(segment) for segment in self.history]


def split_batch(global_batch: int, lanes: int | None = None) -> tuple[int, int]:
    """Lanes and slice size of a global batch.

    Args:
        global_batch: G, samples in a step.
        lanes: L; by default the largest divisor of G up to 64.
    """
    if global_batch <= 0:
        raise ValueError(f"the global batch {global_batch} must be positive")
    if lanes is None:
        lanes = max(n for n in _divisors(global_batch) if n <= _MAX_DEFAULT_LANES)
    if lanes <= 0 or global_batch % lanes:
        raise ValueError(
            f"{lanes} lanes do not divide the global batch {global_batch}: choose among {_divisors(global_batch)}"
        )
    return lanes, global_batch // lanes


def valid_world_sizes(lanes: int) -> list[int]:
    """How many data-parallel ranks can share the lanes evenly."""
    return _divisors(lanes)


def lanes_of(rank: int, world: int, lanes: int) -> range:
    """The lanes that a data-parallel rank serves.

    Raises:
        ValueError: if the world does not divide the lanes; names the sizes that do.
    """
    if lanes % world:
        raise ValueError(
            f"{world} data-parallel ranks do not divide the run's {lanes} lanes: use {valid_world_sizes(lanes)} ranks"
        )
    assert 0 <= rank < world
    each = lanes // world
    return range(rank * each, (rank + 1) * each)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _warn_of_rare_buckets(source: PlanSource, slice_size: int) -> None:
    totals = source.compiled.totals
    for bucket in np.flatnonzero((totals > 0) & (totals < slice_size)).tolist():
        logger.warning(
            "source %r has %d samples in bucket %s, fewer than a slice of %d: a slice of it takes %.1f epochs to fill;"
            " merge buckets, or make slices smaller",
            source.name,
            totals[bucket],
            source.compiled.buckets[bucket],
            slice_size,
            slice_size / totals[bucket],
        )
