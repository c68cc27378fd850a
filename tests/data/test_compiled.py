"""Compiling a selection: against counting by hand, in any chunks, cached and whole or not at all."""

import multiprocessing
from itertools import pairwise
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest

from data.buckets import BucketList, Square
from data.compiled import PADDING, compile_sizes

BUCKETS = BucketList([[64, 64], [32, 128], [128, 32]])


def sizes(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(1, 3000, rows), rng.integers(1, 3000, rows)


@pytest.mark.parametrize(("rows", "block"), [(1, 1), (1, 256), (1000, 7), (1000, 10), (1024, 256), (5000, 300)])
def test_histograms_count_the_buckets_of_each_block_however_the_rows_arrive(tmp_path, rows, block):
    width, height = sizes(rows)
    rng = np.random.default_rng(1)
    for trial in range(5):
        cuts = [0, *sorted(rng.integers(0, rows + 1, trial * 3).tolist()), rows]
        chunks = [(width[a:b], height[a:b]) for a, b in pairwise(cuts)]
        compiled = compile_sizes(chunks, rows, BUCKETS, tmp_path / str(trial), "selection", block)
        expected = BUCKETS.assign(width, height)
        assert compiled.bucket.ravel()[:rows].tolist() == expected.tolist()
        assert (compiled.bucket.ravel()[rows:] == PADDING).all()
        for index in range(len(compiled.histogram)):
            part = expected[index * block : (index + 1) * block].tolist()
            assert compiled.histogram[index].tolist() == [part.count(bucket) for bucket in range(3)]
        assert compiled.totals.tolist() == [expected.tolist().count(bucket) for bucket in range(3)]


def test_a_compiled_selection_is_read_back_without_its_sizes(tmp_path):
    width, height = sizes(500)
    first = compile_sizes([(width, height)], 500, BUCKETS, tmp_path, "selection")

    def untouched():
        raise AssertionError("the sizes were read again")
        yield

    again = compile_sizes(untouched(), 500, BUCKETS, tmp_path, "selection")
    assert again.fingerprint == first.fingerprint
    assert np.array_equal(again.bucket, first.bucket) and np.array_equal(again.histogram, first.histogram)


def test_the_fingerprint_follows_rows_buckets_and_blocks(tmp_path):
    width, height = sizes(500)
    prints = {
        compile_sizes([(width, height)], 500, buckets, tmp_path, selection, block).fingerprint
        for buckets, selection, block in [
            (BUCKETS, "a", 256),
            (BUCKETS, "b", 256),
            (Square(64), "a", 256),
            (BUCKETS, "a", 64),
        ]
    }
    assert len(prints) == 4


def test_a_selection_that_is_cut_short_or_wrong_leaves_nothing_behind(tmp_path):
    width, height = sizes(500)

    def cut():
        yield width[:300], height[:300]
        raise OSError("the store went away")

    with pytest.raises(OSError, match="went away"):
        compile_sizes(cut(), 500, BUCKETS, tmp_path, "selection")
    with pytest.raises(ValueError, match="says 501 rows but gives 500"):
        compile_sizes([(width, height)], 501, BUCKETS, tmp_path, "selection")
    with pytest.raises(ValueError, match="says 499 rows but gives more"):
        compile_sizes([(width, height)], 499, BUCKETS, tmp_path, "selection")
    height[321] = 0
    with pytest.raises(ValueError, match=r"rows 300..499: row 21 of 200 has size 0x"):
        compile_sizes([(width[:300], height[:300]), (width[300:], height[300:])], 500, BUCKETS, tmp_path, "selection")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="empty"):
        compile_sizes([], 0, BUCKETS, tmp_path, "selection")


def compile_at_once(folder: Path, start: Barrier) -> None:
    width, height = sizes(20_000)
    start.wait(60)
    compiled = compile_sizes([(width, height)], 20_000, BUCKETS, folder, "selection", 16)
    assert compiled.bucket.ravel()[:20_000].tolist() == BUCKETS.assign(width, height).tolist()


def test_many_may_compile_the_same_selection_at_once(tmp_path):
    context = multiprocessing.get_context("forkserver")
    start = context.Barrier(6)
    processes = [context.Process(target=compile_at_once, args=(tmp_path, start)) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 6
    assert len(list(tmp_path.iterdir())) == 1
