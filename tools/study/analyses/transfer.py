"""Whether the best learning rate stays where it is as networks widen: the promise of muP (arXiv 2203.03466)."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data.page import axes as new_axes
from tools.study.analyses.base import TooFewRuns, check_names
from tools.study.analyses.isoflop import vertex
from tools.study.results import Result
from tools.study.sheet import Sheet, figures


@dataclass(frozen=True)
class LearningRateTransfer:
    """The best learning rate of each width, the vertex of a parabola in its logarithm about the best run, and how it
    drifts: the slope of log(best) over log(width). It is 0 where rates transfer, and about -1 for Adam where hidden
    layers are left as they are.

    Args:
        loss: column of the loss.
        width: column of the widths.
        rate: column of the learning rates.
        groups: axis whose labels are compared, such as the parametrization; null: all runs are one group.
        level: of the interval, a bootstrap over seeds.
        replicates: of the bootstrap.
    """

    loss: str
    width: str = "width"
    rate: str = "lr"
    groups: str | None = None
    level: float = 0.9
    replicates: int = 500

    def check(self, axes: Mapping[str, Collection[str]], columns: Collection[str]) -> None:
        check_names([self.groups] if self.groups else [], axes, "axis")
        check_names([self.loss, self.width, self.rate], columns, "column")

    def report(self, results: Sequence[Result], sheet: Sheet) -> None:
        groups = dict.fromkeys(r.labels[self.groups] if self.groups else "" for r in results)
        rows = []
        for group in groups:
            runs = [r for r in results if not self.groups or r.labels[self.groups] == group]
            rows += self._group(runs, group, sheet)
        header = ["group", "width", "best rate", "lowest loss"]
        sheet.table(f"{sheet.name}_best", "Best learning rates.", header, rows)

    def _group(self, runs: Sequence[Result], group: str, sheet: Sheet) -> list[list[str]]:
        curves = {
            width: _curve([r for r in runs if r.values[self.width] == width and self.loss in r.values], self)
            for width in sorted({r.values[self.width] for r in runs})
        }
        if len(curves) < 2 or any(len(curve) < 3 for curve in curves.values()):
            raise TooFewRuns("a drift needs at least two widths with three learning rates each")
        widths = np.log2(list(curves))
        best = [best_rate(_means(curve)) for curve in curves.values()]
        drift = float(np.polyfit(widths, best, 1)[0])
        rng = np.random.default_rng(0)
        drifts = [
            np.polyfit(widths, [best_rate(_means(curve, rng)) for curve in curves.values()], 1)[0]
            for _ in range(self.replicates)
        ]
        low, high = np.quantile(drifts, [(1 - self.level) / 2, (1 + self.level) / 2])
        where = f"{group}: " if group else ""
        narrow, wide = min(curves), max(curves)
        sheet.number(**{group or "drift": {"drift": drift, "interval": [float(low), float(high)]}})
        sheet.verdict(
            f"{where}the best learning rate goes as width^{drift:.2f} ({self.level:.0%} interval over seeds"
            f" [{low:.2f}, {high:.2f}]), from 2^{best[0]:.1f} at {narrow:.0f} to 2^{best[-1]:.1f} at"
            f" {wide:.0f}."
        )
        figure, plot = new_axes()
        for width, curve in curves.items():
            plot.plot(*zip(*sorted(_means(curve).items()), strict=True), marker="o", label=f"{width:.0f}")
        plot.set(xlabel=f"log2 {self.rate}", ylabel=self.loss)
        plot.legend(title=self.width)
        sheet.plot(f"{sheet.name}_{group or 'curves'}", f"{group} {self.loss} over the learning rate.", figure)
        losses = [min(_means(curve).values()) for curve in curves.values()]
        return [
            [group, f"{width:.0f}", figures(2**rate, 3), figures(loss)]
            for width, rate, loss in zip(curves, best, losses, strict=True)
        ]


def best_rate(curve: Mapping[float, float]) -> float:
    """The log2 of the best rate: the vertex of the parabola through the lowest point and its two neighbours; at an end
    of the curve, that end."""
    rates = sorted(curve)
    i = min(range(len(rates)), key=lambda i: curve[rates[i]])
    if i in (0, len(rates) - 1):
        return rates[i]
    three = rates[i - 1 : i + 2]
    return vertex(np.polyfit(three, [curve[rate] for rate in three], 2))


def _curve(runs: Sequence[Result], analysis: LearningRateTransfer) -> dict[float, list[float]]:
    """Losses of all seeds, by log2 of the rate."""
    curve: dict[float, list[float]] = {}
    for run in runs:
        curve.setdefault(float(np.log2(run.values[analysis.rate])), []).append(run.values[analysis.loss])
    return curve


def _means(curve: Mapping[float, Sequence[float]], rng: np.random.Generator | None = None) -> dict[float, float]:
    """Mean losses; with `rng`, of seeds drawn with replacement."""
    return {
        rate: float(np.mean(losses if rng is None else rng.choice(losses, len(losses))))
        for rate, losses in curve.items()
    }
