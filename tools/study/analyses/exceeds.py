"""Whether one number of a run is greater than another of the same run: what another database does to pictures, and what
a prompt does (arXiv 2207.13038)."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from data.page import axes as new_axes
from tools.study.analyses.base import TooFewRuns, check_names
from tools.study.analyses.ordering import LEAST, paired_interval
from tools.study.results import Result
from tools.study.sheet import Sheet, figures


@dataclass(frozen=True)
class Exceeds:
    """Paired differences over runs, with an interval of their mean (Student's t).

    Args:
        greater, smaller: the numbers, as is claimed.
        at: labels by axis of the runs that count; {}: all.
        level: of the interval.
    """

    greater: str
    smaller: str
    at: dict[str, list[str]] = field(default_factory=dict)
    level: float = 0.95

    def check(self, axes: Mapping[str, Collection[str]], columns: Collection[str]) -> None:
        check_names([self.greater, self.smaller], columns, "column")
        check_names(list(self.at), axes, "axis")
        for axis, labels in self.at.items():
            check_names(labels, axes[axis], f"label of {axis}")

    def report(self, results: Sequence[Result], sheet: Sheet) -> None:
        counted = [
            result
            for result in results
            if all(result.labels[axis] in labels for axis, labels in self.at.items())
            and {self.greater, self.smaller} <= result.values.keys()
        ]
        if len(counted) < LEAST:
            raise TooFewRuns(
                f"{len(counted)} runs have both {self.greater} and {self.smaller}; an interval takes {LEAST}"
            )
        high, low = (np.array([r.values[name] for r in counted]) for name in (self.greater, self.smaller))
        mean, bottom, top = paired_interval(high - low, self.level)
        state = "holds" if bottom > 0 else "does not hold" if top < 0 else "is not shown to hold"
        sheet.number(mean=mean, interval=[bottom, top], state=state)
        sheet.verdict(
            f"That {self.greater} exceeds {self.smaller} {state} at this size: {figures(float(high.mean()), 3)} and"
            f" {figures(float(low.mean()), 3)} on average, a difference of {mean:+.3g} [{bottom:+.3g}, {top:+.3g}] at"
            f" {self.level:.0%} over {len(counted)} runs, {int((high > low).sum())} of which agree."
        )
        rows = [[r.name, figures(a, 3), figures(b, 3)] for r, a, b in zip(counted, high, low, strict=True)]
        sheet.table(f"{sheet.name}_runs", "Runs.", ["run", self.greater, self.smaller], rows)
        figure, plot = new_axes()
        plot.plot(low, high, ".")
        ends = [float(min(low.min(), high.min())), float(max(low.max(), high.max()))]
        plot.plot(ends, ends, color="tab:grey", linewidth=1)
        plot.set(xlabel=self.smaller, ylabel=self.greater)
        sheet.plot(f"{sheet.name}_pairs", f"{self.greater} over {self.smaller}, a point a run; both alike.", figure)
