"""The plan by brute force: every row once per epoch, leftovers first, any start like the sequence, any ranks alike."""

import hashlib
import logging
import tempfile
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from data.batch import PlannedSlice
from data.buckets import BucketList
from data.compiled import Compiled, compile_sizes
from data.plan import Plan, PlanSegments, PlanSource, lanes_of, split_batch, valid_world_sizes


def compiled_of(heights: np.ndarray, shapes: BucketList, name: str, block: int) -> Compiled:
    """Images 64 wide and of these heights. The maps outlive the files' names."""
    with tempfile.TemporaryDirectory() as folder:
        return compile_sizes([(np.full(len(heights), 64), heights)], len(heights), shapes, folder, name, block)


def skewed(rows: int, buckets: int, block: int, seed: int = 0, runs: int = 1) -> Compiled:
    """A selection whose buckets are unequally common, in runs of the same bucket as sorted shards have them."""
    rng = np.random.default_rng(seed)
    heights = np.arange(buckets) * 8 + 8
    common = rng.permutation(1 / np.arange(1, buckets + 1) ** 1.3)
    chosen = rng.choice(buckets, size=-(-rows // runs), p=common / common.sum()).repeat(runs)[:rows]
    shapes = BucketList([[int(height), 64] for height in heights])
    return compiled_of(heights[chosen], shapes, f"{rows} {seed} {runs}", block)


def configurations(count: int, seed: int) -> list[tuple[Compiled, Plan, np.random.Generator]]:
    rng = np.random.default_rng(seed)
    made = []
    for trial in range(count):
        compiled = skewed(
            rows=int(rng.choice([1, 7, 100, 1000, 5000])) + int(rng.integers(0, 20)),
            buckets=int(rng.choice([1, 2, 5, 40])),
            block=int(rng.choice([1, 5, 32, 256])),
            seed=trial,
            runs=int(rng.choice([1, 50])),
        )
        lanes, size, window = int(rng.choice([1, 3, 16, 64])), int(rng.choice([1, 2, 7, 33])), int(rng.integers(1, 20))
        made.append((compiled, Plan([PlanSource("only", compiled)], lanes, size, seed=trial, window=window), rng))
    return made


def served(plan: Plan, steps: int, start: int = 0) -> list[PlannedSlice]:
    return list(islice(plan.iterate(start, range(plan.lanes)), steps * plan.lanes))


def same(a: PlannedSlice, b: PlannedSlice) -> bool:
    place = (a.step, a.lane, a.source, a.bucket) == (b.step, b.lane, b.source, b.bucket)
    return place and a.rows.dtype == b.rows.dtype == np.int64 and np.array_equal(a.rows, b.rows)


def steps_for(plan: Plan, epochs: float) -> int:
    return int(epochs * plan.steps_per_epoch) + 2


def check_epochs(compiled: Compiled, plan: Plan, slices: list[PlannedSlice]) -> int:
    """Count the rows and hold them against queues that are never reset: after each epoch, e times N_b rows of a bucket
    have been put in and whole slices of m taken out. Returns how many epochs were whole."""
    size, totals = plan.slice_size, compiled.totals
    bucket_of = compiled.bucket.ravel()[: compiled.rows]
    for planned in slices:
        assert planned.rows.shape == (size,)
        assert (bucket_of[planned.rows] == planned.bucket).all(), "a slice has one bucket"
    ends = [0]
    while ends[-1] <= len(slices):
        ends.append(sum(len(ends) * int(total) // size for total in totals))
        if len(ends) > 400:  # a handful of rows: enough seen
            break
    for epoch in range(1, len(ends) - 1):
        times = np.bincount(
            np.array([planned.rows for planned in slices[: ends[epoch]]], dtype=np.int64).ravel(),
            minlength=compiled.rows,
        )
        waiting = epoch * totals % size
        assert (waiting < size).all()
        left = Counter(bucket_of[times < epoch].tolist())
        rare = totals < size
        for bucket in np.flatnonzero(~rare & (totals > 0)).tolist():
            mine = times[bucket_of == bucket]
            assert set(mine.tolist()) <= {epoch, epoch - 1}, "every row once an epoch, but for the carry"
            assert left[bucket] == waiting[bucket]
        for bucket in np.flatnonzero(rare & (totals > 0)).tolist():
            mine = times[bucket_of == bucket]
            assert mine.sum() == epoch * totals[bucket] - waiting[bucket]
            assert mine.max() - mine.min() <= 1, "no row is ahead of another by more than one"
        # The next epoch's first slices are those that hold what was carried.
        carried = [
            bucket for bucket in range(len(totals)) if waiting[bucket] and waiting[bucket] + totals[bucket] >= size
        ]
        opening = slices[ends[epoch] : ends[epoch] + len(carried)]
        if len(opening) == len(carried):
            assert sorted(planned.bucket for planned in opening) == carried
            for planned in opening:
                if not rare[planned.bucket]:
                    behind = np.flatnonzero((times < epoch) & (bucket_of == planned.bucket)).tolist()
                    ahead = planned.rows[: waiting[planned.bucket]].tolist()
                    assert sorted(ahead) == behind, "what was carried comes first, and all of it"
    return len(ends) - 2


def test_every_row_once_per_epoch_and_what_was_carried_first():
    whole = 0
    for compiled, plan, _ in configurations(60, seed=1):
        whole += check_epochs(compiled, plan, served(plan, min(steps_for(plan, 3.2), 400)))
    assert whole > 150


@pytest.mark.parametrize(
    ("rows", "lanes", "size", "buckets"),
    [(3583, 64, 2, 40), (3583, 64, 4, 40), (200, 16, 4, 3), (200, 16, 16, 5), (5, 8, 4, 2), (4096 * 3, 8, 8, 4)],
)
def test_small_sets_lose_at_most_what_does_not_fill_a_slice(rows, lanes, size, buckets):
    compiled = skewed(rows, buckets, block=256)
    plan = Plan([PlanSource("only", compiled)], lanes, size, seed=3)
    slices = served(plan, steps_for(plan, 4))
    assert check_epochs(compiled, plan, slices) >= 3
    first = sum(int(total) // size for total in compiled.totals)
    seen = np.array([planned.rows for planned in slices[:first]]).ravel()
    assert len(seen) == len(set(seen.tolist())) >= rows - buckets * (size - 1)
    for planned in slices[:: max(1, len(slices) // 50)]:
        assert same(plan.slice(planned.step, planned.lane), planned)


def test_a_cold_start_anywhere_is_the_sequence():
    for compiled, plan, rng in configurations(40, seed=2):
        steps = min(steps_for(plan, 3.2), 300)
        slices = served(plan, steps)
        for place in {0, len(slices) - 1, *rng.integers(0, len(slices), 10).tolist()}:
            fresh = Plan(plan.sources, plan.lanes, plan.slice_size, plan.seed, plan.window)
            assert same(fresh.slice(*divmod(place, plan.lanes)), slices[place])
        for start in rng.integers(0, steps, 3).tolist():
            fresh = Plan(plan.sources, plan.lanes, plan.slice_size, plan.seed, plan.window)
            resumed = islice(fresh.iterate(start, range(plan.lanes)), 4 * plan.lanes)
            assert all(same(a, b) for a, b in zip(resumed, slices[start * plan.lanes :], strict=False))
        assert compiled.rows


def test_every_slice_of_several_epochs_at_random_is_the_sequence():
    compiled = skewed(3000, 7, block=16)
    plan = Plan([PlanSource("only", compiled)], lanes=4, slice_size=9, seed=0, window=5)
    slices = served(plan, steps_for(plan, 4))
    for place in np.random.default_rng(0).permutation(len(slices)).tolist():
        assert same(plan.slice(*divmod(place, 4)), slices[place])


def test_a_far_epoch_is_reached_directly():
    compiled = skewed(1000, 5, block=16)
    plan = Plan([PlanSource("only", compiled)], lanes=4, slice_size=9, seed=0)
    step = int(1_000_000 * plan.steps_per_epoch)
    assert plan.epoch_of(step) in (999_999, 1_000_000)
    slices = served(plan, steps_for(plan, 2), start=step)
    assert same(plan.slice(step + 3, 2), slices[14])
    whole = next(i for i in range(len(slices)) if plan._streams[0].first_slot(1_000_001) == step * 4 + i)
    epoch = slices[whole : whole + plan._streams[0].first_slot(1_000_002) - plan._streams[0].first_slot(1_000_001)]
    times = np.bincount(np.concatenate([planned.rows for planned in epoch]), minlength=1000)
    assert abs(times.sum() - 1000) <= 5 * 9 and times.max() <= 2


def test_ranks_share_the_lanes_of_the_same_plan():
    compiled = skewed(2000, 6, block=32)
    sources = [PlanSource("a", compiled, 0.7), PlanSource("b", skewed(300, 6, block=32, seed=5), 0.3)]
    whole = served(Plan(sources, lanes=12, slice_size=5, seed=8), 90)
    for world in valid_world_sizes(12):
        together = {}
        for rank in range(world):
            lanes = lanes_of(rank, world, 12)
            plan = Plan(sources, lanes=12, slice_size=5, seed=8)
            for planned in islice(plan.iterate(0, lanes), 90 * len(lanes)):
                together[planned.step, planned.lane] = planned
        assert len(together) == len(whole)
        assert all(same(together[planned.step, planned.lane], planned) for planned in whole)


def test_a_lane_reads_few_blocks_for_each_slice_of_its_epoch():
    rows, block, window, lanes = 200_000, 64, 8, 16
    compiled = skewed(rows, 3, block)
    plan = Plan([PlanSource("only", compiled)], lanes, slice_size=8, seed=0, window=window)
    steps = int(plan.steps_per_epoch) - 1
    for lane in (0, 7, 15):
        slices = list(islice(plan.iterate(0, range(lane, lane + 1)), steps))
        blocks = set((np.concatenate([planned.rows for planned in slices]) // block).tolist())
        fair = rows / block / lanes
        assert fair * 0.9 < len(blocks) < fair + 3 * window, "a lane reads its own windows, whole"
        assert all(len(set((planned.rows // block).tolist())) > 1 for planned in slices), "a slice mixes blocks"


def test_epochs_lanes_and_seeds_differ_in_order():
    compiled = skewed(5000, 1, block=16)
    orders = {}
    for seed in (0, 1):
        plan = Plan([PlanSource("only", compiled)], lanes=5, slice_size=10, seed=seed)
        slices = served(plan, 200)
        for epoch in (0, 1):
            orders[seed, epoch] = np.concatenate([planned.rows for planned in slices[epoch * 500 : epoch * 500 + 500]])
    for order in orders.values():
        assert sorted(order.tolist()) == list(range(5000))
        # A shuffled order has no memory of the rows' own: the rank correlation is of the order of 1 / sqrt(rows).
        assert abs(np.corrcoef(order, np.arange(5000))[0, 1]) < 0.1
    pairs = [np.corrcoef(a, b)[0, 1] for i, a in enumerate(orders.values()) for b in list(orders.values())[:i]]
    assert max(map(abs, pairs)) < 0.1


def test_where_rows_lie_in_shards_does_not_matter_to_counts():
    # Shards of 1 to 2,000 rows: the plan knows only consecutive rows, so blocks cross shard borders.
    rng = np.random.default_rng(4)
    shard_rows = rng.integers(1, 2000, 12)
    shard_rows[:4] = 1
    shard_of = np.repeat(np.arange(12), shard_rows)
    compiled = skewed(len(shard_of), 4, block=128)
    plan = Plan([PlanSource("only", compiled)], lanes=8, slice_size=4, seed=0)
    slices = served(plan, steps_for(plan, 1))
    first = sum(int(total) // 4 for total in compiled.totals)
    seen = shard_of[np.concatenate([planned.rows for planned in slices[:first]])]
    lost = shard_rows - np.bincount(seen, minlength=12)
    assert (lost >= 0).all() and lost.sum() < 4 * 4


def test_sources_are_served_in_proportion_each_with_its_own_epochs():
    sizes = {"large": 3000, "small": 130, "tiny": 9}
    compiled = {name: skewed(rows, 3, block=16, seed=rows) for name, rows in sizes.items()}
    weights = {"large": 6.0, "small": 3.0, "tiny": 1.0}
    sources = [PlanSource(name, compiled[name], weights[name]) for name in sizes]
    plan = Plan(sources, lanes=6, slice_size=4, seed=2)
    slices = served(plan, 500)
    assert Counter(planned.source for planned in slices) == {0: 1800, 1: 900, 2: 300}
    for index, name in enumerate(sizes):
        mine = sorted((planned for planned in slices if planned.source == index), key=lambda p: (p.step, p.lane))
        turns: Counter[int] = Counter()
        own = {}
        for planned in mine:
            own[turns[planned.lane] * 6 + planned.lane] = planned
            turns[planned.lane] += 1
        # Whatever the mixture, the source's own slots are those that it would serve alone.
        assert sorted(own) == list(range(len(own)))
        check_epochs(compiled[name], plan, [own[slot] for slot in range(len(own))])
    for place in np.random.default_rng(0).integers(0, len(slices), 100).tolist():
        assert same(plan.slice(*divmod(place, 6)), slices[place])
    resumed = islice(plan.iterate(333, range(2, 5)), 60)
    expected = [planned for planned in slices[333 * 6 :] if planned.lane in range(2, 5)]
    assert all(same(a, b) for a, b in zip(resumed, expected, strict=False))


def test_another_source_leaves_the_order_of_the_first_alone():
    a, b = PlanSource("a", skewed(500, 2, block=16)), PlanSource("b", skewed(400, 2, block=16, seed=1))
    alone = served(Plan([a], lanes=2, slice_size=4, seed=0), 50)
    mixed = [planned for planned in served(Plan([b, a], lanes=2, slice_size=4, seed=0), 100) if planned.lane == 0]
    mine = [planned for planned in mixed if planned.source == 1]
    assert len(mine) == 50
    assert all(
        np.array_equal(x.rows, y.rows)
        for x, y in zip(mine, [planned for planned in alone if planned.lane == 0], strict=True)
    )


def test_the_plan_is_the_same_for_ever():
    """Pinned: a change of these numbers breaks the resuming of every run under way."""
    sources = [
        PlanSource("photos", skewed_by_hand(1500, 4, block=64), 0.75),
        PlanSource("drawings", skewed_by_hand(333, 4, block=64), 0.25),
    ]
    plan = Plan(sources, lanes=8, slice_size=6, seed=1234, window=4)
    digest = hashlib.sha256()
    for planned in served(plan, 150):
        digest.update(np.array([planned.source, planned.bucket, *planned.rows], dtype="<i8").tobytes())
    assert digest.hexdigest() == GOLDEN
    assert plan.epoch_of(149, 0) >= 3 and plan.epoch_of(149, 1) >= 4


GOLDEN = "9f6ce67610b6b84aa548a404da511b5d2dbcc9d30c647eaac995c3b8c973c08b"


def skewed_by_hand(rows: int, buckets: int, block: int) -> Compiled:
    """Like `skewed`, without a generator whose numbers may change."""
    index = np.arange(rows)
    chosen = np.minimum((index * 7919 % 101) // 17, buckets - 1)
    heights = np.arange(buckets) * 8 + 8
    shapes = BucketList([[int(height), 64] for height in heights])
    return compiled_of(heights[chosen], shapes, str(rows), block)


def test_a_bucket_smaller_than_a_slice_is_announced_and_served(caplog):
    heights = np.array([8] * 50 + [16] * 3)
    compiled = compiled_of(heights, BucketList([[8, 64], [16, 64], [24, 64]]), "x", 4)
    with caplog.at_level(logging.WARNING):
        plan = Plan([PlanSource("photos", compiled)], lanes=2, slice_size=7, seed=0)
    (message,) = caplog.messages
    assert "'photos' has 3 samples in bucket 16x64, fewer than a slice of 7" in message and "2.3 epochs" in message
    slices = [planned for planned in served(plan, 60) if planned.bucket == 1]
    times = np.bincount(np.concatenate([planned.rows for planned in slices]))[50:]
    assert len(slices) > 5 and times.max() - times.min() <= 1
    stream = np.concatenate([planned.rows for planned in slices])
    epochs = [tuple(stream[i : i + 3]) for i in range(0, len(stream) - 2, 3)]
    assert all(sorted(epoch) == [50, 51, 52] for epoch in epochs)
    assert len(set(epochs)) > 1, "another order in another epoch"


def test_epoch_of_a_step_and_steps_of_an_epoch():
    compiled = skewed(1000, 1, block=16)
    plan = Plan([PlanSource("only", compiled)], lanes=5, slice_size=4, seed=0)
    assert plan.global_batch == 20 and plan.steps_per_epoch == 50
    assert [plan.epoch_of(step) for step in (0, 49, 50, 99, 100)] == [0, 0, 1, 1, 2]


def test_the_fingerprint_follows_every_ingredient():
    a, b = skewed(100, 3, block=16), skewed(100, 3, block=16, seed=1)
    variants = [
        Plan([PlanSource("a", a)], 4, 2, seed=0),
        Plan([PlanSource("b", a)], 4, 2, seed=0),
        Plan([PlanSource("a", b)], 4, 2, seed=0),
        Plan([PlanSource("a", skewed(100, 3, block=8))], 4, 2, seed=0),
        Plan([PlanSource("a", a)], 2, 2, seed=0),
        Plan([PlanSource("a", a)], 4, 4, seed=0),
        Plan([PlanSource("a", a)], 4, 2, seed=1),
        Plan([PlanSource("a", a)], 4, 2, seed=0, window=3),
        Plan([PlanSource("a", a)], 4, 2, seed=0, start=7),
        Plan([PlanSource("a", a), PlanSource("b", b)], 4, 2, seed=0),
        Plan([PlanSource("b", b), PlanSource("a", a)], 4, 2, seed=0),
        Plan([PlanSource("a", a), PlanSource("b", b, 2.0)], 4, 2, seed=0),
    ]
    assert len({plan.fingerprint for plan in variants}) == len(variants)
    again = Plan([PlanSource("a", a, 5.0)], 4, 2, seed=0)
    assert again.fingerprint == variants[0].fingerprint, "the unit of a weight does not matter"


def test_a_run_goes_on_with_its_plan_or_says_what_differs():
    compiled = skewed(300, 2, block=16)

    def build(lanes: int, seed: int = 0):
        return lambda start: Plan([PlanSource("photos", compiled)], lanes, 4, seed, start=start)

    begun = PlanSegments.begin(build(4))
    resumed = PlanSegments.resume(begun.record, 30, build(4))
    assert resumed.history == begun.history
    assert same(resumed.plan.slice(30, 1), begun.plan.slice(30, 1))
    with pytest.raises(ValueError, match=r"lanes: 4 -> 2; seed: 0 -> 9\).*data.replan=true.*from step 30 on"):
        PlanSegments.resume(begun.record, 30, build(2, seed=9))

    other = PlanSegments.resume(begun.record, 30, build(2), replan=True)
    assert [segment.start for segment in other.history] == [0, 30]
    assert other.plan.lanes == 2 and other.plan.epoch_of(30) == 0
    assert next(other.plan.iterate(30, range(2))).step == 30
    with pytest.raises(ValueError, match="step 29 is before this plan, which begins at step 30"):
        other.plan.slice(29, 0)
    later = PlanSegments.resume(other.record, 50, build(2))
    assert later.history == other.history
    assert same(later.plan.slice(50, 1), other.plan.slice(50, 1))


def test_lanes_batches_and_worlds_must_divide():
    assert split_batch(256) == (64, 4) and split_batch(96) == (48, 2) and split_batch(7) == (7, 1)
    assert split_batch(134) == (2, 67) and split_batch(256, 16) == (16, 16)
    with pytest.raises(
        ValueError, match=r"5 lanes do not divide the global batch 12: choose among \[1, 2, 3, 4, 6, 12\]"
    ):
        split_batch(12, 5)
    assert valid_world_sizes(12) == [1, 2, 3, 4, 6, 12]
    assert [lanes_of(rank, 3, 12) for rank in range(3)] == [range(0, 4), range(4, 8), range(8, 12)]
    with pytest.raises(
        ValueError, match=r"8 data-parallel ranks do not divide the run's 12 lanes: use \[1, 2, 3, 4, 6"
    ):
        lanes_of(0, 8, 12)


def test_wrong_plans_are_named():
    compiled = skewed(20, 2, block=4)
    with pytest.raises(ValueError, match="lanes 0 must be positive"):
        Plan([PlanSource("a", compiled)], 0, 2, seed=0)
    with pytest.raises(ValueError, match="at least one source"):
        Plan([], 1, 2, seed=0)
    with pytest.raises(ValueError, match="names of sources must differ"):
        Plan([PlanSource("a", compiled), PlanSource("a", compiled)], 1, 2, seed=0)
    with pytest.raises(ValueError, match="'b' was compiled with other buckets than 'a'"):
        Plan([PlanSource("a", compiled), PlanSource("b", skewed(20, 3, block=4))], 1, 2, seed=0)
    plan = Plan([PlanSource("a", compiled)], 4, 2, seed=0)
    for lanes in (range(3, 5), range(-1, 2), range(0)):
        with pytest.raises(ValueError, match="not within the plan's 4 lanes"):
            plan.iterate(0, lanes)
    with pytest.raises(ValueError, match="step -1 is before this plan"):
        plan.slice(-1, 0)
