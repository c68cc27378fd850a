"""Numbers taken from a run's metrics.jsonl."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol, runtime_checkable

Row = Mapping[str, float | int | None]


@runtime_checkable
class Measure(Protocol):
    """One number of a run."""

    def of(self, rows: Sequence[Row]) -> float | None:
        """The number, from the rows of metrics.jsonl in order; None where they do not have it."""


@dataclass(frozen=True)
class Last:
    """The last value of a column."""

    column: str

    def of(self, rows: Sequence[Row]) -> float | None:
        values = values_of(rows, self.column)
        return values[-1] if values else None


@dataclass(frozen=True)
class Best:
    """The lowest value of a column; with `highest`, the highest."""

    column: str
    highest: bool = False

    def of(self, rows: Sequence[Row]) -> float | None:
        values = values_of(rows, self.column)
        return (max if self.highest else min)(values) if values else None


@dataclass(frozen=True)
class Mean:
    """The mean of a column's last `rows` values."""

    column: str
    rows: int

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"rows={self.rows}: at least 1")

    def of(self, rows: Sequence[Row]) -> float | None:
        values = values_of(rows, self.column)
        return fmean(values[-self.rows :]) if values else None


@dataclass(frozen=True)
class At:
    """A column's value at a step."""

    column: str
    step: int

    def of(self, rows: Sequence[Row]) -> float | None:
        return next((row[self.column] for row in rows if row["step"] == self.step and self.column in row), None)


def values_of(rows: Sequence[Row], column: str) -> list[float]:
    """A column's values, in order; rows without it are passed over."""
    return [value for row in rows if (value := row.get(column)) is not None]
