"""How far a job is: a progress bar for people, and every few seconds a row in the job's log."""

import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

from tqdm import tqdm

from data.tracking import RunLog

ROW_INTERVAL = 5.0
"""Seconds between rows of the log."""
_LINE_INTERVAL = 30.0  # seconds between lines of a bar that goes to a file
T = TypeVar("T")


@dataclass(frozen=True)
class Advance:
    """What has been done since a job last told.

    Args:
        samples: done, one way or the other.
        skipped: those of them that an earlier run did: they do not count for the speed.
        errors: samples that went wrong, by reason.
    """

    samples: int = 0
    skipped: int = 0
    errors: Mapping[str, int] = field(default_factory=dict)


class Progress:
    """One progress bar and one log for all that share a job. A context manager; may be told by several threads.

    A row of the log holds `samples` of `total`, those of them `skipped`, `samples_per_s` since the row before, `errors`
    and their parts `errors/<reason>`, and for the whole command so far `seconds` and `eta_s`, the seconds left at its
    speed.

    Args:
        total: samples.
        description: of the bar; `job` in the rows.
        log: for the rows; None: there are none.
    """

    def __init__(self, total: int, description: str, log: RunLog | None = None) -> None:
        self._total, self._description, self._log = total, description, log
        self._samples = self._skipped = 0
        self._errors: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self._last = self._started, 0  # when the last row was written, and the samples made by then
        self._told = False
        self._bar = tqdm(desc=description, total=total, unit="sample", unit_scale=True, **_style())

    def tell(self, advance: Advance) -> None:
        """So much more is done."""
        with self._lock:
            self._told = True
            self._samples += advance.samples
            self._skipped += advance.skipped
            self._bar.initial += advance.skipped
            if advance.errors:
                self._errors.update(advance.errors)
                self._bar.set_postfix(errors=self._errors.total(), refresh=False)
            self._bar.update(advance.samples)
            if time.monotonic() >= self._last[0] + ROW_INTERVAL:
                self._write()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._told:
            self._write()

    def _write(self) -> None:
        if self._log is None:
            return
        now, made = time.monotonic(), self._samples - self._skipped
        then, made_then = self._last
        self._last, self._told = (now, made), False
        row: dict[str, Any] = {
            "job": self._description,
            "samples": self._samples,
            "total": self._total,
            "skipped": self._skipped,
            "samples_per_s": (made - made_then) / max(now - then, 1e-9),
            "seconds": now - self._started,
            "eta_s": (self._total - self._samples) * (now - self._started) / made if made else None,
            "errors": self._errors.total(),
        }
        self._log.log(row | {f"errors/{reason}": count for reason, count in sorted(self._errors.items())})


def counted(things: Iterable[T], total: int, description: str, unit: str) -> Iterable[T]:
    """The things, under a progress bar."""
    return tqdm(things, description, total, unit=unit, **_style())


def _style() -> dict[str, Any]:
    # smoothing=0: the speed is that of the whole run, which the time left of a long job is best told from.
    return {"smoothing": 0, "mininterval": 0.1 if sys.stderr.isatty() else _LINE_INTERVAL}
