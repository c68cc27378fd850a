"""Turns of several sources: exact over rounds, seekable, and unlike from lane to lane."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest

from data.mixing import Mixture


@pytest.mark.parametrize(
    ("weights", "quotas"),
    [
        ([1.0], [1]),
        ([0.7, 0.3], [7, 3]),
        ([3, 1], [3, 1]),
        ([0.999, 0.001], [999, 1]),
        ([1, 1, 1], [334, 333, 333]),
        ([2.5, 2.5, 5.0], [1, 1, 2]),
        ([998.5, 0.75, 0.75], [998, 1, 1]),
    ],
)
def test_quotas_are_whole_and_in_proportion(weights, quotas):
    mixture = Mixture(weights, seed=0)
    assert mixture.quotas == quotas
    shares = np.array(quotas) / sum(quotas)
    assert np.abs(shares - np.array(weights) / sum(weights)).max() < 1.5e-3


def test_proportions_are_exact_over_every_round_of_every_lane():
    mixture = Mixture([0.5, 0.3, 0.2], seed=3)
    assert mixture.round == 10
    for lane in range(5):
        turns = list(islice(mixture.walk(0, lane), 3000))
        for start in range(0, 3000, 10):
            assert Counter(turns[start : start + 10]) == {0: 5, 1: 3, 2: 2}


def test_a_turn_is_known_without_counting_up_to_it():
    rng = np.random.default_rng(0)
    for trial in range(30):
        weights = rng.random(int(rng.integers(1, 6))) + 0.05
        mixture = Mixture(weights.tolist(), seed=trial)
        lane = int(rng.integers(0, 100))
        turns = list(islice(mixture.walk(0, lane), 2500))
        for step in rng.integers(0, 2400, 10).tolist():
            source, before = mixture.at(step, lane)
            assert source == turns[step] and before == turns[:step].count(source)
            assert mixture.turns_before(step, lane) == [turns[:step].count(i) for i in range(len(weights))]
            assert list(islice(mixture.walk(step, lane), 50)) == turns[step : step + 50]


def test_lanes_rounds_and_seeds_have_orders_of_their_own():
    orders = {
        (seed, lane, start): tuple(islice(Mixture([1, 1], seed, resolution=1000).walk(start, lane), 40))
        for seed in range(3)
        for lane in range(3)
        for start in (0, 40)
    }
    assert len(set(orders.values())) == len(orders)


def test_wrong_weights_are_named():
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="of source 1 must be positive and finite"):
            Mixture([1.0, weight], seed=0)
    with pytest.raises(ValueError, match=r"source 1 is 0\.0001 of the whole: less than one turn in 1000 steps"):
        Mixture([0.9999, 0.0001], seed=0)
    with pytest.raises(ValueError, match="at least one source"):
        Mixture([], seed=0)
