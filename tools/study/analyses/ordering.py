"""Whether a number grows along labels as a paper claims: discarding small images < no conditioning < size conditioning
(SDXL, arXiv 2307.01952, table 2), autoencoders of 4 < 8 < 16 channels (SD3, arXiv 2403.03206, table 3)."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy import stats

from data.page import axes as new_axes
from tools.study.analyses.base import TooFewRuns, check_names
from tools.study.results import Result
from tools.study.sheet import Sheet, figures

LEAST = 3
"""Pairs of runs below which no interval is told."""


@dataclass(frozen=True)
class Ordering:
    """Holds neighbours of an order against each other, run by run: those that differ in nothing but the label (the same
    seed, the same place on the other axes) form pairs, so that what a seed does to both falls out.

    A step of the order holds where the whole interval of the mean difference (Student's t) is above 0. All steps are
    told at `level` together: each at 1 - (1 - level) / steps (Bonferroni).

    Args:
        axis: of the labels.
        column: the number.
        order: labels, from where the number is claimed to be lowest to where it is highest.
        level: of the intervals.
    """

    axis: str
    column: str
    order: list[str]
    level: float = 0.95

    def __post_init__(self) -> None:
        if len(self.order) < 2 or len(set(self.order)) < len(self.order):
            raise ValueError(f"order={self.order}: at least two labels, each once")

    def check(self, axes: Mapping[str, Collection[str]], columns: Collection[str]) -> None:
        check_names([self.axis], axes, "axis")
        check_names(self.order, axes[self.axis], f"label of {self.axis}")
        check_names([self.column], columns, "column")

    def report(self, results: Sequence[Result], sheet: Sheet) -> None:
        values = self._values(results)
        steps = len(self.order) - 1
        level = 1 - (1 - self.level) / steps
        rows: list[list[object]] = []
        states, told, pairs = [], [], []
        for low, high in pairwise(self.order):
            shared = [place for place in values[low] if place in values[high]]
            if len(shared) < LEAST:
                raise TooFewRuns(
                    f"{len(shared)} pairs of runs of {low} and {high} have {self.column}; an interval takes {LEAST}"
                )
            differences = np.array([values[high][place] - values[low][place] for place in shared])
            mean, bottom, top = paired_interval(differences, level)
            state = "holds" if bottom > 0 else "reversed" if top < 0 else "open"
            states.append(state)
            pairs.append(len(shared))
            told.append({"low": low, "high": high, "mean": mean, "interval": [bottom, top], "state": state})
            interval = f"{mean:+.3g} [{bottom:+.3g}, {top:+.3g}]"
            rows.append([f"{low} < {high}", len(shared), interval, int((differences > 0).sum()), state])
        header = ["step", "pairs", f"difference of {self.column}", "pairs that agree", "it"]
        sheet.table(f"{sheet.name}_steps", f"Paired differences, {level:.1%} intervals.", header, rows)
        means = {label: np.array(list(values[label].values())) for label in self.order}
        sheet.table(
            f"{sheet.name}_means",
            f"{self.column} by {self.axis}: means, and deviations over runs.",
            [self.axis, "runs", "mean", "deviation"],
            [[label, len(v), figures(float(v.mean())), figures(float(v.std(ddof=1)), 2)] for label, v in means.items()],
        )
        sheet.number(steps=told, means={label: float(v.mean()) for label, v in means.items()})
        claim = " < ".join(self.order)
        found = "; ".join(f"{row[0]}: {row[2]}, {row[4]}" for row in rows)
        verdict = (
            "holds" if set(states) == {"holds"} else "does not hold" if "reversed" in states else "is not shown to hold"
        )
        sheet.verdict(
            f"That {self.column} grows in the order {claim} {verdict} at this size, at {self.level:.0%} over"
            f" {min(pairs)} pairs of runs a step ({found})."
        )
        figure, plot = new_axes()
        for number, label in enumerate(self.order):
            plot.plot([number] * len(means[label]), means[label], ".", color="tab:grey")
            spread = stats.sem(means[label]) * stats.t.ppf(0.5 + self.level / 2, len(means[label]) - 1)
            plot.errorbar(number, means[label].mean(), spread, marker="o", capsize=4, color="tab:blue")
        plot.set(ylabel=self.column, xlabel=self.axis)
        plot.set_xticks(range(len(self.order)), self.order)
        sheet.plot(f"{sheet.name}_order", f"{self.column}: runs, and means with {self.level:.0%} intervals.", figure)

    def _values(self, results: Sequence[Result]) -> dict[str, dict[tuple, float]]:
        """The number by label and by place on everything else."""
        values: dict[str, dict[tuple, float]] = {label: {} for label in self.order}
        for result in results:
            label = result.labels[self.axis]
            if label in values and self.column in result.values:
                rest = [(axis, other) for axis, other in result.labels.items() if axis != self.axis]
                values[label][(*rest, result.seed)] = result.values[self.column]
        return values


def paired_interval(differences: np.ndarray, level: float) -> tuple[float, float, float]:
    """Mean of differences (n,), and the ends of its interval by Student's t."""
    mean, error = float(differences.mean()), float(stats.sem(differences))
    width = error * float(stats.t.ppf(0.5 + level / 2, len(differences) - 1))
    return mean, mean - width, mean + width
