"""Drift of the best learning rate, of curves that were made to drift."""

import numpy as np
import pytest

from tests.tools.study.results import result
from tools.study.analyses.base import TooFewRuns
from tools.study.analyses.transfer import LearningRateTransfer, best_rate
from tools.study.sheet import Sheet

RATES = 2.0 ** np.arange(-13, -4)


def loss(rate: float, width: int, drift: float) -> float:
    """Least at 2^-8.3 times (width / 64)^drift."""
    return 1 + 0.1 * (np.log2(rate) + 8.3 - drift * np.log2(width / 64)) ** 2


def curves(drifts: dict[str, float], noise: float = 0.0) -> list:
    rng = np.random.default_rng(0)
    return [
        result(
            {"kind": kind, "width": f"w{width}", "lr": f"lr{i}"},
            {
                "width": width,
                "lr": rate,
                "loss": loss(rate, width, drift) + noise * rng.standard_normal(),
            },
            seed,
        )
        for kind, drift in drifts.items()
        for width in (64, 128, 256)
        for i, rate in enumerate(RATES)
        for seed in range(3)
    ]


def test_the_drift_is_found_for_each_group(tmp_path):
    sheet = Sheet("transfer", tmp_path)
    LearningRateTransfer("loss", groups="kind").report(curves({"mup": 0.0, "plain": -1.0}), sheet)
    assert sheet.numbers["mup"]["drift"] == pytest.approx(0.0, abs=1e-9)
    assert sheet.numbers["plain"]["drift"] == pytest.approx(-1.0)
    assert "plain: the best learning rate goes as width^-1.00" in sheet.verdicts[1]
    assert len(sheet.tables[0].rows) == 6


def test_the_interval_over_seeds_holds_it(tmp_path):
    sheet = Sheet("transfer", tmp_path)
    LearningRateTransfer("loss").report(curves({"plain": -0.5}, noise=0.01), sheet)
    low, high = sheet.numbers["drift"]["interval"]
    assert low <= -0.5 <= high and high - low < 0.3


def test_at_an_end_of_the_curve_the_end_is_the_best():
    assert best_rate({-3.0: 1.0, -2.0: 2.0, -1.0: 3.0}) == -3.0
    assert best_rate({-3.0: 2.0, -2.0: 1.0, -1.0: 2.0}) == pytest.approx(-2.0)


def test_one_width_has_no_drift(tmp_path):
    one = [r for r in curves({"plain": 0.0}) if r.labels["width"] == "w64"]
    with pytest.raises(TooFewRuns):
        LearningRateTransfer("loss").report(one, Sheet("transfer", tmp_path))
