"""Retrieval in small: what is drawn and found for the study, and what is measured of its runs."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import yaml

from conf.compose import ROOT
from data.retrieval.database import Database
from tools import cli
from tools.demo import judge
from tools.demo.scenes import COLOURS, Scene, SceneObject, draw
from tools.study.retrieval import (
    RetrievalEvaluation,
    ScenesWithNeighbours,
    of_colour,
    rows_and_neighbours,
    share_of_colour,
    swapped_for,
    text_of,
)


def test_scenes_of_a_colour_and_texts_with_and_without_it():
    for colour in COLOURS:
        objects = [thing for scene in islice(of_colour(colour, 0), 40) for thing in scene.objects]
        assert {thing.colour for thing in objects} == {colour} and {thing.split for thing in objects} == {"train"}
        assert len({thing.shape for thing in objects}) == 4
    assert text_of("cyan", "cross", "top left") == "a cyan cross in the top left corner"
    assert text_of(None, "cross", "centre") == "a cross in the centre"


def test_a_colour_counts_where_it_is_alone():
    rng = np.random.default_rng(0)

    def picture(*colours: str) -> np.ndarray:
        places = ("left", "right") if len(colours) == 2 else ("centre",)
        things = tuple(SceneObject("square", c, p) for c, p in zip(colours, places[: len(colours)], strict=True))
        return draw(Scene(things, "", 64, 64), rng)

    pictures = [picture("red"), picture("red", "blue"), picture("blue", "blue"), picture()]
    assert share_of_colour(pictures, ["red", "red", "blue", "red"]) == 0.5
    assert judge.look(pictures[3]) == []


@pytest.mark.slow
def test_the_study_prepares_and_measures_runs_with_and_without_neighbours(tmp_path: Path, capsys):
    study = yaml.safe_load((ROOT / "study/retrieval_small.yaml").read_text())
    small = ["scale=tiny", "steps=2", "networks.clip.projection_dim=64", "samples.every=null", "validation.every=null"]
    stage = ScenesWithNeighbours(60, 40, 8, 8, small)
    stage.prepare(tmp_path)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    stage.prepare(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == written
    assert Database(tmp_path / "data/databases/others").rows == 40
    assert Database(tmp_path / "data/databases/red").rows == 8

    base = [override.replace("${runs}/${study.name}", str(tmp_path)) for override in study["base"]]
    evaluation = RetrievalEvaluation(count=20, steps=2, guidance=2.0, average="decay_9999")
    for label in ("k0", "k4"):
        own = [override.replace("${runs}/${study.name}", str(tmp_path)) for override in study["axes"]["k"][label]]
        where = [f"runs={tmp_path}", f"name={label}", f"data.cache_folder={tmp_path}/cache", "log.wandb=null"]
        arguments = ["train", *base, *own, *where, "steps=2"]
        assert cli.execute(arguments) == 0, capsys.readouterr().err
        (row,) = evaluation.evaluate(tmp_path / label)
        assert row.keys() == set(evaluation.columns()) and row["frechet"] > 0
        assert all(0 <= row[name] <= 1 for name in ("precision", "recall", "swapped", "named"))


def test_each_row_comes_with_its_nearest(tmp_path: Path):
    from data.retrieval.field import Neighbours
    from tests.data.retrieval.vectors import clustered, save_database

    save_database(tmp_path / "others", [clustered(30, 8, 3)])
    field = swapped_for(Neighbours(str(tmp_path / "red"), k=3), "others")
    vectors = Database(tmp_path / "others").vectors(np.arange(30))
    for told in rows_and_neighbours(field, 5, 0):
        first, *rest = (int(one) for one in told.strip("[]").split(","))
        others = np.argsort(-(vectors @ vectors[first]))
        assert [first, *rest] == others[:3].tolist()
        assert np.allclose(field.given(told, (8, 8)), vectors[[first, *rest]])
