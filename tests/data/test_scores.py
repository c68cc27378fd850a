"""Score files and what their metadata say."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from shard_files import sample, write_shard

from data.index import ensure_indexed
from data.scores import (
    ERRORS_KEPT,
    Recipe,
    ScoreError,
    read_scored,
    score_columns,
    score_names,
    score_url,
    write_scores,
)
from data.store import Store


@pytest.fixture
def shard(tmp_path):
    write_shard(tmp_path / "a.tar", [sample(i) for i in range(3)])
    store = Store()
    return ensure_indexed([str(tmp_path / "a.tar")], store)[0], store


def test_a_score_file_tells_what_made_it_and_what_went_wrong(shard):
    manifest, store = shard
    assert read_scored(manifest, "motion", store) is None
    recipe = Recipe(3, {"size": 16, "shares": [0.5]}, "inputs")
    errors = [ScoreError(0, "000000", "too short", f"{i} frames") for i in range(ERRORS_KEPT + 50)]
    write_scores(manifest, "motion", pa.table({"motion": [1.0, None, 2.0]}), store, recipe, errors)
    scored = read_scored(manifest, "motion", store)
    assert scored.recipe == recipe
    assert scored.error_counts == (("too short", ERRORS_KEPT + 50),)
    assert list(scored.errors) == errors[:ERRORS_KEPT]
    assert score_names(manifest.url, store) == ["motion"]


def test_equal_scores_have_equal_content_whatever_made_them(shard):
    manifest, store = shard
    contents = []
    for values, recipe in (([1, 2, 3], Recipe(1)), ([1, 2, 3], Recipe(2)), ([1, 2, 4], Recipe(1))):
        write_scores(manifest, "m", pa.table({"m": np.array(values, np.float32)}), store, recipe)
        contents.append(read_scored(manifest, "m", store).content)
    assert contents[0] == contents[1] != contents[2]


def test_scores_of_another_state_of_the_shard_or_damaged_ones_count_as_none(shard):
    manifest, store = shard
    write_scores(manifest, "m", pa.table({"m": [1, 2, 3]}), store)
    assert read_scored(manifest, "m", store) is not None and score_columns(manifest.url, store)["m"].names == ["m"]
    for other in (replace(manifest, identity="9:9"), replace(manifest, digest="0")):
        assert read_scored(other, "m", store) is None
    path = Path(score_url(manifest.url, "m"))
    path.write_bytes(path.read_bytes()[:-20])
    assert read_scored(manifest, "m", store) is None and score_columns(manifest.url, store) == {}
