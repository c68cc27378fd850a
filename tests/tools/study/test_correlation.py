"""Correlations against those of normal variables, for which they are known in closed form."""

import numpy as np
import pytest
from scipy import stats

from tests.tools.study.results import result
from tools.study.analyses.base import TooFewRuns
from tools.study.analyses.correlation import Correlation, correlate
from tools.study.sheet import Sheet


def normal(rho: float, n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).multivariate_normal([0, 0], [[1, rho], [rho, 1]], n).T


def test_large_samples_give_the_coefficients_of_the_distribution():
    x, y = normal(-0.7, 1000)
    found = correlate(x, y, 0.95, 100)
    assert found["pearson"][0] == pytest.approx(-0.7, abs=0.05)
    assert found["spearman"][0] == pytest.approx(6 / np.pi * np.arcsin(-0.35), abs=0.05)


def test_intervals_are_fishers_and_hold_the_truth():
    x, y = normal(0.6, 50)
    (r, low, high), (rho, rho_low, rho_high) = correlate(x, y, 0.95, 500).values()
    z, width = np.arctanh(r), stats.norm.ppf(0.975) / np.sqrt(47)
    np.testing.assert_allclose([low, high], np.tanh([z - width, z + width]), rtol=1e-9)
    assert rho_low < rho < rho_high and rho_low < 6 / np.pi * np.arcsin(0.3) < rho_high


def test_spearmans_intervals_hold_as_often_as_they_say():
    truth, studies = 6 / np.pi * np.arcsin(0.25), 40
    inside = 0
    for study in range(studies):
        _, low, high = correlate(*normal(0.5, 30, study), 0.9, 150)["spearman"]
        inside += low <= truth <= high
    assert stats.binom.ppf(0.001, studies, 0.9) <= inside


def test_a_perfect_order_needs_no_resampling():
    x = np.arange(6.0)
    assert correlate(x, x**3, 0.9, 100)["spearman"] == pytest.approx((1.0, 1.0, 1.0))


def test_runs_without_both_numbers_are_left_out(tmp_path):
    x, y = normal(-0.9, 12)
    runs = [result({"i": f"r{i}"}, {"loss": a, "clip": b}) for i, (a, b) in enumerate(zip(x, y, strict=True))]
    runs.append(result({"i": "r99"}, {"loss": 100.0}))
    sheet = Sheet("correlation", tmp_path)
    Correlation("loss", ["clip"], replicates=200).report(runs, sheet)
    assert sheet.numbers["clip"]["pearson"][0] == pytest.approx(stats.pearsonr(x, y).statistic)
    assert "over 12 runs" in sheet.verdicts[0]
    with pytest.raises(TooFewRuns, match="takes 5"):
        Correlation("loss", ["clip"]).report(runs[:4], sheet)
