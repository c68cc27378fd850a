"""Pseudo-queries, against counting one by one."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data.manifest_reader import ManifestReader
from data.retrieval.field import Neighbours
from data.retrieval.pseudo_queries import count_neighbours, proposal
from data.tars import TarData
from tests.data.retrieval.vectors import clustered, save_database, write_neighbours
from tests.trainer.task_tars import write_task_tars


def test_entries_are_counted_as_training_reads_them(tmp_path: Path):
    write_task_tars(tmp_path / "tars", 40)
    write_neighbours(tmp_path / "tars", save_database(tmp_path / "db", [clustered(30, 8, 5)]), 12)
    one = Neighbours(str(tmp_path / "db"), k=3, most_similar=0.8)
    sources = {"drawn": {"shards": str(tmp_path / "tars"), "where": "width > 0"}}
    data = TarData(sources, holdout=0.3, cache_folder=str(tmp_path / "cache"), fields={"neighbours": one})  # type: ignore[arg-type]
    selection = data.select("drawn", "train")
    assert 0 < len(selection) < 40
    reader, expected = ManifestReader(data.store, selection.manifests), Counter[int]()
    for shard, row in selection.locate(np.arange(len(selection))):
        values = reader.rows(shard, [row], one.columns)
        pairs = zip(*(values[column][0] for column in one.columns), strict=True)
        expected.update([id_ for id_, similarity in pairs if similarity <= 0.8][:3])
    counts = count_neighbours(data, one)
    assert counts.shape == (30,) and counts.sum() <= 3 * len(selection)
    assert {i: n for i, n in enumerate(counts.tolist()) if n} == dict(expected)


def test_the_likeliest_share_is_drawn_from_as_often_as_it_is_a_neighbour():
    counts = np.array([0, 1, 5, 0, 2, 1, 1, 0])
    whole = proposal(counts, 1.0)
    assert whole.ids.tolist() == [2, 4, 1, 5, 6] and whole.weights.tolist() == [5, 2, 1, 1, 1]
    drawn = Counter(whole((i + 0.5) / 1000) for i in range(1000))
    assert drawn == {2: 500, 4: 200, 1: 100, 5: 100, 6: 100}
    assert whole(0.0) == 2 and whole(np.nextafter(1.0, 0.0)) == 6
    assert proposal(counts, 0.4).ids.tolist() == [2, 4], "two fifths of those that ever are neighbours"
    assert proposal(counts, 0.001).ids.tolist() == [2], "one at least"
    assert Counter(proposal(counts, 0.4, alike=True)((i + 0.5) / 10) for i in range(10)) == {2: 5, 4: 5}
    for share in (0.0, 1.1):
        with pytest.raises(ValueError, match="a share of the entries"):
            proposal(counts, share)
    with pytest.raises(ValueError, match="no sample of training has a neighbour"):
        proposal(np.zeros(8, int), 0.5)
