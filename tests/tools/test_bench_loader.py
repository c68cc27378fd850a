"""The loader benchmark, small."""

import pytest

from tools.bench import loader


@pytest.mark.parametrize("clock", ["wall", "process"])
def test_all_contestants_serve_every_sample_and_are_compared(clock):
    result = loader.run(shards=2, per_shard=10, size=64, batch=5, workers=(0, 1), repeats=2, clock=clock)
    assert result["samples"] == 20 and 30_000 < result["bytes_per_sample"] < 100_000
    for workers in (0, 1):
        part = result[f"workers_{workers}"]
        assert set(part["samples_per_s"]) == {"millrace", "webdataset", "webdataset_our_decoder"}
        assert all(len(rates) == 2 and min(rates) > 0 for rates in part["all_samples_per_s"].values())
        assert part["ratio_to_webdataset"] > 0 and part["ratio_to_webdataset_with_our_decoder"] > 0
