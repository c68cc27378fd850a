"""What `millrace sample` draws of where a model attends to neighbours."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conf.compose import compose
from conf.errors import ConfigError
from data.retrieval.database import Database
from data.retrieval.field import Neighbours
from models.conditioner import AbsentEncoder, Conditioner
from models.conditions import NeighbourEncoder
from models.first_stage import Identity
from tests.data.retrieval.vectors import clustered, save_database, save_index, tell_model, write_neighbours
from tests.trainer.task_tars import write_task_tars
from trainer.loading import Loaded
from trainer.sample_conditions import ConditionReader, asked_for


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sampled_neighbours")
    write_task_tars(folder / "tars", 20)
    for name, rows, width in (("db", 40, 8), ("other", 30, 8), ("wide", 30, 9), ("small", 3, 8)):
        save_index(save_database(folder / name, [clustered(rows, width, 4, seed=rows)]))
    write_neighbours(folder / "tars", Database(folder / "db"), 6)
    write_neighbours(folder / "tars", Database(folder / "other"), 6, "in_other")
    return folder


def loaded(folder: Path, *encoders: Any) -> Loaded:
    networks = {"conditioner": Conditioner([NeighbourEncoder(4, 8), *encoders]), "first_stage": Identity()}
    data = {
        "_target_": "data.tars.TarData",
        "sources": {"drawn": {"shards": str(folder / "tars"), "fields": {"class": {"_target_": "data.fields.Label"}}}},
        "cache_folder": str(folder / "cache"),
    }
    fields = {"neighbours": Neighbours(str(folder / "db"))}
    return Loaded(networks, None, {"data": data}, (16, 16), "a run", fields=fields)  # type: ignore[arg-type]


def sampled(*overrides: str) -> Any:
    return compose("sample", ["source=a", *overrides])


def reader(folder: Path, *overrides: str) -> ConditionReader:
    return ConditionReader(sampled(*overrides), loaded(folder), (16, 16))


def test_prompts_are_what_neighbours_are_of_where_the_model_reads_none(folder: Path):
    model = loaded(folder)
    prompts = "prompts=[a red circle, a dog]"
    assert asked_for(sampled(prompts), model) == [
        {"neighbours": text, "prompt": text} for text in ("a red circle", "a dog")
    ]
    given = asked_for(sampled(prompts, "fields.neighbours=['[3]']"), model)
    assert given == [{"neighbours": "[3]", "prompt": text} for text in ("a red circle", "a dog")]
    reads_captions = loaded(folder, AbsentEncoder(2, 8))
    assert asked_for(sampled("prompts=[a dog]"), reads_captions) == [{"prompt": "a dog"}]


def test_of_nothing_a_seed_draws_an_entry_and_its_neighbours(folder: Path):
    assert asked_for(sampled(), loaded(folder)) == [{}]
    read = reader(folder, "neighbours.top_m=1")
    drawn = [read.completed({}, seed)["neighbours"] for seed in range(50)]
    assert drawn == [reader(folder, "neighbours.top_m=1").completed({}, seed)["neighbours"] for seed in range(50)]
    assert len(set(drawn)) > 15
    few = {reader(folder, "neighbours.top_m=0.1").completed({}, seed)["neighbours"] for seed in range(50)}
    assert 1 < len(few) <= 4
    vectors = Database(folder / "db").vectors(np.arange(40))
    nearest = np.argsort(-(vectors @ vectors[int(drawn[0][1:])]))[:4]
    tokens = read.picture({"neighbours": drawn[0]}, 0).fields["neighbours"]
    assert torch.allclose(tokens, torch.from_numpy(vectors[nearest]), atol=1e-6)
    assert reader(folder, "neighbours.k=7").picture({"neighbours": "~3"}, 0).fields["neighbours"].shape == (7, 8)


def test_entries_of_another_database_need_a_column_or_are_all_alike(folder: Path):
    other = f"database={folder}/other"
    with pytest.raises(ConfigError, match=r"give neighbours.column=<column>, or neighbours.top_m=null"):
        reader(folder, other).completed({}, 0)
    with pytest.raises(ConfigError, match=r"column 'neighbours' beside .* is not of the database"):
        reader(folder, other, "neighbours.column=neighbours").completed({}, 0)
    counted = reader(folder, other, "neighbours.column=in_other", "neighbours.top_m=1")
    alike = reader(folder, other, "neighbours.top_m=null")
    for one in (counted, alike):
        rows = [int(one.completed({}, seed)["neighbours"][1:]) for seed in range(60)]
        assert len(set(rows)) > 10 and max(rows) < 30
    vectors = Database(folder / "other").vectors(np.arange(30))
    tokens = alike.picture({"neighbours": "[29]"}, 0).fields["neighbours"]
    assert torch.equal(tokens, torch.from_numpy(vectors[[29]]))


def test_a_database_is_of_the_model_that_was_trained_with(folder: Path, tmp_path: Path, caplog):
    def save(name: str, model: str | None, seed: int) -> Database:
        database = save_index(save_database(tmp_path / name, [clustered(30, 8, 4, seed=seed)]))
        return tell_model(database, model) if model is not None else database

    trained, same, other = save("trained", "b32", 1), save("same", "b32", 2), save("other", "l14", 3)
    untold, again = save("untold", None, 4), save("again", None, 4)

    def drawn(of: Database, swapped: Database) -> str:
        """What is said of the database."""
        model = loaded(folder)
        fields = {"neighbours": Neighbours(str(of.folder), model=of.model)}
        read = ConditionReader(sampled(f"database={swapped.folder}"), replace(model, fields=fields), (16, 16))
        caplog.clear()
        assert read.picture({"neighbours": "[29]"}, 0).fields["neighbours"].shape == (1, 8)
        return caplog.text

    assert not drawn(trained, same) and not drawn(untold, again)
    for of, swapped in ((trained, untold), (untold, trained), (untold, save("more", None, 5))):
        assert f"nothing tells that the database {swapped.folder} is of the model" in drawn(of, swapped)
    with pytest.raises(ConfigError, match=r"other holds embeddings of another model than the one .* \(/models/l14\)"):
        drawn(trained, other)


def test_the_database_of_training_is_one_wherever_it_lies(folder: Path, tmp_path: Path, monkeypatch):
    counted = reader(folder, "neighbours.top_m=1").completed({}, 7)
    monkeypatch.chdir(folder)
    copied = shutil.copytree(folder / "db", tmp_path / "copied")
    for place in ("db", copied):
        assert reader(folder, f"database={place}", "neighbours.top_m=1").completed({}, 7) == counted


def test_a_database_of_another_model_or_smaller_than_k_is_refused(folder: Path):
    with pytest.raises(ConfigError, match="has embeddings of 9 numbers, not of 8"):
        reader(folder, f"database={folder}/wide").picture({"neighbours": "~3"}, 0)
    with pytest.raises(ConfigError, match="k=4 neighbours of a database of 3 rows"):
        reader(folder, f"database={folder}/small").picture({"neighbours": "~2"}, 0)
    plain = Loaded({"conditioner": Conditioner([])}, None, {}, (16, 16), "a run")  # type: ignore[arg-type]
    for override in ("database=db", "neighbours.k=3"):
        with pytest.raises(ConfigError, match="the model was trained without neighbours"):
            ConditionReader(sampled(override), plain, (16, 16))
