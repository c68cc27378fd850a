"""The plan at a billion samples, against the obvious alternative: permute the whole epoch with numpy and cut it up.

Each kind of figure is taken in a process of its own, as a rank is, so that memory is that of one rank. The compiled
selection comes from the disk cache. At full size the alternative would need tens of GB, so both also run at a size
where it fits, taking turns, and its memory is extrapolated.
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from data.batch import PlannedSlice
from data.buckets import Buckets, ConstantArea
from data.compiled import Compiled, compile_sizes
from data.plan import Plan, PlanSource
from tools.bench.processes import in_process, memory

Clock = Literal["wall", "process"]
_CHUNK = 1 << 20


@dataclass(frozen=True)
class _Setting:
    """What a measuring process needs to open the compiled selection and plan it."""

    folder: str
    rows: int
    lanes: int
    slice_size: int
    block: int
    window: int
    buckets: int
    clock: Clock

    def now(self) -> float:
        """Seconds on the setting's clock."""
        return time.process_time() if self.clock == "process" else time.perf_counter()

    def compiled(self) -> Compiled:
        return compile_sizes(_no_sizes(), self.rows, _shapes(self.buckets), self.folder, _name(self.rows), self.block)

    def plan(self, compiled: Compiled) -> Plan:
        return Plan([PlanSource("simulated", compiled)], self.lanes, self.slice_size, seed=0, window=self.window)


def run(
    rows: int = 1_000_000_000,
    buckets: int = 40,
    lanes: int = 1024,
    served_lanes: int = 16,
    slice_size: int = 64,
    other_slice_sizes: Sequence[int] = (16, 256),
    block: int = 256,
    window: int = 16,
    compared_rows: int = 50_000_000,
    repeats: int = 5,
    clock: Clock = "wall",
    folder: str | None = None,
) -> dict:
    """Samples planned per second, seconds to the first slice, and memory, of one rank.

    Args:
        rows: simulated samples, in `buckets` unequally common buckets.
        lanes: of the run.
        served_lanes: of the rank that is measured; a rank with all of them is measured beside it.
        slice_size: samples in a slice.
        other_slice_sizes: for which the rate within an epoch is stated too.
        block: consecutive rows that stay together.
        window: blocks that are shuffled together.
        compared_rows: samples of the comparison with the permutation.
        repeats: measurements behind each median.
        clock: "process" counts CPU time, the background thread's included, for a machine that others use.
        folder: for the compiled selections (1.4 bytes a sample), which are deleted afterwards; a temporary one by
            default.
    """
    if lanes % served_lanes:
        raise ValueError(f"served_lanes {served_lanes} must divide the {lanes} lanes")
    with tempfile.TemporaryDirectory(prefix="millrace-bench-plan-", dir=folder) as scratch:
        full = _Setting(scratch, rows, lanes, slice_size, block, window, buckets, clock)
        small = _Setting(scratch, compared_rows, lanes, slice_size, block, window, buckets, clock)
        results: dict[str, Any] = {
            "samples": rows,
            "lanes": lanes,
            "served_lanes": served_lanes,
            "slice_size": slice_size,
            "clock": clock,
            "compile_seconds": in_process(_compile, full),
        }
        in_process(_compile, small)
        results["first_slice"] = in_process(_starts, full, served_lanes, repeats)
        results["rank"] = in_process(_serve, full, served_lanes, repeats)
        results["rank_with_all_lanes"] = {
            "first_slice": in_process(_starts, full, lanes, repeats),
            **in_process(_serve_some, full, lanes, repeats),
        }
        results["samples_per_s_within_epoch_by_slice_size"] = {
            size: in_process(
                _serve_some, _Setting(scratch, rows, lanes, size, block, window, buckets, clock), served_lanes, repeats
            )["samples_per_s_within_epoch"]
            for size in other_slice_sizes
        }
        results["against_permutation"] = _compare(small, rows, served_lanes, repeats)
    return results


