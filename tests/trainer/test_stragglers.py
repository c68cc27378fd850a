"""The rank that the others wait for is named in the metrics, with how much slower it is."""

import pytest

from tests.trainer.jobs import train_on
from tools.demo.scenes import write_tars

SLOW = ["objective._target_=tests.trainer.faulty.Slow", "log.every=4", "steps=8"]


def test_the_slow_rank_is_named(tmp_path):
    write_tars(tmp_path / "scenes", 24, seed=0)
    data = f"data.sources.scenes.shards={tmp_path}/scenes"
    for lane, rank in ((3, 1), (0, 0)):  # a rank serves two of the four lanes
        slow = [*SLOW, "+objective.seconds=0.6", f"+objective.lane={lane}"]
        *_, row = train_on(2, tmp_path, data, f"name=slow_{lane}", *slow)
        assert row["slowest_rank"] == rank
        assert 1.2 < row["slowest_over_median"] <= 2.0  # of two ranks, the median is halfway between them


def test_one_rank_waits_for_nobody(tmp_path):
    write_tars(tmp_path / "scenes", 24, seed=0)
    rows = train_on(1, tmp_path, f"data.sources.scenes.shards={tmp_path}/scenes", "name=alone")
    assert all("slowest_rank" not in row for row in rows)


def test_ranks_of_one_pace_are_about_as_slow(tmp_path):
    write_tars(tmp_path / "scenes", 24, seed=0)
    data = f"data.sources.scenes.shards={tmp_path}/scenes"
    *_, row = train_on(2, tmp_path, data, "name=even", *SLOW, "+objective.seconds=0.3")
    assert row["slowest_over_median"] == pytest.approx(1.0, abs=0.2)
