"""The progress of a job that ranks share unevenly: one bar and one log, on rank 0, over all of them."""

import json
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from data.progress import Advance, Progress
from data.tracking import RunLog
from trainer.distributed import World, barrier

INTERVAL = 1.0
"""Seconds between what a rank writes, and between what rank 0 reads."""


@contextmanager
def rank_progress(
    folder: Path, world: World, total: int, description: str, log: RunLog | None
) -> Iterator[Callable[[Advance], None]]:
    """Gives what to tell this rank's advances. Leaving it, as all ranks must, waits for all of them.

    Collectives would make ranks wait for each other amid their work. So each keeps its counts in a file, which
    rank 0 reads now and then.

    Args:
        folder: on a file system that all ranks share; what lies there is removed, before and after.
        total: samples of all ranks.
        description: see `Progress`, as is `log`, which only rank 0 needs.
    """
    if world.is_main:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    barrier()
    if not world.is_main:
        own = _OwnCounts(folder / f"rank_{world.rank}.json")
        yield own.tell
        own.write()
        barrier()
        return
    with Progress(total, description, log) as progress, _following(folder, progress):
        yield progress.tell
        barrier()
    shutil.rmtree(folder)


class _OwnCounts:
    """A rank's counts so far, in its file."""

    def __init__(self, path: Path) -> None:
        self._path, self._written = path, time.monotonic()
        self._samples = self._skipped = 0
        self._errors: Counter[str] = Counter()

    def tell(self, advance: Advance) -> None:
        self._samples += advance.samples
        self._skipped += advance.skipped
        self._errors.update(advance.errors)
        if time.monotonic() >= self._written + INTERVAL:
            self.write()

    def write(self) -> None:
        counts = {"samples": self._samples, "skipped": self._skipped, "errors": self._errors}
        scratch = self._path.with_suffix(".tmp")
        scratch.write_text(json.dumps(counts))
        scratch.replace(self._path)  # never seen half
        self._written = time.monotonic()


@contextmanager
def _following(folder: Path, progress: Progress) -> Iterator[None]:
    """Meanwhile, and once more at the end, the other ranks' counts are read, and what is new in them is told."""
    known: dict[str, Advance] = {}
    over = threading.Event()

    def read() -> None:
        for path in folder.glob("rank_*.json"):
            now, before = Advance(**json.loads(path.read_text())), known.get(path.name, Advance())
            if now != before:
                errors = Counter(now.errors)
                errors.subtract(before.errors)
                progress.tell(Advance(now.samples - before.samples, now.skipped - before.skipped, +errors))
                known[path.name] = now

    def follow() -> None:
        while not over.wait(INTERVAL):
            read()

    with ThreadPoolExecutor(1, thread_name_prefix="rank-progress") as pool:
        following = pool.submit(follow)
        try:
            yield
        finally:
            over.set()
        following.result()
        read()
