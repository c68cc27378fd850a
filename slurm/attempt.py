"""One start of a job, in its batch script on the first node: health check, ranks, and what is to become of the job.

A job whose time is up, that is preempted, or that fails, is queued again by itself as long as it makes progress. SLURM
does the same when a node fails. A job that has finished is never queued again.
"""

import logging
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType

from slurm import queue
from slurm.health import examine
from slurm.step import Step, ranks
from slurm.work import Progress, Work

log = logging.getLogger(__name__)

# Outcomes that say nothing of the job itself.
_INNOCENT = ("preempted", "stopped")
# Of the time between the warning and the limit, what the ranks may take to save.
_PATIENCE = 0.9
_MISTAKE = 2  # the status of a command that cannot work however often it is started
_POLL_S = 1.0


class GivenUpError(RuntimeError):
    """The job is not queued again; SLURM shows it as FAILED."""


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended; see `slurm.chain`."""

    word: str
    reason: str = ""
    bad_nodes: tuple[str, ...] = ()
    hopeless: bool = False


def attempt(work: Work) -> None:
    """Run the work once, or what is left of it, and queue the job again if something is left after that.

    Raises:
        GivenUpError: the command is at fault, or several starts in a row made no progress.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    _Attempt(work).run()


class _Attempt:
    def __init__(self, work: Work):
        self._work, self._chain, self._job = work, work.chain, queue.this_job()
        self._received: list[signal.Signals] = []
        self._warned_at = 0.0
        self._step: Step | None = None
        self._nodes = queue.hosts(os.environ["SLURM_JOB_NODELIST"])
        self._excluded = {node for row in self._rows("requeued") for node in row["excluded"]}

    def run(self) -> None:
        for name in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(name, self._receive)
        self._close_earlier()
        progress = self._progress()
        if progress is not None and progress.finished:
            self._chain.add("ended", self._job, outcome="finished", reason="nothing was left to do")
            return
        self._give_up_without_progress()
        done = None if progress is None else progress.done
        number = len(self._rows("started")) + 1
        self._chain.add("started", self._job, attempt=number, nodes=self._nodes, progress=done)
        outcome = self._try(self._nodes)
        log.info("%s %s", outcome.word, outcome.reason)
        self._chain.add("ended", self._job, outcome=outcome.word, reason=outcome.reason)
        if outcome.word == "finished":
            return
        if outcome.hopeless:
            self._give_up(outcome.reason)
        entry = queue.entries([self._job]).get(self._job)
        if self._rows("cancelled") or entry is None or entry.ended:
            return
        self._give_up_without_progress()
        excluded = self._excluded | set(outcome.bad_nodes)
        if not self._enough_without(excluded):
            if outcome.word == "unhealthy":
                self._give_up(f"too few nodes are left without {', '.join(sorted(excluded))}: {outcome.reason}")
            excluded = self._excluded
        # By SLURM, in the midst of ending this process, where a node has failed or someone has asked for it.
        self._chain.add("requeued", self._job, excluded=sorted(excluded))
        if entry.state == "RUNNING":
            queue.requeue(self._job)
        if excluded:
            queue.exclude(self._job, excluded)

    def _try(self, nodes: Sequence[str]) -> Outcome:
        """Check the nodes and run the commands on as many of them as the ranks can be spread over."""
        if self._work.resources.health and (bad := examine(nodes, self._work)):
            reason = "; ".join(f"{node}: {why}" for node, why in sorted(bad.items()))
            return Outcome("unhealthy", reason, tuple(bad))
        count = max(count for count in self._work.node_counts if count <= len(nodes))
        for command in self._work.commands:
            if self._received:
                return self._signalled()
            self._step = ranks(command, nodes[:count], self._work.resources, self._work.logs)
            while not self._step.wait(_POLL_S):
                if self._late():
                    return self._signalled("; the ranks had not saved in time")
            progress = self._progress()
            if progress is not None and progress.finished:
                return Outcome("finished")
            if self._received:
                return self._signalled()
            if failure := self._step.failure():
                return Outcome("failed", failure.reason, hopeless=failure.status == _MISTAKE)
            if progress is not None and progress.total is not None:
                return Outcome("stopped", "a signal reached the ranks")
        return Outcome("finished")

    def _receive(self, received: int, _: FrameType | None) -> None:
        number = signal.Signals(received)
        self._received.append(number)
        self._warned_at = self._warned_at or time.monotonic()
        if self._step is not None:
            self._step.signal(number)

    def _late(self) -> bool:
        lead = self._work.resources.signal_lead * _PATIENCE
        return bool(self._received) and time.monotonic() - self._warned_at > lead

    def _signalled(self, more: str = "") -> Outcome:
        """What the first signal meant: SIGUSR1 comes before the time limit and, on some clusters, before preemption."""
        if self._received[0] == signal.SIGTERM:
            if down := queue.broken(self._nodes):
                return Outcome("failed", f"lost with {', '.join(down)}", tuple(down))
            return Outcome("stopped", f"SIGTERM{more}")
        entry = queue.entries([self._job]).get(self._job)
        left = entry.seconds_left if entry else None
        # SLURM warns up to a minute early.
        at_limit = left is not None and left <= self._work.resources.signal_lead + 60
        return Outcome("time limit" if at_limit else "preempted", f"SIGUSR1{more}")

    def _close_earlier(self) -> None:
        """Write the end of an attempt that could not do so itself."""
        rows = self._chain.rows(self._job)
        if rows and rows[-1]["event"] == "started":
            down = queue.broken(rows[-1]["nodes"])
            why = f"lost with {', '.join(down)}" if down else "killed, or its first node failed"
            self._chain.add("ended", self._job, outcome="failed", reason=why)

    def _give_up_without_progress(self) -> None:
        """After so many starts that ended badly where the job still stands."""
        limit = self._work.resources.attempts
        progress = self._progress()
        started, ended = self._rows("started"), [r for r in self._rows("ended") if r["outcome"] != "finished"]
        in_vain = []
        for start, end in zip(reversed(started), reversed(ended), strict=False):
            if progress is not None and start["progress"] != progress.done:
                break
            if end["outcome"] not in _INNOCENT:
                in_vain.append(end)
        if len(in_vain) >= limit:
            where = f" beyond {progress}" if progress is not None else ""
            last = in_vain[0]
            self._give_up(f"{limit} starts made no progress{where}; the last: {last['outcome']}, {last['reason']}")

    def _enough_without(self, nodes: set[str]) -> bool:
        """Whether the job can start at all without these nodes."""
        return len(queue.nodes_of(os.environ["SLURM_JOB_PARTITION"]) - nodes) >= self._work.node_counts[0]

    def _give_up(self, reason: str) -> None:
        self._chain.add("given up", self._job, reason=reason)
        raise GivenUpError(f"{self._work.name}: {reason}")

    def _progress(self) -> Progress | None:
        return None if self._work.progress is None else self._work.progress()

    def _rows(self, event: str) -> list[dict]:
        return [row for row in self._chain.rows(self._job) if row["event"] == event]
