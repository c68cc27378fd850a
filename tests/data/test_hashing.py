"""The permutation against what it must be: a bijection, without structure."""

import numpy as np
import pytest

from data.hashing import permute


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 17, 1000, 65_537])
def test_every_number_comes_once_and_parts_agree_with_the_whole(count):
    whole = permute(np.arange(count), count, seed=3)
    assert np.array_equal(np.sort(whole), np.arange(count))
    part = np.arange(count // 3, count)
    assert np.array_equal(permute(part, count, seed=3), whole[part])


def test_seeds_give_unrelated_orders_without_structure():
    count = 100_000
    index = np.arange(count)
    orders = [permute(index, count, seed) for seed in range(3)]
    for order in orders:
        assert abs(np.corrcoef(index, order)[0, 1]) < 0.02
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
        assert np.count_nonzero(order == index) < 10  # about one is expected
    assert abs(np.corrcoef(orders[0], orders[1])[0, 1]) < 0.02


def test_all_orders_of_four_are_about_as_likely():
    orders = [tuple(permute(np.arange(4), 4, seed).tolist()) for seed in range(4800)]
    counts = np.array([orders.count(order) for order in set(orders)])
    assert len(counts) == 24
    assert ((counts - 200) ** 2 / 200).sum() < 49.7  # chi-squared, 23 degrees of freedom, 0.1 %


def test_billions_take_no_more_memory_than_their_part():
    assert len(np.unique(permute(np.arange(10**6), 10**12, seed=0))) == 10**6
