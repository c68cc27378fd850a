"""The plan's benchmark, small: it measures every figure it promises, compares like with like, and cleans up."""

import itertools
import json

import numpy as np
import pytest

from data.compiled import compile_sizes
from tools.bench import plan as bench


@pytest.mark.slow
def test_the_benchmark_gives_every_figure_and_leaves_no_files(tmp_path):
    result = bench.run(
        rows=400_000,
        buckets=5,
        lanes=16,
        served_lanes=4,
        slice_size=8,
        other_slice_sizes=(4,),
        compared_rows=200_000,
        repeats=1,
        folder=str(tmp_path),
    )
    assert not list(tmp_path.iterdir())
    json.dumps(result)
    rank, compared = result["rank"], result["against_permutation"]
    assert rank["samples_per_s_within_epoch"] > 0 and rank["samples_per_s_over_all"] > 0
    assert rank["resident_mib"] >= rank["of_which_private_mib"] > 0
    assert set(result["first_slice"]) == {"at_step_0", "within_epoch_5", "at_the_border_of_epoch_6"}
    assert all(seconds > 0 for seconds in result["first_slice"].values())
    assert compared["plan"]["samples_per_s"] > 0 and compared["permutation"]["samples_per_s"] > 0
    assert compared["ratio_of_samples_per_s"] == pytest.approx(
        compared["plan"]["samples_per_s"] / compared["permutation"]["samples_per_s"]
    )


def test_the_permutation_is_an_honest_alternative(tmp_path):
    setting = bench._Setting(str(tmp_path), 50_000, 16, 8, 256, 16, 5, "wall")
    sizes = bench._cycle(bench._pool_of_sizes(bench._shapes(5), chunks=1), setting.rows)
    compiled = compile_sizes(sizes, setting.rows, bench._shapes(5), tmp_path, bench._name(setting.rows), setting.block)
    bucket = compiled.bucket.ravel()
    slices = list(bench._by_permutation(setting, setting.lanes))
    rows = np.concatenate([planned.rows for planned in slices])
    assert len(set(rows.tolist())) == len(rows) > setting.rows - 5 * 8 - 16 * 8
    assert all((bucket[planned.rows] == planned.bucket).all() for planned in slices)
    places = [(planned.step, planned.lane) for planned in slices]
    assert places == list(itertools.product(range(len(slices) // 16), range(16)))


def test_ranks_must_divide_the_lanes():
    with pytest.raises(ValueError, match="served_lanes 100 must divide the 1024 lanes"):
        bench.run(lanes=1024, served_lanes=100)
