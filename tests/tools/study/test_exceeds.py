"""Two numbers of each run, against scipy's paired test."""

import numpy as np
import pytest
from scipy import stats

from tests.tools.study.results import result
from tools.study.analyses.base import TooFewRuns
from tools.study.analyses.exceeds import Exceeds
from tools.study.sheet import Sheet

SWAP = Exceeds("swapped", "named", {"k": ["k1", "k4"]})


def runs(gain: float, noise: float = 0.02) -> list:
    rng = np.random.default_rng(0)
    found = []
    for k in ("k0", "k1", "k4"):
        for seed in range(4):
            named = float(rng.uniform(0.2, 0.8))
            own = {"named": named, "swapped": named + (gain + rng.normal(0, noise) if k != "k0" else -5)}
            found.append(result({"k": k}, own, seed))
    return found


@pytest.mark.parametrize(("gain", "state"), [(0.1, "holds"), (-0.1, "does not hold"), (0.001, "is not shown to hold")])
def test_the_interval_is_that_of_the_paired_t_test_over_the_runs_that_count(tmp_path, gain, state):
    results, sheet = runs(gain), Sheet("swap", tmp_path)
    SWAP.report(results, sheet)
    counted = [r for r in results if r.labels["k"] != "k0"]
    test = stats.ttest_rel([r.values["swapped"] for r in counted], [r.values["named"] for r in counted])
    expected = test.confidence_interval(0.95)
    np.testing.assert_allclose(sheet.numbers["interval"], [expected.low, expected.high], rtol=1e-9)
    assert sheet.numbers["state"] == state
    assert f"swapped exceeds named {state} at this size" in sheet.verdicts[0] and "over 8 runs" in sheet.verdicts[0]


def test_too_few_runs_and_names_that_there_are_not_are_refused(tmp_path):
    with pytest.raises(TooFewRuns, match="2 runs have both swapped and named; an interval takes 3"):
        SWAP.report([r for r in runs(0.1) if r.seed == 0], Sheet("swap", tmp_path))
    axes = {"k": ["k0", "k1", "k4"]}
    SWAP.check(axes, ["swapped", "named"])
    for analysis, says in (
        (Exceeds("swapped", "asked"), "column 'asked'"),
        (Exceeds("swapped", "named", {"kk": ["k1"]}), "axis 'kk'"),
        (Exceeds("swapped", "named", {"k": ["k2"]}), "label of k 'k2'"),
    ):
        with pytest.raises(ValueError, match=says):
            analysis.check(axes, ["swapped", "named"])
