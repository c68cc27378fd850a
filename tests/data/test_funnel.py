"""The funnel against numpy over all rows at once."""

import numpy as np
import pyarrow as pa
import pytest
from shard_files import picture, write_tar

from data.funnel import funnel
from data.index import ensure_indexed
from data.scores import write_scores
from data.store import Store
from data.where import Where


def test_a_clause_falls_into_the_conditions_that_all_must_hold():
    clause = Where("(a > quantile(0.25) and (b < 3 or c = 'and')) and d between 1 and 2 and not e")
    assert [part.text for part in clause.conjuncts()] == [
        "a > quantile(0.25)",
        "((b < 3) OR (c = 'and'))",
        "d BETWEEN 1 AND 2",
        "NOT e",
    ]
    assert [part.text for part in Where("a > 1 or b > 2").conjuncts()] == ["(a > 1) OR (b > 2)"]


@pytest.mark.parametrize(
    ("text", "values", "expected"),
    [
        ("A > 0.5", [], ("a", 0.5)),
        ("2 * 3 >= a", [], ("a", 6.0)),
        ("a < quantile(0.1)", [7.5], ("a", 7.5)),
        ("a < quantile(0.1)", [None], None),
        ("a = 1", [], None),
        ("a > b", [], None),
        ("a > 'x'", [], None),
        ("a + 1 > 2", [], None),
        ("a is null", [], None),
    ],
)
def test_the_threshold_is_what_one_column_is_compared_with(text, values, expected):
    assert Where(text).threshold(values) == expected


def test_the_funnel_counts_alone_and_in_sequence(tmp_path, monkeypatch):
    monkeypatch.setattr("data.scan.CHUNK_ROWS", 25)
    rng = np.random.default_rng(0)
    for shard, size in enumerate((30, 1, 40)):
        write_tar(tmp_path / f"{shard}.tar", [(f"{shard}-{i}.png", picture(9, 9, "PNG")) for i in range(size)])
    store = Store()
    manifests = ensure_indexed(store.expand(str(tmp_path)), store)
    a, b = rng.normal(size=71), np.round(rng.normal(size=71), 1)
    a[::9] = np.nan
    start = 0
    for manifest in manifests:
        part = slice(start, start + manifest.rows)
        write_scores(manifest, "scores", pa.table({"a": pa.array(a[part], from_pandas=True), "b": b[part]}), store)
        start += manifest.rows
    made = funnel(manifests, store, "a > quantile(0.25) and b < 0.5 and (a > 0 or b > 0)", near=4)
    threshold = np.sort(a[~np.isnan(a)])[int(np.ceil(0.25 * (~np.isnan(a)).sum())) - 1]
    keeps = [np.nan_to_num(a, nan=-9) > threshold, b < 0.5, (np.nan_to_num(a, nan=-9) > 0) | (b > 0)]
    assert made.total == 71
    before = np.ones(71, bool)
    starts = np.cumsum([0, 30, 1])
    for stage, keep in zip(made.stages, keeps, strict=True):
        assert stage.removed_alone == (~keep).sum()
        assert stage.removed == (before & ~keep).sum()
        assert stage.left == (before & keep).sum()
        places = [starts[near.shard] + near.row for near in stage.kept]
        assert all(keep[places]) and all(before[places]) and len(places) == 4
        before &= keep
    first, second, third = made.stages
    assert (first.column, first.threshold, second.threshold) == ("a", threshold, 0.5) and third.threshold is None
    nearest = np.sort(a[np.nan_to_num(a, nan=-9) > threshold])[:4]
    assert [near.value for near in first.kept] == nearest.tolist()
    assert [near.value for near in first.dropped] == np.sort(a[a <= threshold])[::-1][:4].tolist()
    assert first.histogram.counts.sum() == (~np.isnan(a)).sum()
    assert second.histogram.survivors.sum() == keeps[0].sum()
