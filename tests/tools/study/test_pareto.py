"""Ranks by Pareto fronts against brute force, and SD3's way of averaging them."""

import numpy as np
import pytest

from tests.tools.study.results import result
from tools.study.analyses.base import TooFewRuns
from tools.study.analyses.pareto import ParetoRanks, fronts
from tools.study.sheet import Sheet


def peeled(points: list[tuple[float, float]]) -> list[int]:
    """Fronts one at a time, by comparing every pair."""
    ranks: dict[int, int] = {}
    rank = 0
    while len(ranks) < len(points):
        rank += 1
        left = [i for i in range(len(points)) if i not in ranks]
        front = []
        for i in left:
            (a, b) = points[i]
            if not any(
                points[j][0] <= a and points[j][1] <= b and (points[j][0] < a or points[j][1] < b) for j in left
            ):
                front.append(i)
        ranks |= dict.fromkeys(front, rank)
    return [ranks[i] for i in range(len(points))]


@pytest.mark.parametrize("levels", [3, 7, 1000])
def test_fronts_are_those_of_brute_force(levels):
    rng = np.random.default_rng(levels)
    for n in (1, 2, 10, 61):
        points = rng.integers(0, levels, (n, 2)).astype(float)
        assert fronts(points).tolist() == peeled([tuple(p) for p in points])


def test_a_chain_has_a_rank_for_each_and_a_staircase_one_for_all():
    assert fronts(np.array([[3.0, 3.0], [1.0, 1.0], [2.0, 2.0]])).tolist() == [3, 1, 2]
    assert fronts(np.array([[3.0, 1.0], [1.0, 3.0], [2.0, 2.0]])).tolist() == [1, 1, 1]


def evaluated(clip: dict, fid: dict) -> list:
    """One run for each formulation and data set; its evaluation has a row for each number of steps and weights."""
    return [
        result(
            {"formulation": name, "dataset": dataset},
            {},
            settings=[
                {"steps": steps, "weights": weights, "clip": clip[name] + steps / 1000, "fid": fid[name] / steps}
                for steps in (5, 50)
                for weights in ("raw", "ema")
            ],
        )
        for name in clip
        for dataset in ("imagenet", "cc12m")
    ]


def test_ranks_are_averaged_over_all_settings(tmp_path):
    # a dominates all; b has the better score of the rest, c the better distance; d is dominated by both.
    clip, fid = {"d": 0.20, "a": 0.26, "b": 0.25, "c": 0.24}, {"d": 60.0, "a": 40.0, "b": 55.0, "c": 50.0}
    runs = evaluated(clip, fid)
    # But on one data set with 5 steps, d has the least distance of all.
    for row in next(r for r in runs if r.labels == {"formulation": "d", "dataset": "cc12m"}).settings[:2]:
        row["fid"] = 1.0
    sheet = Sheet("pareto", tmp_path)
    ParetoRanks("formulation", "clip", "fid", ["steps", "weights"], {"5 steps": {"steps": 5}}).report(runs, sheet)
    ranks = sheet.numbers["ranks"]
    assert ranks["a"] == {"all": 1.0, "5 steps": 1.0} and ranks["b"] == {"all": 2.0, "5 steps": 2.0}
    assert ranks["d"] == {"all": (6 * 3 + 2 * 1) / 8, "5 steps": (2 * 3 + 2 * 1) / 4}
    assert sheet.tables[0].rows[0] == ["a", "1.00", "1.00"]
    assert sheet.verdicts[0].startswith("Over 8 settings a ranks first of 4 with a mean of 1.00")


def test_a_variant_without_all_settings_is_left_out(tmp_path):
    runs = evaluated({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 2.0})
    del runs[-1].settings[0]
    sheet = Sheet("pareto", tmp_path)
    ParetoRanks("formulation", "clip", "fid", ["steps", "weights"]).report(runs, sheet)
    assert list(sheet.numbers["ranks"]) == ["a"]
    with pytest.raises(TooFewRuns, match="no run has been evaluated"):
        ParetoRanks("formulation", "clip", "fid", ["steps"]).report([result({"formulation": "a"}, {})], sheet)
