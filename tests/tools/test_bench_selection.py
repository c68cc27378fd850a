"""The benchmark of selections, small."""

import json

import pytest

from tools.bench import selection


def test_both_ways_select_the_same_rows_and_are_compared(tmp_path):
    result = selection.run(rows=4000, shards=4, columns=3, repeats=1, folder=str(tmp_path))
    assert not list(tmp_path.iterdir())
    json.dumps(result)
    ours, theirs = result["select"], result["duckdb"]
    assert ours["selected"] == theirs["selected"] == pytest.approx(4000 * (0.75 * 0.99) ** 3, rel=0.1)
    for part in (ours, theirs):
        assert part["seconds"] > 0 and part["cpu_seconds"] > 0
        assert part["peak_resident_mib"] >= part["imports_alone_mib"] > 0
    assert result["ratio_of_seconds"] == pytest.approx(ours["seconds"] / theirs["seconds"])


def test_shards_must_divide_the_rows():
    with pytest.raises(ValueError, match="shards=3 must divide rows=10"):
        selection.run(rows=10, shards=3)