def _compare(setting: _Setting, full_rows: int, served_lanes: int, repeats: int) -> dict[str, Any]:
    """One rank's share of an epoch, start to end, ours and by a permutation of all rows, alternating."""
    runs: dict[str, list[dict[str, float]]] = {"plan": [], "permutation": []}
    for _ in range(repeats):
        runs["plan"].append(in_process(_epoch, setting, served_lanes, _by_plan))
        runs["permutation"].append(in_process(_epoch, setting, served_lanes, _by_permutation))
    medians: dict[str, dict[str, float]] = {
        name: {key: statistics.median(run[key] for run in runs[name]) for key in runs[name][0]} for name in runs
    }
    ours, theirs = medians["plan"], medians["permutation"]
    return {
        "samples": setting.rows,
        **medians,
        "ratio_of_samples_per_s": ours["samples_per_s"] / theirs["samples_per_s"],
        "ratio_of_first_slice": theirs["first_slice_seconds"] / ours["first_slice_seconds"],
        "permutation_peak_mib_extrapolated": theirs["peak_private_mib"] * full_rows / setting.rows,
        "permutation_first_slice_seconds_extrapolated": theirs["first_slice_seconds"] * full_rows / setting.rows,
    }


# What runs in processes of its own


def _compile(setting: _Setting) -> float:
    """Seconds to compile; making up the sizes is not counted."""
    shapes = _shapes(setting.buckets)
    pool = _pool_of_sizes(shapes)
    chunks = _cycle(pool, setting.rows)
    begin = setting.now()
    compile_sizes(chunks, setting.rows, shapes, setting.folder, _name(setting.rows), setting.block)
    return setting.now() - begin


