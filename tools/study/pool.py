"""Runs commands on this machine, a few at a time, each a process of its own with its share of the cores."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from tools.launch import LAUNCHER, last_words, signals_forwarded

_POLL_S = 0.2


@dataclass(frozen=True)
class Command:
    """A `millrace` command.

    Args:
        name: to call it by.
        arguments: after `millrace`.
        log: file that its output is appended to.
    """

    name: str
    arguments: list[str]
    log: Path


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Args:
        command: that ended.
        seconds: that it took, all starts together.
        reason: why it failed; None where it did not.
    """

    command: Command
    seconds: float
    reason: str | None


@dataclass
class _Running:
    command: Command
    process: subprocess.Popen[bytes]
    output: IO[bytes]
    began: float
    restarts: int


@dataclass
class Pool:
    """Runs commands, `parallel` at a time. One that fails does not stop the others.

    SIGTERM, SIGUSR1 and SIGINT are passed on, once; then nothing is started any more. A second Ctrl-C kills. Commands
    are also asked to stop when this process dies, however it does (Linux).

    Args:
        parallel: commands at a time. Each gets an equal share of the cores, as OMP_NUM_THREADS.
        restarts: how often a command that was killed by a signal, out of memory for instance, is started again.
        told: is called with each outcome as it comes.
    """

    parallel: int
    restarts: int = 0
    told: Callable[[Outcome], None] = lambda outcome: None
    _running: list[_Running] = field(default_factory=list, init=False)
    _asked: Sequence[signal.Signals] = field(default=(), init=False)

    def run(self, commands: Sequence[Command]) -> list[Outcome]:
        """Run all commands to their end; outcomes are in the order in which they came.

        Raises:
            KeyboardInterrupt: by a signal; the commands that ran have ended, or were killed.
        """
        waiting, outcomes = list(commands), []
        with signals_forwarded(lambda: [running.process.pid for running in self._running]) as self._asked:
            while self._running or (waiting and not self._asked):
                while waiting and len(self._running) < self.parallel and not self._asked:
                    self._running.append(_start(waiting.pop(0), self.parallel, self.restarts))
                time.sleep(_POLL_S)
                for running in [r for r in self._running if r.process.poll() is not None]:
                    self._running.remove(running)
                    outcome = self._ended(running)
                    if outcome is not None:
                        outcomes.append(outcome)
                        self.told(outcome)
        if self._asked:  # also where nothing is left to start: what has stopped has not finished
            raise KeyboardInterrupt
        return outcomes

    def _ended(self, running: _Running) -> Outcome | None:
        """The outcome; None where the command was started again."""
        running.output.close()
        code = running.process.returncode
        if code < 0 and running.restarts and not self._asked:
            again = _start(running.command, self.parallel, running.restarts - 1)
            again.began = running.began
            self._running.append(again)
            return None
        reason = None
        if code:
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
            reason = f"{how}{last_words(running.command.log)}"
        return Outcome(running.command, time.monotonic() - running.began, reason)


def _start(command: Command, parallel: int, restarts: int) -> _Running:
    command.log.parent.mkdir(parents=True, exist_ok=True)
    output = command.log.open("ab")
    threads = max(1, (os.cpu_count() or 1) // parallel)
    process = subprocess.Popen(
        # -P keeps the caller's folder off the import path: it may well hold a folder named "data" or "models".
        [sys.executable, "-P", "-m", "tools.cli", *command.arguments],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        env=os.environ | {"OMP_NUM_THREADS": str(threads), LAUNCHER: str(os.getpid())},
        start_new_session=True,  # a terminal's Ctrl-C reaches the study alone, which passes it on
    )
    return _Running(command, process, output, time.monotonic(), restarts)
