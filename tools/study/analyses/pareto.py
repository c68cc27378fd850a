"""The ranking of formulations in SD3's study (arXiv 2403.03206, section 5.1 and table 1).

Each setting (a sampler, EMA or raw weights, a data set) gives every variant two numbers, such as CLIP score and FID.
Variants that no other dominates get rank 1 and are taken away; of the rest, those that none dominates get rank 2, and
so on. A variant's score is its mean rank over the settings.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.stats import rankdata

from tools.study.analyses.base import TooFewRuns, check_names
from tools.study.results import Result
from tools.study.sheet import Sheet


def fronts(points: np.ndarray) -> np.ndarray:
    """(n,) ranks, from 1, of points (n, 2) of which less is better in both numbers.

    A point is dominated by one that is no worse in both numbers and better in one. Equal points share a rank.
    """
    no_worse = (points[:, None] <= points[None]).all(-1)
    better = (points[:, None] < points[None]).any(-1)
    dominates = no_worse & better
    ranks = np.zeros(len(points), dtype=int)
    left = np.ones(len(points), dtype=bool)
    while left.any():
        front = left & ~(dominates & left[:, None]).any(0)
        ranks[front] = ranks.max() + 1
        left &= ~front
    return ranks


@dataclass(frozen=True)
class ParetoRanks:
    """Ranks the labels of an axis over all settings of the runs' evaluations.

    Args:
        axis: whose labels are ranked.
        higher: number of which more is better (CLIP score).
        lower: number of which less is better (FID).
        settings: keys of the evaluations' rows that tell settings apart, beside the other axes and the seed.
        groups: further mean ranks, by name, over the settings with these values: {5 steps: {steps: 5}}.
    """

    axis: str
    higher: str
    lower: str
    settings: list[str]
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)

    def check(self, axes: Mapping[str, Collection[str]], columns: Collection[str]) -> None:
        check_names([self.axis], axes, "axis")

    def report(self, results: Sequence[Result], sheet: Sheet) -> None:
        variants, tables = self._tables(results)
        ranks = {setting: fronts(np.array([table[v] for v in variants])) for setting, table in tables.items()}
        wanted: dict[str, dict[str, Any]] = {"all": {}, **self.groups}
        means = {}
        for group, values in wanted.items():
            chosen = [r for setting, r in ranks.items() if values.items() <= dict(setting).items()]
            if not chosen:
                raise TooFewRuns(f"no setting has {values}")
            means[group] = np.mean(chosen, axis=0)
        order = np.argsort(means["all"], kind="stable")
        rows = [[variants[i], *(f"{mean[i]:.2f}" for mean in means.values())] for i in order]
        sheet.table(
            f"{sheet.name}_ranks", f"Mean rank over {len(tables)} settings; less is better.", [self.axis, *means], rows
        )
        sheet.number(ranks={variants[i]: {group: float(mean[i]) for group, mean in means.items()} for i in order})
        places = rankdata(means["all"], method="min")
        first = [variants[i] for i in order if places[i] == 1]
        sheet.verdict(
            f"Over {len(tables)} settings {' and '.join(first)} rank{'s' if len(first) == 1 else ''} first of"
            f" {len(variants)} with a mean of {means['all'][order[0]]:.2f}"
            + (f"; then {', '.join(f'{r[0]} {r[1]}' for r in rows[len(first) : len(first) + 3])}." if rows else ".")
        )

    def _tables(self, results: Sequence[Result]) -> tuple[list[str], dict[tuple, dict[str, tuple[float, float]]]]:
        """Variants, and by setting the two numbers of each, less being better. Variants that lack a setting are left
        out, as those that diverged are in the paper."""
        tables: dict[tuple, dict[str, tuple[float, float]]] = {}
        for result in results:
            place = {axis: label for axis, label in result.labels.items() if axis != self.axis}
            for row in result.settings:
                setting = place | {"seed": result.seed} | {key: row[key] for key in self.settings}
                points = tables.setdefault(tuple(setting.items()), {})
                points[result.labels[self.axis]] = (-float(row[self.higher]), float(row[self.lower]))
        if not tables:
            raise TooFewRuns("no run has been evaluated")
        named = dict.fromkeys(result.labels[self.axis] for result in results)
        variants = [v for v in named if all(v in table for table in tables.values())]
        if not variants:
            raise TooFewRuns(f"no {self.axis} has been evaluated in all {len(tables)} settings")
        return variants, tables
