"""Minima of parabolas and their growth, of losses whose best sizes we know."""

import numpy as np
import pytest
from scipy import stats

from tests.tools.study.results import result
from tools.study.analyses.base import TooFewRuns
from tools.study.analyses.isoflop import Curve, IsoFlop, replicate, vertex
from tools.study.sheet import Sheet


def budgets(exponent: float, noise: float, seed: int = 0) -> list:
    """Runs of five sizes for four budgets, whose best size is 1000 (C / 1e15)^exponent."""
    rng = np.random.default_rng(seed)
    found = []
    for i, compute in enumerate(1e15 * 10.0 ** np.arange(4)):
        best = 1000 * (compute / 1e15) ** exponent
        for j, factor in enumerate((0.2, 0.5, 1.1, 2.5, 6.0)):
            loss = 2 - 0.1 * i + 0.05 * np.log(factor) ** 2 + noise * rng.standard_normal()
            values = {"parameters": best * factor, "flops": compute, "loss": loss}
            found.append(result({"budget": f"b{i}", "size": f"s{j}"}, values))
    return found


def test_the_best_size_grows_as_it_was_made_to(tmp_path):
    sheet = Sheet("isoflop", tmp_path)
    IsoFlop("loss", "budget").report(budgets(0.46, noise=0.0), sheet)
    assert sheet.numbers["exponent"] == pytest.approx(0.46, abs=1e-6)
    assert [row[2] for row in sheet.tables[0].rows] == ["1000", "2884", "8318", "2.399e+04"]


def test_with_noise_intervals_hold_the_exponent_as_often_as_they_say(tmp_path):
    inside, studies = 0, 60
    for study in range(studies):
        curves = IsoFlop("loss", "budget")._curves(budgets(0.5, noise=0.004, seed=study))
        compute = np.log([curve.flops for curve in curves])
        exponents = np.polyfit(compute, replicate(curves, 200, np.random.default_rng(study)), 1)[0]
        low, high = np.quantile(exponents, [0.05, 0.95])
        inside += low <= 0.5 <= high
    assert inside >= stats.binom.ppf(0.001, studies, 0.9)


def test_a_minimum_beyond_the_sizes_is_told_and_not_used(tmp_path):
    runs = [
        r for r in budgets(0.5, noise=0.0) if r.labels["budget"] != "b3" or r.labels["size"] not in ("s0", "s1", "s2")
    ]
    runs += [
        result({"budget": "b3", "size": "s9"}, {"parameters": 1e9, "flops": 1e18, "loss": 9.0}),
    ]
    sheet = Sheet("isoflop", tmp_path)
    IsoFlop("loss", "budget").report(runs, sheet)
    assert "Budget b3: no minimum among the sizes" in sheet.verdicts[0]
    assert sheet.numbers["exponent"] == pytest.approx(0.5, abs=1e-6)
    with pytest.raises(TooFewRuns):
        IsoFlop("loss", "budget").report(runs[:2], Sheet("isoflop", tmp_path))


def test_the_vertex_is_that_of_the_parabola():
    assert vertex(np.array([2.0, -12.0, 1.0])) == 3.0
    assert np.isnan(vertex(np.array([-2.0, 1.0, 0.0])))
    x = np.array([0.0, 1.0, 2.0, 3.0])
    exact = Curve("b", np.exp(x), (x - 1.3) ** 2, 1e15)
    assert exact.best == pytest.approx(1.3)
    np.testing.assert_allclose(replicate([exact], 10, np.random.default_rng(0)), 1.3)
