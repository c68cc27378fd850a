"""The speed-up of the `curate` job by tasks, against that of as many independent processes of the bare libraries.

Both sides start their processes alike and score the same tars with one thread each; the job also reads through its
store, in ranges, ahead of the filters, and writes score files. Seconds are wall clock from when the first process
begins to work until the last one has ended: starting interpreters and importing libraries is not counted, as it does
not grow with the work.
"""

import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from data.curate import Due, Settings, score_shards
from data.curation.base import Filter
from data.curation.blank import Blank
from data.curation.hashes import PerceptualHash
from data.curation.sharpness import Sharpness
from data.index import ensure_indexed
from data.store import Store
from data.tasks import Task, Tasks, run_tasks
from tools.bench import curate_bare as bare
from tools.bench.curate_samples import picture, write_shards


def run(
    tasks: int = 2,
    shards: int = 8,
    per_shard: int = 256,
    height: int = 360,
    repeats: int = 5,
    clock: Literal["wall", "process"] = "wall",
    folder: str | None = None,
) -> dict[str, Any]:
    """Speed-up of sharpness, blank and perceptual_hash by tasks, ours and the bare libraries', alternating.

    Args:
        tasks: processes that are held against one.
        shards: tars; a multiple of `tasks`, so that all have the same to do.
        per_shard: JPEGs in each, of `height` pixels and 16 : 9.
        height: pixels, even.
        repeats: measurements behind each median.
        clock: "process" takes the CPU time of the process that needed most, for a machine that others use.
        folder: for the tars, which are deleted afterwards; a temporary one by default.
    """
    if tasks < 2 or shards % tasks:
        raise ValueError(f"tasks={tasks} must be at least 2, and shards={shards} a multiple of it")
    filters: list[Filter] = [Sharpness(), Blank(), PerceptualHash()]
    with tempfile.TemporaryDirectory(prefix="millrace-bench-curate-", dir=folder) as scratch:
        paths = write_shards(
            Path(scratch), shards, [picture(height, seed) for seed in range(min(64, shards * per_shard))], per_shard
        )
        store = Store()
        manifests = ensure_indexed([str(path) for path in paths], store)
        due = [Due([one.name for one in filters])] * shards
        sides: dict[str, Callable[[Task], Any]] = {
            "curate": partial(score_shards, manifests, filters, due, store, Settings()),
            "library": partial(_library, paths),
        }
        seconds: dict[str, dict[int, list[float]]] = {side: {1: [], tasks: []} for side in sides}
        for repeat in range(repeats + 1):  # the first one warms caches
            for count in (1, tasks):
                for side, work in sides.items():
                    taken = _seconds(work, Tasks(count), shards * per_shard, side, clock)
                    if repeat:
                        seconds[side][count].append(taken)
    speed_ups = {side: [a / b for a, b in zip(*taken.values(), strict=True)] for side, taken in seconds.items()}
    ratios = [ours / theirs for ours, theirs in zip(*speed_ups.values(), strict=True)]
    return {
        "tasks": tasks,
        "clock": clock,
        "samples": shards * per_shard,
        "seconds": seconds,
        "samples_per_s_of_one": {side: shards * per_shard / statistics.median(seconds[side][1]) for side in sides},
        "speed_up": {side: statistics.median(values) for side, values in speed_ups.items()},
        "ratio": statistics.median(ratios),
    }


def _seconds(work: Callable[[Task], Any], tasks: Tasks, samples: int, description: str, clock: str) -> float:
    totals = [samples // tasks.tasks] * tasks.tasks
    begun, ended, used = zip(*run_tasks(partial(_timed, work), tasks, totals, description), strict=True)
    return max(used) if clock == "process" else max(ended) - min(begun)


def _timed(work: Callable[[Task], Any], task: Task) -> tuple[float, float, float]:
    """When the work began and ended, on a clock that all processes share, and the CPU time that it took."""
    begin, used = time.monotonic(), time.process_time()
    work(task)
    return begin, time.monotonic(), time.process_time() - used


def _library(paths: Sequence[Path], task: Task) -> None:
    """A process of the bare libraries: decodes each picture once and makes the calls that the filters rest on."""
    for path in task.own(paths):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None, "the tars hold only files"
                pixels = bare.decode(file.read())
                bare.sharpness(pixels)
                bare.blank(pixels)
                bare.perceptual_hash(pixels)
