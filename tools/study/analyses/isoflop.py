"""The best size for a budget of compute: parabolas through runs of equal FLOPs, and how their minima grow
(Hoffmann et al., arXiv 2203.15556, section 3.2)."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data.page import axes as new_axes
from tools.study.analyses.base import TooFewRuns, check_names
from tools.study.results import Result
from tools.study.sheet import Sheet, figures


@dataclass(frozen=True)
class IsoFlop:
    """A parabola of the loss in log N for each budget; the minima N_opt over compute as a power law, N_opt ~ C^a.

    Intervals are a parametric bootstrap of the parabolas.

    Args:
        loss: column of the loss.
        budget: axis whose labels stand for budgets; its runs have about equal `flops`.
        size: column of the sizes, N.
        level: of the intervals.
        replicates: of the bootstrap.
    """

    loss: str
    budget: str
    size: str = "parameters"
    level: float = 0.9
    replicates: int = 1000

    def check(self, axes: Mapping[str, Collection[str]], columns: Collection[str]) -> None:
        check_names([self.budget], axes, "axis")
        check_names([self.loss, self.size], columns, "column")

    def report(self, results: Sequence[Result], sheet: Sheet) -> None:
        curves = [curve for curve in self._curves(results) if len(np.unique(curve.size)) >= 3]
        inner = [curve for curve in curves if curve.size.min() <= np.exp(curve.best) <= curve.size.max()]
        for curve in curves:
            if curve not in inner:
                sheet.verdict(f"Budget {curve.label}: no minimum among the sizes that were run.")
        if not inner:
            raise TooFewRuns("no budget has a minimum among at least three sizes")
        drawn = replicate(inner, self.replicates, np.random.default_rng(0))
        ends = [(1 - self.level) / 2, (1 + self.level) / 2]
        spans = np.exp(np.quantile(drawn, ends, axis=1)).T
        rows = [
            [curve.label, figures(curve.flops, 3), figures(np.exp(curve.best)), f"[{low:.4g}, {high:.4g}]"]
            for curve, (low, high) in zip(inner, spans, strict=True)
        ]
        header = [self.budget, "flops", f"best {self.size}", f"{self.level:.0%} interval"]
        sheet.table(f"{sheet.name}_minima", f"The {self.size} of least {self.loss} for each budget.", header, rows)
        self._plot(curves, sheet)
        if len(inner) < 2:
            return
        compute = np.log([curve.flops for curve in inner])
        exponent = np.polyfit(compute, [curve.best for curve in inner], 1)[0]
        low, high = np.quantile(np.polyfit(compute, drawn, 1)[0], ends)
        sheet.number(exponent=float(exponent), interval=[float(low), float(high)])
        sheet.verdict(
            f"The best {self.size} grow as compute^{exponent:.3f} ({self.level:.0%} interval [{low:.3f}, {high:.3f}])"
            f" over {len(inner)} budgets."
        )

    def _curves(self, results: Sequence[Result]) -> list["Curve"]:
        found = []
        for label in dict.fromkeys(r.labels[self.budget] for r in results):
            runs = [r for r in results if r.labels[self.budget] == label and self.loss in r.values]
            size, loss, flops = (np.array([r.values[name] for r in runs]) for name in (self.size, self.loss, "flops"))
            found.append(Curve(label, size, loss, float(flops.mean())))
        return found

    def _plot(self, curves: Sequence["Curve"], sheet: Sheet) -> None:
        figure, plot = new_axes()
        for curve in curves:
            x = np.linspace(np.log(curve.size).min(), np.log(curve.size).max(), 50)
            (line,) = plot.plot(np.exp(x), np.polyval(curve.parabola, x), label=curve.label)
            plot.plot(curve.size, curve.loss, ".", color=line.get_color())
        plot.set(xlabel=self.size, ylabel=self.loss, xscale="log")
        plot.legend(title=self.budget)
        sheet.plot(f"{sheet.name}_parabolas", "Runs of equal compute.", figure)


@dataclass(frozen=True, eq=False)
class Curve:
    """The runs of one budget.

    Args:
        label: of the budget.
        size, loss: (n,).
        flops: mean of the runs.
    """

    label: str
    size: np.ndarray
    loss: np.ndarray
    flops: float

    @property
    def parabola(self) -> np.ndarray:
        """(3,) coefficients of the loss in log(size), the highest first."""
        return np.polyfit(np.log(self.size), self.loss, 2)

    @property
    def best(self) -> float:
        """log(size) at the minimum; NaN where there is none."""
        return vertex(self.parabola)


def vertex(parabola: np.ndarray) -> float:
    """Where a parabola has its minimum; NaN where it opens downward."""
    a, b, _ = parabola
    return float(-b / (2 * a)) if a > 0 else float("nan")


def replicate(curves: Sequence[Curve], count: int, rng: np.random.Generator) -> np.ndarray:
    """(curves, count) minima that the runs might have given: a parametric bootstrap. The deviation of residuals,
    one for all curves, is drawn as scaled inverse chi-squared. Parabolas without a minimum are drawn again."""
    squares = sum(((c.loss - np.polyval(c.parabola, np.log(c.size))) ** 2).sum() for c in curves)
    degrees = max(1, sum(len(c.size) - 3 for c in curves))
    found: list[np.ndarray] = []
    for curve in curves:
        x, minima = np.log(curve.size), np.empty(0)
        for _ in range(20):
            sigma = np.sqrt(squares / rng.chisquare(degrees, count))
            noisy = np.polyval(curve.parabola, x)[:, None] + sigma * rng.standard_normal((len(x), count))
            a, b, _ = np.polyfit(x, noisy, 2)
            minima = np.concatenate([minima, (-b / (2 * a))[a > 0]])
            if len(minima) >= count:
                break
        else:
            raise TooFewRuns(f"the losses of budget {curve.label} have no minimum to speak of: run sizes further apart")
        found.append(minima[:count])
    return np.array(found)
