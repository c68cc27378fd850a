"""What is submitted: finished commands, and what there is to know of them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from slurm.chain import Chain
from slurm.resources import Resources


@dataclass(frozen=True)
class Progress:
    """How far a job has come, in units of its own, by what would survive its death: a run's checkpoints.

    Args:
        done: of them.
        total: None where the command alone knows whether anything is left to do.
    """

    done: int
    total: int | None

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.total is not None and self.done >= self.total

    def __str__(self) -> str:
        return str(self.done) if self.total is None else f"{self.done} of {self.total}"


@dataclass(frozen=True)
class Work:
    """One job, or one element of an array.

    Args:
        name: of the job in the queue.
        commands: to be run as ranks, one after another; arguments of `resources.python`.
        logs: folder for what the ranks write.
        chain: the job's history.
        resources: of each start.
        node_counts: that the ranks can run on, ascending.
        progress: tells how far the job has come; None where nothing does. Without a total, a command that ends well has
            done all there is to do.
    """

    name: str
    commands: list[list[str]]
    logs: Path
    chain: Chain
    resources: Resources
    node_counts: list[int]
    progress: Callable[[], Progress] | None = None
