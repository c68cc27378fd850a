"""What the study asks of an analysis."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from tools.study.results import Result
from tools.study.sheet import Sheet


class TooFewRuns(ValueError):
    """The finished runs do not suffice for the analysis."""


@runtime_checkable
class Analysis(Protocol):
    """Makes sentences, tables and plots of a study's results."""

    def check(self, axes: Mapping[str, Collection[str]], columns: Collection[str]) -> None:
        """Before anything starts.

        Args:
            axes: labels by axis.
            columns: numbers that every run will have.

        Raises:
            ValueError: the analysis names an axis or a column that there is not.
        """

    def report(self, results: Sequence[Result], sheet: Sheet) -> None:
        """Write to `sheet` what the finished runs show. Verdicts are sentences with numbers.

        Raises:
            TooFewRuns: they do not suffice.
        """


@runtime_checkable
class Predicts(Protocol):
    """An analysis that says how the held-out runs will end before they start."""

    def predict(self, results: Sequence[Result], held_out: Sequence[Result]) -> dict[str, Any]:
        """JSON of its predictions.

        Args:
            results: of the runs that have finished.
            held_out: those to come; their `values` hold what is known beforehand (parameters, steps, samples, flops).

        Raises:
            TooFewRuns: the results do not suffice.
        """


def check_names(asked: Collection[str], known: Collection[str], kind: str) -> None:
    """Refuse the name of an axis or a column that there is not.

    Raises:
        ValueError: names it and those there are.
    """
    for name in asked:
        if name not in known:
            raise ValueError(f"there is no {kind} {name!r}; there are {', '.join(known)}")
