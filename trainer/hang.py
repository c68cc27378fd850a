"""Tells where a rank is when it has taken no step for too long: a hang never ends by itself, and says nothing."""

import faulthandler
import logging
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

log = logging.getLogger(__name__)


class HangReport:
    """Writes the stacks of all of this rank's threads once no step has been taken for `timeout` seconds.

    A callback and a context manager: the clock starts on entering and anew after each step. Nothing is stopped, for a
    long validation is no hang. faulthandler's watchdog needs no lock of Python's, so that a hang in a library which
    holds it is told too, in the file; what stands there is then repeated on stderr.

    Args:
        timeout: seconds; None does nothing.
        path: of this rank's file, which is left out again when there was nothing to tell.
    """

    def __init__(self, timeout: float | None, path: Path):
        self._timeout, self._path = timeout, path
        self._left = threading.Event()

    def __enter__(self) -> Self:
        if self._timeout is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("w")
            self._teller = threading.Thread(target=self._tell, args=(min(self._timeout, 5.0),), daemon=True)
            self._teller.start()
            self._start_clock()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._timeout is not None:
            faulthandler.cancel_dump_traceback_later()
            self._left.set()
            self._teller.join()
            self._file.close()
            if not self._path.stat().st_size:
                self._path.unlink()

    def after_step(self, step: int) -> None:
        """See `trainer.loop.Callback`."""
        if self._timeout is not None:
            self._start_clock()

    def _start_clock(self) -> None:
        assert self._timeout is not None
        faulthandler.dump_traceback_later(self._timeout, file=self._file)  # takes the place of the one before

    def _tell(self, every: float) -> None:
        """Follow the file."""
        with self._path.open() as file:
            while not self._left.wait(every):
                if stacks := file.read():
                    log.error("no step for %g s (hang_timeout); the stacks, also in %s:", self._timeout, self._path)
                    sys.stderr.write(stacks)
                    sys.stderr.flush()
