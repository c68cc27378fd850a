"""Whether one number tells of another over runs: the validation loss of sample quality, for instance
(SD3, arXiv 2403.03206, section 5.3, figure 8)."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from data.page import axes as new_axes
from tools.study.analyses.base import TooFewRuns, check_names
from tools.study.results import Result
from tools.study.sheet import Sheet

LEAST = 5
"""Runs below which no correlation is told."""


@dataclass(frozen=True)
class Correlation:
    """Pearson's and Spearman's correlation of a column with others, over runs.

    Args:
        column: such as the validation loss.
        others: columns that it is held against.
        level: of the intervals: Fisher's for Pearson's, bias-corrected bootstrap (BCa) over runs for Spearman's.
        replicates: of the bootstrap.
    """

    column: str
    others: list[str]
    level: float = 0.95
    replicates: int = 2000

    def check(self, axes: Mapping[str, Collection[str]], columns: Collection[str]) -> None:
        check_names([self.column, *self.others], columns, "column")

    def report(self, results: Sequence[Result], sheet: Sheet) -> None:
        rows = []
        for other in self.others:
            pairs = [
                (r.values[self.column], r.values[other]) for r in results if {self.column, other} <= r.values.keys()
            ]
            if len(pairs) < LEAST:
                raise TooFewRuns(f"{len(pairs)} runs have both {self.column} and {other}; a correlation takes {LEAST}")
            x, y = np.array(pairs).T
            found = correlate(x, y, self.level, self.replicates)
            rows.append([other, len(pairs), *(f"{v:.3f} [{low:.3f}, {high:.3f}]" for v, low, high in found.values())])
            sheet.number(**{other: found})
            (r, r_low, r_high), (rho, rho_low, rho_high) = found["pearson"], found["spearman"]
            sheet.verdict(
                f"{self.column} and {other} correlate with r = {r:.2f} [{r_low:.2f}, {r_high:.2f}] and rank correlation"
                f" {rho:.2f} [{rho_low:.2f}, {rho_high:.2f}] over {len(pairs)} runs ({self.level:.0%} intervals)."
            )
            figure, plot = new_axes()
            plot.plot(x, y, ".")
            plot.set(xlabel=self.column, ylabel=other)
            sheet.plot(f"{sheet.name}_{other}", f"{other} over {self.column}, one point a run.", figure)
        header = ["with", "runs", "Pearson", "Spearman"]
        sheet.table(f"{sheet.name}_correlations", f"Correlations of {self.column}.", header, rows)


def correlate(x: np.ndarray, y: np.ndarray, level: float, replicates: int) -> dict[str, tuple[float, float, float]]:
    """Coefficients with the ends of their intervals, by name; NaN where a column does not vary."""
    pearson = stats.pearsonr(x, y)
    low, high = pearson.confidence_interval(level)
    rho = stats.spearmanr(x, y).statistic
    ends: Any = (rho, rho)
    if abs(rho) < 1:  # else every resample has the same
        ends = stats.bootstrap(
            (x, y),
            lambda a, b: stats.spearmanr(a, b).statistic,
            paired=True,
            vectorized=False,
            n_resamples=replicates,
            confidence_level=level,
            rng=np.random.default_rng(0),
        ).confidence_interval
    return {
        "pearson": (float(pearson.statistic), float(low), float(high)),
        "spearman": (float(rho), float(ends[0]), float(ends[1])),
    }
