"""How a loss falls with compute, parameters or data, and whether a larger run ends where the law says."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.page import axes as new_axes
from tools.study.analyses.base import TooFewRuns, check_names
from tools.study.analyses.power_law import Fit, Replicates, fit, replicate
from tools.study.prediction import read_prediction
from tools.study.results import Result
from tools.study.sheet import Sheet, figures


@dataclass(frozen=True)
class ScalingLaw:
    """Fits L = E + sum_k A_k x_k^-a_k to the runs that are not held out, and predicts those that are.

    Args:
        loss: column of the loss.
        of: columns that it falls with: [flops] for compute; [parameters, samples] for the law of Hoffmann et al.
        huber: see `power_law.fit`.
        level: of all intervals.
        replicates: of the bootstrap.
        widest: half the width, over its middle, that the interval of a held-out run may have.
    """

    loss: str
    of: list[str]
    huber: float = 1e-3
    level: float = 0.9
    replicates: int = 1000
    widest: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.level < 1:
            raise ValueError(f"level={self.level}: a probability")

    def check(self, axes: Mapping[str, Collection[str]], columns: Collection[str]) -> None:
        check_names([self.loss, *self.of], columns, "column")

    def predict(self, results: Sequence[Result], held_out: Sequence[Result]) -> dict[str, Any]:
        """The law, and for each held-out run the interval in which it will end with probability `level`."""
        fitted = self._fit(results)
        replicates = replicate(fitted, self.replicates)
        runs = {}
        for result in held_out:
            x = np.array([result.values[name] for name in self.of])
            low, high = replicates.run(x, self.level)
            runs[result.name] = {
                "x": dict(zip(self.of, x.tolist(), strict=True)),
                "loss": float(fitted.law(x[None])[0]),
                "low": float(low),
                "high": float(high),
            }
        return {"runs": runs, "level": self.level, "law": _law_json(fitted, replicates, self.level)}

    def report(self, results: Sequence[Result], sheet: Sheet) -> None:
        fitted = self._fit(results)
        replicates = replicate(fitted, self.replicates)
        law, level = fitted.law, self.level
        sheet.number(law=_law_json(fitted, replicates, level))
        floors, exponents = replicates.floor(level), replicates.exponents(level)
        rows = [["E (irreducible)", figures(law.floor), _span(floors)]]
        for k, name in enumerate(self.of):
            rows.append([f"exponent of {name}", figures(law.exponents[k], 3), _span(exponents[:, k])])
            rows.append([f"factor of {name}", figures(law.factors[k], 3), ""])
        between = fitted.deviations()
        rows.append(["deviation between seeds, smallest and largest size", f"{between[0]:.2%}, {between[-1]:.2%}", ""])
        of_sizes = [fitted.tau(share) for share in (0.5, (1 - level) / 2, (1 + level) / 2)]
        rows.append(
            [
                "deviation of sizes from the law, the median",
                f"{of_sizes[0]:.2%}",
                f"[{of_sizes[1]:.2%}, {of_sizes[2]:.2%}]",
            ]
        )
        sheet.table(
            f"{sheet.name}_law", f"The fitted law of {self.loss}.", ["", "value", f"{level:.0%} interval"], rows
        )
        spans = [np.log10(fitted.x[:, k].max() / fitted.x[:, k].min()) for k in range(len(self.of))]
        terms = " + ".join(f"{law.factors[k]:.3g} {name}^-{law.exponents[k]:.3f}" for k, name in enumerate(self.of))
        over = ", ".join(f"{span:.1f} decades of {name}" for span, name in zip(spans, self.of, strict=True))
        sheet.verdict(
            f"{self.loss} = {law.floor:.4g} + {terms}, from {len(fitted.losses)} runs of"
            f" {len(np.unique(fitted.sizes))} sizes over {over}; {level:.0%} intervals:"
            f" {', '.join(f'exponent of {name} {_span(exponents[:, k])}' for k, name in enumerate(self.of))}."
        )
        held_out = [result for result in results if result.held_out]
        self._judge(read_prediction(sheet.folder, sheet.name), held_out, sheet)
        if len(self.of) == 1:
            self._plot(fitted, replicates, held_out, sheet)

    def _judge(self, prediction: dict[str, Any] | None, held_out: Sequence[Result], sheet: Sheet) -> None:
        """Hold the held-out runs against what was predicted of them."""
        if prediction is None:
            return
        rows = []
        ended = {result.name: result.values.get(self.loss) for result in held_out}
        for name, said in prediction["runs"].items():
            width = (said["high"] - said["low"]) / (said["high"] + said["low"])
            interval = f"[{said['low']:.4g}, {said['high']:.4g}]"
            told = (
                f"Held-out run {name} was predicted at {prediction['made']}, before it started, to end within"
                f" {interval} with {prediction['level']:.0%} probability (+-{width:.1%})"
            )
            if self.widest is not None:
                told += f", {'no' if width <= self.widest else 'but that is'} wider than +-{self.widest:.0%}"
            loss = ended.get(name)
            inside = loss is not None and said["low"] <= loss <= said["high"]
            if loss is None:
                sheet.verdict(f"{told}; it has not ended yet.")
            else:
                off = loss / said["loss"] - 1
                sheet.verdict(
                    f"{told}; it ended at {loss:.4g}, {off:+.1%} from the law, {'inside' if inside else 'OUTSIDE'}."
                )
            rows.append([name, figures(said["loss"]), interval, f"{width:.2%}", figures(loss), inside])
        sheet.number(
            held_out={row[0]: {"width": row[3], "loss": ended.get(str(row[0])), "inside": row[5]} for row in rows}
        )
        sheet.table(
            f"{sheet.name}_held_out",
            f"Held-out runs; predicted at {prediction['made']}.",
            ["run", "predicted", "interval", "+-", "ended at", "inside"],
            rows,
        )

    def _plot(self, fitted: Fit, replicates: Replicates, held_out: Sequence[Result], sheet: Sheet) -> None:
        figure, plot = new_axes()
        (name,) = self.of
        ended = [(r.values[name], r.values[self.loss]) for r in held_out if self.loss in r.values]
        most = max([fitted.x.max(), *(x for x, _ in ended)])
        x = np.geomspace(fitted.x.min(), most, 100)
        low, high = replicates.curve(x[:, None], self.level)
        plot.fill_between(x, low, high, alpha=0.2, label=f"law, {self.level:.0%} interval")
        plot.plot(x, fitted.law(x[:, None]))
        plot.plot(fitted.x[:, 0], fitted.losses, "k.", label="fitted runs")
        if ended:
            plot.plot(*zip(*ended, strict=True), "r*", markersize=10, label="held out")
        plot.set(xlabel=name, ylabel=self.loss, xscale="log", yscale="log")
        plot.legend()
        sheet.plot(f"{sheet.name}_law", f"{self.loss} over {name}, one point a run, and the law.", figure)

    def _fit(self, results: Sequence[Result]) -> Fit:
        used = [r for r in results if not r.held_out and self.loss in r.values]
        places = [tuple(r.labels.items()) for r in used]
        number = {place: i for i, place in enumerate(dict.fromkeys(places))}
        x = np.array([[r.values[name] for name in self.of] for r in used]).reshape(len(used), len(self.of))
        losses = np.array([r.values[self.loss] for r in used])
        try:
            return fit(x, losses, [number[place] for place in places], self.huber)
        except ValueError as error:
            raise TooFewRuns(str(error)) from error


def _law_json(fitted: Fit, replicates: Replicates, level: float) -> dict[str, Any]:
    return {
        "floor": fitted.law.floor,
        "factors": fitted.law.factors.tolist(),
        "exponents": fitted.law.exponents.tolist(),
        "floor_interval": replicates.floor(level).tolist(),
        "exponent_intervals": replicates.exponents(level).T.tolist(),
        "sigma": fitted.noise.sigma,
        "sigma_exponent": fitted.noise.slope,
        "tau": fitted.tau(),
        "runs": len(fitted.losses),
    }


def _span(interval: np.ndarray) -> str:
    return f"[{interval[0]:.3g}, {interval[1]:.3g}]"
