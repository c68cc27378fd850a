"""Orders of labels, against scipy's paired test and draws whose truth is known."""

import numpy as np
import pytest
from scipy import stats

from tests.tools.study.results import result
from tools.study.analyses.base import TooFewRuns
from tools.study.analyses.ordering import Ordering, paired_interval
from tools.study.sheet import Sheet

CHANNELS = Ordering("channels", "psnr", ["c4", "c8", "c16"])


def runs(means: dict[str, float], seeds: int = 5, noise: float = 0.1, shared: float = 5.0) -> list:
    """Runs of which each seed shifts all labels alike, by far more than they differ."""
    rng = np.random.default_rng(0)
    shifts = rng.normal(0, shared, seeds)
    return [
        result({"channels": label}, {"psnr": mean + shifts[seed] + rng.normal(0, noise)}, seed)
        for label, mean in means.items()
        for seed in range(seeds)
    ]


def told(results, tmp_path, analysis=CHANNELS) -> Sheet:
    sheet = Sheet("order", tmp_path)
    analysis.report(results, sheet)
    return sheet


def test_an_order_holds_though_seeds_shift_runs_by_more_than_labels_do(tmp_path):
    sheet = told(runs({"c4": 20, "c8": 21, "c16": 22}), tmp_path)
    assert "c4 < c8 < c16 holds at this size" in sheet.verdicts[0] and "5 pairs" in sheet.verdicts[0]
    assert [step["state"] for step in sheet.numbers["steps"]] == ["holds", "holds"]
    assert sheet.numbers["steps"][0]["mean"] == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize(
    ("means", "noise", "says", "states"),
    [
        ({"c4": 20, "c8": 21, "c16": 20.5}, 0.05, "does not hold", ["holds", "reversed"]),
        ({"c4": 20, "c8": 21, "c16": 21.01}, 0.2, "is not shown to hold", ["holds", "open"]),
    ],
)
def test_an_order_that_is_wrong_or_open_is_said_to_be(tmp_path, means, noise, says, states):
    sheet = told(runs(means, noise=noise), tmp_path)
    assert f"c4 < c8 < c16 {says}" in sheet.verdicts[0]
    assert [step["state"] for step in sheet.numbers["steps"]] == states


def test_the_interval_is_that_of_the_paired_t_test_shared_among_the_steps(tmp_path):
    results = runs({"c4": 20, "c8": 20.2, "c16": 22})
    sheet = told(results, tmp_path)
    low, high = ([r.values["psnr"] for r in results if r.labels["channels"] == label] for label in ("c4", "c8"))
    expected = stats.ttest_rel(high, low).confidence_interval(0.975)
    np.testing.assert_allclose(sheet.numbers["steps"][0]["interval"], [expected.low, expected.high], rtol=1e-9)


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(1)
    inside = sum(
        low <= 0.3 <= high for _, low, high in (paired_interval(rng.normal(0.3, 1, 6), 0.9) for _ in range(2000))
    )
    assert stats.binom.ppf(0.001, 2000, 0.9) <= inside <= stats.binom.ppf(0.999, 2000, 0.9)


def test_only_runs_with_the_same_seed_and_place_are_held_against_each_other(tmp_path):
    values = {"c4": {0: 1.0, 1: 2.0, 2: 3.0, 3: 50.0}, "c8": {0: 1.5, 1: 2.6, 2: 3.4, 7: -50.0}}
    results = [
        result({"channels": label, "data": "d"}, {"psnr": v}, seed)
        for label, of in values.items()
        for seed, v in of.items()
    ]
    sheet = told(results, tmp_path, Ordering("channels", "psnr", ["c4", "c8"]))
    assert sheet.numbers["steps"][0]["mean"] == pytest.approx(0.5)
    with pytest.raises(TooFewRuns, match="2 pairs of runs of c4 and c8 have psnr; an interval takes 3"):
        told([r for r in results if r.seed != 2], tmp_path, Ordering("channels", "psnr", ["c4", "c8"]))


def test_names_that_there_are_not_are_refused():
    axes = {"channels": ["c4", "c8", "c16"]}
    CHANNELS.check(axes, ["psnr"])
    for analysis, says in (
        (Ordering("width", "psnr", ["a", "b"]), "axis 'width'"),
        (Ordering("channels", "psnr", ["c4", "c5"]), "label of channels 'c5'"),
        (Ordering("channels", "fid", ["c4", "c8"]), "column 'fid'"),
    ):
        with pytest.raises(ValueError, match=says):
            analysis.check(axes, ["psnr"])
    with pytest.raises(ValueError, match="at least two labels, each once"):
        Ordering("channels", "psnr", ["c4", "c4"])