def _starts(setting: _Setting, served_lanes: int, repeats: int) -> dict[str, float]:
    """Seconds from nothing to a rank's first slice: at step 0, far on, and where carries are served."""
    places = {"at_step_0": 0.0, "within_epoch_5": 5.37, "at_the_border_of_epoch_6": 6.0}
    seconds: dict[str, list[float]] = {name: [] for name in places}
    for _ in range(repeats):
        for name, epochs in places.items():
            begin = setting.now()
            plan = setting.plan(setting.compiled())
            next(plan.iterate(int(epochs * plan.steps_per_epoch), range(served_lanes)))
            seconds[name].append(setting.now() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _serve(setting: _Setting, served_lanes: int, repeats: int) -> dict[str, Any]:
    """Samples per second within an epoch and over whole epochs, and the rank's memory after them."""
    before = memory()
    served = setting.rows * served_lanes // setting.lanes  # of an epoch, by this rank
    slices, within = _within_epoch(setting, served_lanes, repeats, epochs=1.2)
    over_all = [_rate(setting, slices, served) for _ in range(repeats)]
    after = memory()
    return {
        "samples_per_s_within_epoch": statistics.median(within),
        "samples_per_s_over_all": statistics.median(over_all),
        "resident_mib": after["VmRSS"],
        "of_which_private_mib": after["RssAnon"],
        "of_which_file_pages_mib": after["RssFile"],
        "imports_alone_mib": before["VmRSS"],
        "peak_resident_mib": after["VmHWM"],
    }


def _serve_some(setting: _Setting, served_lanes: int, repeats: int) -> dict[str, Any]:
    _, within = _within_epoch(setting, served_lanes, repeats, epochs=1.2)
    return {"samples_per_s_within_epoch": statistics.median(within), "resident_mib": memory()["VmRSS"]}


def _within_epoch(
    setting: _Setting, served_lanes: int, repeats: int, epochs: float
) -> tuple[Iterator[PlannedSlice], list[float]]:
    plan = setting.plan(setting.compiled())
    slices = plan.iterate(int(epochs * plan.steps_per_epoch), range(served_lanes))
    # The measured parts end within the epoch. Before them, lanes find their places; a slice of the next epoch is not to
    # be had before its tables are built, which goes on in the background.
    part = min(setting.rows * served_lanes // setting.lanes // (2 * repeats + 3), 4_000_000)
    _rate(setting, slices, part)
    plan.slice(int((epochs + 1) * plan.steps_per_epoch), lane=0)
    return slices, [_rate(setting, slices, part) for _ in range(repeats)]


def _epoch(
    setting: _Setting, served_lanes: int, planner: Callable[[_Setting, int], Iterator[PlannedSlice]]
) -> dict[str, float]:
    """One rank's share of the first epoch, whatever has to be made ready for it included."""
    before = memory()["RssAnon"]
    begin = setting.now()
    slices = planner(setting, served_lanes)
    first = next(slices)
    started = setting.now() - begin
    served = len(first.rows)
    # Leftovers make the share uneven: a hair less than the epoch is served.
    for planned in itertools.islice(slices, int(0.99 * setting.rows * served_lanes / setting.lanes / served)):
        served += len(planned.rows)
    return {
        "first_slice_seconds": started,
        "samples_per_s": served / (setting.now() - begin),
        "peak_private_mib": memory()["VmHWM"] - memory()["RssFile"] - before,
    }


def _by_plan(setting: _Setting, served_lanes: int) -> Iterator[PlannedSlice]:
    return setting.plan(setting.compiled()).iterate(0, range(served_lanes))


def _by_permutation(setting: _Setting, served_lanes: int) -> Iterator[PlannedSlice]:
    """The obvious way: permute all rows, gather each bucket's, cut slices, permute them, deal them out to lanes."""
    bucket = np.asarray(setting.compiled().bucket).ravel()[: setting.rows]
    generator = np.random.default_rng(0)
    rows = generator.permutation(setting.rows)
    parts, names = [], []
    for index in range(setting.buckets):
        mine = rows[bucket[rows] == index]
        slices = mine[: len(mine) // setting.slice_size * setting.slice_size].reshape(-1, setting.slice_size)
        parts.append(slices)
        names.append(np.full(len(slices), index))
    joined, of_bucket = np.concatenate(parts), np.concatenate(names)
    order = generator.permutation(len(joined))
    for step in range(len(order) // setting.lanes):
        for lane in range(served_lanes):
            chosen = order[step * setting.lanes + lane]
            yield PlannedSlice(step, lane, 0, int(of_bucket[chosen]), joined[chosen])


def _rate(setting: _Setting, slices: Iterator[PlannedSlice], samples: int) -> float:
    served = 0
    begin = setting.now()
    for planned in slices:
        served += len(planned.rows)
        if served >= samples:
            break
    return served / (setting.now() - begin)


# Simulated samples


def _shapes(buckets: int) -> Buckets:
    """The `buckets` shapes nearest the square among many of constant area."""
    shapes = sorted(ConstantArea(2048, 32, 8.0).shapes, key=lambda shape: abs(np.log(shape.aspect)))
    return Buckets(shapes[:buckets])


def _pool_of_sizes(shapes: Buckets, chunks: int = 8) -> list[tuple[np.ndarray, np.ndarray]]:
    """Sizes whose i-th most common bucket is 1 / i as common as the first."""
    generator = np.random.default_rng(0)
    common = generator.permutation(1 / np.arange(1, len(shapes) + 1))
    sides = np.array([[shape.width, shape.height] for shape in shapes.shapes], dtype=np.uint16)
    pool = []
    for _ in range(chunks):
        chosen = sides[generator.choice(len(shapes), size=_CHUNK, p=common / common.sum())]
        pool.append((chosen[:, 0].copy(), chosen[:, 1].copy()))
    return pool


def _cycle(pool: list[tuple[np.ndarray, np.ndarray]], rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start, (width, height) in zip(range(0, rows, _CHUNK), itertools.cycle(pool), strict=False):
        count = min(_CHUNK, rows - start)
        yield width[:count], height[:count]


def _no_sizes() -> Iterable[tuple[np.ndarray, np.ndarray]]:
    raise AssertionError("the compiled selection should be there")
    yield


def _name(rows: int) -> str:
    return f"simulated {rows}"
