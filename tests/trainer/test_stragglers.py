"""The rank that the others wait for is named in the metrics, with how much slower it is."""

import time
from collections.abc import Sequence
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests.trainer.jobs import train_on
from tests.trainer.ranks import ranks
from tools.demo.scenes import write_tars
from trainer import stragglers
from trainer.distributed import collectives
from trainer.stragglers import Stragglers

# When ranks enter four collectives, in seconds: rank 1 takes 3 s for each, rank 0 but 1 s from when the last was left.
ENTERED = ([100.0, 101.0, 104.0, 107.0], [100.0, 103.0, 106.0, 109.0])


def row_of(entered: Sequence[Sequence[float]], clocks: Sequence[float]) -> dict:
    """On each rank: the row where collectives were entered at these moments, as told by clocks that are so far off."""
    rank = dist.get_rank()
    times = [moment + clocks[rank] for moment in entered[rank]]
    with (
        mock.patch.object(stragglers, "_entered", lambda count: times),
        mock.patch.object(stragglers.time, "time", lambda: 120.0 + clocks[rank]),
    ):
        return Stragglers(torch.device("cpu")).row()


@pytest.mark.parametrize("clocks", [(0.0, 0.0), (3600.0, -50.0)])
def test_the_slow_rank_is_named_whatever_clocks_say(clocks):
    # Of two ranks, the median is halfway between them: 9 s by 6 s.
    expected = {"slowest_rank": 1, "slowest_over_median": pytest.approx(1.5)}
    assert ranks(2).run(row_of, ENTERED, clocks) == [expected, expected]
    expected["slowest_rank"] = 0
    assert ranks(2).run(row_of, ENTERED[::-1], clocks) == [expected, expected]


def test_a_rank_whose_record_begins_later_is_compared_over_what_both_have():
    expected = {"slowest_rank": 1, "slowest_over_median": pytest.approx(1.5)}
    assert ranks(2).run(row_of, (ENTERED[0], ENTERED[1][1:]), (0.0, 0.0)) == [expected, expected]


def test_ranks_of_one_pace_are_as_slow():
    even = ENTERED[0], ENTERED[0]
    assert [row["slowest_over_median"] for row in ranks(2).run(row_of, even, (0.0, 7.0))] == [pytest.approx(1.0)] * 2


def entered_between() -> tuple[float, list[float], float]:
    """What torch has noted of three collectives, and the moments before and after them."""
    before, count = time.time(), collectives()
    for _ in range(3):
        dist.barrier()
    return before, stragglers._entered(collectives() - count), time.time()


def test_torch_notes_when_each_collective_was_entered():
    for before, entered, after in ranks(2).run(entered_between):
        assert len(entered) == 3
        assert sorted([before, *entered, after]) == [before, *entered, after]


def test_the_metrics_of_two_ranks_tell(tmp_path):
    write_tars(tmp_path / "scenes", 24, seed=0)
    rows = train_on(2, tmp_path, f"data.sources.scenes.shards={tmp_path}/scenes", "name=pair")
    assert all(row["slowest_rank"] in (0, 1) and 1 <= row["slowest_over_median"] <= 2 for row in rows)


def test_one_rank_waits_for_nobody(tmp_path):
    write_tars(tmp_path / "scenes", 24, seed=0)
    rows = train_on(1, tmp_path, f"data.sources.scenes.shards={tmp_path}/scenes", "name=alone")
    assert all("slowest_rank" not in row for row in rows)
