"""Cuts against their bounds and against brute force; the order of samples, and their keys."""

import pickle
from itertools import combinations, pairwise

import numpy as np
import pytest

from data.index import ensure_indexed
from data.packing.order import balanced_cuts, make_order
from data.selection import Selection, select
from data.store import Store
from tests.data.shard_files import sample, write_shard


def sums(sizes: np.ndarray, cuts: np.ndarray) -> list[int]:
    return [int(sizes[a:b].sum()) for a, b in pairwise(cuts)]


@pytest.mark.parametrize("seed", range(60))
def test_parts_differ_by_no_more_than_the_largest_item(seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 80))
    sizes = rng.integers(1, [2, 10, 1000][seed % 3], count) ** (1 + seed % 2)
    if seed % 5 == 0:
        sizes[rng.integers(count)] = 10 * sizes.sum()
    parts = int(rng.integers(1, count + 1))
    cuts = balanced_cuts(np.concatenate([[0], np.cumsum(sizes)]), parts, int(sizes.max()))
    assert cuts[0] == 0 and cuts[-1] == count and len(cuts) == parts + 1 and (np.diff(cuts) >= 0).all()
    made = sums(sizes, cuts)
    assert sum(made) == sizes.sum() and max(made) - min(made) <= sizes.max()


def test_the_bound_is_what_can_be_had():
    sizes = np.array([3, 3, 3, 3])  # in three parts: one must hold two
    best = min(
        max(sums(sizes, np.array([0, *cuts, 4]))) - min(sums(sizes, np.array([0, *cuts, 4])))
        for cuts in combinations(range(1, 4), 2)
    )
    assert best == 3 == np.ptp(sums(sizes, balanced_cuts(np.arange(0, 15, 3), 3, 3)))


@pytest.fixture
def selections(tmp_path) -> tuple[list[Selection], Store]:
    store = Store(cache_folder=str(tmp_path / "cache"))
    found = []
    for name, counts in {"a": (7, 12), "b": (9,)}.items():
        shards = [
            str(write_shard(tmp_path / name / f"{i}.tar", [sample(j, f"{name}-") for j in range(count)]))
            for i, count in enumerate(counts)
        ]
        manifests = ensure_indexed(shards, store)
        found.append(select(manifests, store, "index > 1", cache_folder=str(tmp_path / "cache")))
    return found, store


def test_every_sample_has_one_place_whatever_the_order(selections, tmp_path):
    chosen, store = selections
    total = 5 + 10 + 7
    for seed in (None, 0, 1):
        order = make_order(chosen, store, seed, samples=4, cache_folder=str(tmp_path / "cache"))
        again = pickle.loads(pickle.dumps(order))
        assert order.shards == 6 and set(order.sizes()) == {3, 4}
        positions = [order.positions(shard) for shard in range(order.shards)]
        assert all(np.array_equal(again.positions(k), positions[k]) for k in range(6))
        assert sorted(np.concatenate(positions).tolist()) == list(range(total))
        assert (np.concatenate(positions).tolist() == list(range(total))) == (seed is None)
    source, within = order.locate(np.array([0, 14, 15, 21]))
    assert source.tolist() == [0, 0, 1, 1] and within.tolist() == [0, 14, 0, 6]


def test_keys_that_samples_share_are_told_apart_and_no_others_change(selections, tmp_path):
    chosen, store = selections
    order = make_order(chosen, store, 0, samples=4, cache_folder=str(tmp_path / "cache"))
    # a/0.tar and a/1.tar both have a-000002 .. a-000006; a-000007 .. and all of b's come once
    assert len(order.repeated) == 5
    new = {order.new_key("a-000003", position) for position in range(22)}
    assert len(new) == 22 and all(key.startswith("a-000003-") and len(key) == 25 for key in new)
    assert order.new_key("a-000007", 3) == "a-000007" and order.new_key("b-000003", 3) == "b-000003"
