"""What may happen around a study's runs: data made for all of them, and what is measured of their checkpoints."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable


@runtime_checkable
class Preparation(Protocol):
    """Makes what all runs of a study share."""

    def prepare(self, folder: Path) -> None:
        """Make it under the study's folder, unless it is there. Called before every visit to the runs."""


@runtime_checkable
class Evaluation(Protocol):
    """Measures a trained run."""

    def columns(self) -> Sequence[str]:
        """Numbers in every row; their means over the rows are columns of the study."""

    def commands(self, run: Path) -> list[list[str]]:
        """Overrides of `millrace evaluate`, for each command that must still come to its end before `evaluate`. The run
        need not be there yet."""

    def evaluate(self, run: Path) -> list[dict[str, float | str]]:
        """Rows of settings and numbers of a finished run, for instance one for each sampler. They are kept in the run's
        `evaluation.jsonl`, and not measured again."""
