"""One row for each run of a study, and the Parquet file of them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Numbers that every run has.
COUNTED = ("parameters", "steps", "samples", "flops", "hours")


@dataclass(frozen=True)
class Result:
    """What is known of a run.

    Args:
        name: of the run.
        labels: its place, by axis.
        seed: of the run.
        held_out: whether it is one that the analyses predict.
        state: "finished", or why it is not.
        folder: of the run.
        values: numbers by name; those of an unfinished run are as far as it got.
        settings: rows of its evaluation.
    """

    name: str
    labels: dict[str, str]
    seed: int
    held_out: bool
    state: str
    folder: Path
    values: dict[str, float]
    settings: list[dict[str, Any]] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return self.state == "finished"


def columns(results: Iterable[Result]) -> list[str]:
    """Names of the numbers that any of the results has, the counted ones first."""
    found = dict.fromkeys(name for result in results for name in result.values)
    return [name for name in COUNTED if name in found] + [name for name in found if name not in COUNTED]


def write_parquet(results: Sequence[Result], path: Path) -> None:
    """One row for each run: name, an `axis.<name>` column for each axis, seed, held_out, state, and the numbers."""
    import pyarrow
    from pyarrow import parquet

    axes = list(results[0].labels)
    table = {
        "run": [r.name for r in results],
        **{f"axis.{axis}": [r.labels[axis] for r in results] for axis in axes},
        "seed": [r.seed for r in results],
        "held_out": [r.held_out for r in results],
        "state": [r.state for r in results],
        **{name: [_float(r.values.get(name)) for r in results] for name in columns(results)},
    }
    scratch = path.with_suffix(".tmp")
    parquet.write_table(pyarrow.table(table), scratch)
    scratch.replace(path)


def _float(value: float | None) -> float | None:
    return None if value is None else float(value)
