"""Ends a run that has taken no step for too long, after telling which rank holds the others up: a hang never ends by
itself, and says nothing."""

import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from trainer.distributed import World, collectives, flight_record

log = logging.getLogger(__name__)

# How long ranks wait for the answers of others: their clocks ran out together, but for how far they were apart.
_PATIENCE_S = 20.0
_STATUS = 1


@dataclass(frozen=True)
class Answer:
    """What a rank that hangs says of itself.

    Args:
        host: it runs on.
        step: steps taken since the hang watch began.
        collectives: that it has entered. Ranks enter them in the same order, so that the one which holds the others up
            has entered fewer.
    """

    host: str
    step: int
    collectives: int


class HangWatch:
    """Ends this rank once no step has been taken for `timeout` seconds.

    A callback and a context manager: the clock starts on entering, and anew after each step and each `beat`. When it
    runs out, every rank writes the stacks of all its threads and, where torch kept one, the record of its collectives;
    the ranks compare how many collectives they have entered, name those that are behind, and end with status 1, so that
    whoever started them may do so again.

    faulthandler's watchdog needs no lock of Python's: a rank that hangs in a library which holds it writes its stacks
    too, and is named because it gives no answer. Its launcher then ends it with the others.

    Args:
        timeout: seconds; None does nothing.
        folder: for the ranks' files, the same for all of them: `hang_of_rank_<n>.txt`, left out again when there was
            nothing to tell.
        world: this rank's place.
    """

    def __init__(self, timeout: float | None, folder: Path, world: World):
        self._timeout, self._folder, self._world = timeout, folder, world
        self._path = folder / f"hang_of_rank_{world.rank}.txt"
        self._left = threading.Event()
        self._step = 0
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        if self._timeout is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._answer_of(self._world.rank).unlink(missing_ok=True)
            self._file = self._path.open("w")
            self._teller = threading.Thread(target=self._follow, args=(min(self._timeout, 5.0),), daemon=True)
            self._teller.start()
            self.beat()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            faulthandler.cancel_dump_traceback_later()
            self._left.set()
            self._teller.join()
            self._file.close()
            self._file = None
            if not self._path.stat().st_size:
                self._path.unlink()

    def after_step(self, step: int) -> None:
        """See `trainer.loop.Callback`."""
        self._step = step
        self.beat()

    def beat(self) -> None:
        """Start the clock anew, unless it stands: for what takes long between steps, and goes on."""
        if self._file is not None:
            assert self._timeout is not None
            # Takes the place of the one before.
            faulthandler.dump_traceback_later(self._timeout, file=self._file)

    def _follow(self, every: float) -> None:
        """Wait for faulthandler to write."""
        with self._path.open() as file:
            while not self._left.wait(every):
                if stacks := file.read():
                    self._tell(stacks)
                    os._exit(_STATUS)

    def _tell(self, stacks: str) -> None:
        log.error("no step for %g s (hang_timeout); the stacks, also in %s:", self._timeout, self._path)
        sys.stderr.write(stacks)
        if record := flight_record():
            self._path.with_suffix(".json").write_bytes(record)
        mine = self._answer_of(self._world.rank)
        scratch = mine.with_suffix(".tmp")
        scratch.write_text(json.dumps(asdict(Answer(socket.gethostname(), self._step, collectives()))))
        scratch.replace(mine)
        deadline = time.monotonic() + _PATIENCE_S
        while len(answers := self._answers()) < self._world.size and time.monotonic() < deadline:
            time.sleep(0.2)
        # As the command line says what ends it.
        print(f"millrace: {verdict(answers, self._world.size)}; stacks: {self._folder}", file=sys.stderr, flush=True)

    def _answer_of(self, rank: int) -> Path:
        return self._folder / f"hang_answer_of_rank_{rank}.json"

    def _answers(self) -> dict[int, Answer]:
        files = {rank: self._answer_of(rank) for rank in range(self._world.size)}
        return {rank: Answer(**json.loads(file.read_text())) for rank, file in files.items() if file.exists()}


def verdict(answers: Mapping[int, Answer], size: int) -> str:
    """Which ranks hold the others up.

    Args:
        answers: by rank, of those that gave one.
        size: of the world.
    """
    step = max(answer.step for answer in answers.values())
    silent = [rank for rank in range(size) if rank not in answers]
    if silent:
        return f"hang after step {step}: no answer from rank {', '.join(map(str, silent))}"
    furthest = max(answer.collectives for answer in answers.values())
    behind = {rank: answer for rank, answer in sorted(answers.items()) if answer.collectives < furthest}
    if size == 1:
        return f"hang after step {step}"
    if not behind:
        return f"hang after step {step}: all ranks are in collective {furthest}, so that it is the network that hangs"
    names = ", ".join(f"rank {rank} on {answer.host}" for rank, answer in behind.items())
    entered = min(answer.collectives for answer in behind.values())
    return f"hang after step {step}: waiting for {names}, in {entered} collectives where others are in {furthest}"
