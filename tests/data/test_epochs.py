"""Epochs over real tars of very unequal sizes, through the real loader: every selected key once, up to what a bucket
carries over, on any ranks and workers, from any start."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from data.buckets import BucketList
from data.plan import lanes_of
from data.records import KeysLine
from data.tars import TarData, TarSplit
from tests.data.shard_files import picture, write_tar

# Height x width of pictures, and of every how many samples one has it. Of the last there are fewer than a slice takes.
SHAPES = {"8x8": 1, "8x12": 3, "12x8": 7, "8x24": 900}
EPOCHS = 2


@dataclass
class Case:
    """Tars, and the plan of a run on them.

    Args:
        folder: of the tars.
        bucket_of: the bucket of every key that training is to see.
        lanes, slice_size: of the plan.
        options: of the data.
        where: of the source.
    """

    folder: Path
    bucket_of: dict[str, str]
    lanes: int
    slice_size: int
    options: dict
    where: str | None = None

    def open(self, split: Literal["train", "validation"] = "train") -> TarSplit:
        source = {"shards": str(self.folder), "where": self.where}
        data = TarData({"s": source}, log_keys=True, cache_folder=str(self.folder / "cache"), **self.options)
        return data.open(BucketList([[int(side) for side in shape.split("x")] for shape in SHAPES]), split)

    def served(self, steps: range, ranks: int = 1, workers: int = 0) -> list[KeysLine]:
        """What ranks are given in some steps, each rank loading on its own, in the order of (step, lane)."""
        lines: list[KeysLine] = []
        for rank in range(ranks):
            split = self.open()
            plan = split.plan(self.lanes, self.slice_size, seed=3)
            loader = split.loader(plan, lanes_of(rank, ranks, self.lanes), workers=workers)
            for step in steps:
                loader.step(step)
            lines += loader.drain().keys
            loader.close()
        return sorted(lines, key=lambda line: (line.step, line.lane))


def write_shards(folder: Path, sizes: Sequence[int]) -> tuple[dict[str, str], dict[str, str]]:
    """Shards of so many samples; gives each key's bucket and caption."""
    pictures = {shape: picture(*[int(side) for side in reversed(shape.split("x"))], "PNG") for shape in SHAPES}
    buckets, captions = {}, {}
    for shard, size in enumerate(sizes):
        members = []
        for _ in range(size):
            number = len(buckets)
            key = f"{shard}-{number:05d}"
            buckets[key] = next(shape for shape, every in reversed(SHAPES.items()) if number % every == 0)
            captions[key] = "no" if number % 9 == 8 else "yes"
            members += [(f"{key}.png", pictures[buckets[key]]), (f"{key}.txt", captions[key].encode())]
        write_tar(folder / f"{shard}.tar", members)
    return buckets, captions


@pytest.fixture(scope="module", params=["3,583 on 64 lanes", "200 on 16 lanes", "selected and held out"])
def case(request, tmp_path_factory) -> Case:
    folder = tmp_path_factory.mktemp("epochs")
    if request.param == "3,583 on 64 lanes":
        return Case(folder, write_shards(folder, [1, 7, 300, 2000, 1275])[0], 64, 5, {})
    if request.param == "200 on 16 lanes":
        return Case(folder, write_shards(folder, [1, 60, 139])[0], 16, 4, {"block": 16})
    buckets, captions = write_shards(folder, [1, 7, 300, 2000])
    case = Case(folder, {}, 8, 16, {"holdout": 0.1}, "caption = 'yes'")
    validation = case.open("validation")
    loader = validation.loader(validation.plan(1, 1, seed=0), range(1), workers=0)
    held_out = {loader.step(step)[0].keys[0] for step in range(int(validation.totals().sum()))}
    assert 150 < len(held_out) < 260 and all(captions[key] == "yes" for key in held_out)
    case.bucket_of.update({k: b for k, b in buckets.items() if captions[k] == "yes" and k not in held_out})
    return case


@pytest.fixture(scope="module")
def sequence(case) -> list[KeysLine]:
    """Two epochs and a bit on one rank, read in this process."""
    return case.served(range(EPOCHS * len(case.bucket_of) // (case.lanes * case.slice_size) + 2))


def test_every_key_once_in_an_epoch_and_what_was_carried_opens_the_next(case, sequence):
    size, totals = case.slice_size, Counter(case.bucket_of.values())
    assert any(total % size for total in totals.values())
    for line in sequence:
        assert len(line.keys) == size and {case.bucket_of[key] for key in line.keys} == {line.bucket}
    for epoch in range(1, EPOCHS + 1):
        # So many slices have been filled when every sample has been put in so many times.
        end = sum(epoch * total // size for total in totals.values())
        times = Counter(key for line in sequence[:end] for key in line.keys)
        carried = []
        for bucket, total in totals.items():
            keys = [key for key in case.bucket_of if case.bucket_of[key] == bucket]
            left = [key for key in keys if times[key] < epoch]
            if total < size:  # it fills a slice in some epochs only
                assert sum(times[key] for key in keys) == epoch * total // size * size
                assert max(times[key] for key in keys) - min(times[key] for key in keys) <= 1
                continue
            assert {times[key] for key in keys} <= {epoch - 1, epoch}
            assert len(left) == epoch * total % size
            if left:
                carried.append(bucket)
                first = next(line for line in sequence[end:] if line.bucket == bucket)
                assert set(first.keys[: len(left)]) == set(left)
        assert set(carried) <= {line.bucket for line in sequence[end : end + len(totals)]}


@pytest.mark.parametrize(("ranks", "workers"), [(4, 0), (2, 2)])
def test_any_ranks_and_workers_are_served_the_same(case, sequence, ranks, workers):
    steps = range(sequence[-1].step + 1)
    assert case.served(steps, ranks, workers) == sequence


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cold_start_anywhere_goes_on_with_the_sequence(case, sequence, workers):
    rng = random.Random(workers)
    for start in rng.sample(range(sequence[-1].step - 1), 4 if workers == 0 else 1):
        steps = range(start, start + 2)
        assert case.served(steps, rng.choice([1, 2, 8]), workers) == [x for x in sequence if x.step in steps]
