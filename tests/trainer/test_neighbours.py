"""Training with neighbours: on two ranks, under both engines, resumed to the bit, on other ranks; sampled from another
database."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conf.errors import ConfigError
from data.fields import Origin
from data.index import ensure_indexed
from data.retrieval.database import Database
from data.retrieval.field import Neighbours
from data.store import Store
from data.transforms import Geometry
from models.initialization import parameter_generator
from tests.data.curation.tiny_models import save_clip
from tests.data.retrieval.vectors import clustered, save_database, save_index, tell_model, write_neighbours
from tests.trainer.jobs import resumed_as_whole, train_on
from tests.trainer.task_tars import write_task_tars
from tools import cli
from trainer.checkpoint import load_weights, read_record

TINY = [
    *("scale=tiny", "log.wandb=null", "rehearse=false", "data.holdout=0.2", "data.log_keys=true"),
    *("batch=4", "lanes=4", "buckets.sizes=[[16, 16]]", "sampler.steps=2", "schedule.warmup=0", "schedule.lr=1e-3"),
    *("validation.samples=4", "validation.every=4", "samples.every=4", "samples.count=2", "checkpoint.every=2"),
]
GEOMETRY = Geometry((16, 16), (16, 16), (0, 0), (16, 16), flip=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("neighbours")
    write_task_tars(folder / "tars", 60)
    vectors = clustered(80, 32, 5)
    write_neighbours(folder / "tars", save_index(save_database(folder / "database", np.split(vectors, 2))), 20)
    save_index(save_database(folder / "other", [clustered(30, 32, 3, seed=5)]))
    return folder


def run(world: int, folder: Path, name: str, *overrides: str) -> list[dict]:
    """Train; rows of metrics.jsonl."""
    source = f"data.sources.drawn.shards={folder}/tars"
    database = f"data.fields.neighbours.database={folder}/database"
    return train_on(
        world,
        folder,
        f"name={name}",
        source,
        database,
        *overrides,
        small=["experiment=rdm/imagenet", *TINY],
        timeout_s=900,
    )


@pytest.mark.parametrize("engine", ["fsdp", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_it_trains_resumes_goes_on_elsewhere_and_samples(folder: Path, engine: str, capsys):
    resumed_as_whole(run, folder, engine)
    assert (folder / "runs" / engine / "samples/step_00000004.png").stat().st_size > 500

    arguments = [f"source={folder}/runs/{engine}", f"out={folder}/out", "sampler.steps=2", "guidance.scale=4"]
    pictures = []
    for given in (["[3, 17, 5, 8]"], ["[3, 17, 5]"], ["[3, 17, 5, 8]", f"database={folder}/other"]):
        fields = f"fields.neighbours=['{given[0]}']"
        assert cli.execute(["sample", *arguments, fields, *given[1:]]) == 0, capsys.readouterr().err
        pictures.append(np.asarray(Image.open(folder / "out" / "00000.png"), dtype=int))
    assert np.abs(pictures[0] - pictures[1]).max() > 0, "fewer neighbours"
    assert np.abs(pictures[0] - pictures[2]).max() > 0, "another database"
    assert cli.execute(["sample", *arguments, "fields.neighbours=['[99]']"]) == 2
    assert "rows are given as [3, 17], or one as ~17, from 0 to 79 of" in capsys.readouterr().err
    # Of nothing, pictures are of pseudo-queries, which their seeds draw.
    assert cli.execute(["sample", *arguments, "each=3", "neighbours.top_m=1"]) == 0, capsys.readouterr().err
    drawn = [Image.open(folder / "out" / f"0000{i}.png") for i in range(3)]
    assert len({picture.text["neighbours"] for picture in drawn}) > 1
    again = [f"seed={drawn[2].text['seed']}", f"fields.neighbours=['{drawn[2].text['neighbours']}']"]
    assert cli.execute(["sample", *arguments, *again]) == 0, capsys.readouterr().err
    assert np.array_equal(np.asarray(drawn[2]), np.asarray(Image.open(folder / "out" / "00000.png")))


@pytest.mark.parametrize("engine", ["fsdp", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_mmdit_attends_to_neighbours_too(folder: Path, tmp_path: Path, engine: str, capsys):
    given = [f"data.sources.drawn.shards={folder}/tars", f"data.fields.neighbours.database={folder}/database"]
    given += ["model=mmdit", "model.pooled_projection_dim=0", "process=rectified_flow", "sampler=euler"]
    given += ["schedule.lr=1e-2"]  # blocks begin as the identity

    def trained(world: int, folder: Path, name: str, *overrides: str) -> list[dict]:
        small = ["experiment=rdm/imagenet", *TINY]
        return train_on(world, folder, f"name={name}", *given, *overrides, small=small, timeout_s=900)

    resumed_as_whole(trained, tmp_path, engine)
    arguments = [f"source={tmp_path}/runs/{engine}", f"out={tmp_path}/out", "sampler.steps=2", "average=none"]
    fields = "fields.neighbours=['[3, 17, 5, 8]','[3, 17, 5]']"
    assert cli.execute(["sample", *arguments, fields]) == 0, capsys.readouterr().err
    first, second = (np.asarray(Image.open(tmp_path / "out" / f"0000{i}.png"), int) for i in range(2))
    assert np.abs(first - second).max() > 0, "fewer neighbours"


@pytest.mark.parametrize("kind", ["pictures", pytest.param("captions", marks=pytest.mark.slow)])
def test_pictures_and_captions_of_neighbours_are_trained_with_like_embeddings(
    folder: Path, tmp_path, kind: str, capsys
):
    """On two ranks, resumed, on one, with a CLIP's database that `millrace retrieve` made."""
    clip, shards = save_clip(tmp_path / "clip"), f"{folder}/tars"
    retrieve = [f"database={tmp_path}/database", f"shards={shards}", f"neighbours_of={shards}", f"column={kind}"]
    retrieve += ["k=6", f"embedding.model={clip}", "log.wandb=null", f"runs={tmp_path}/runs"]
    assert cli.execute(["retrieve", *retrieve]) == 0, capsys.readouterr().err
    field = [f"database={tmp_path}/database", f"column={kind}", "k=2", "most_similar=0.9999"]
    more = [f"field@data.fields.neighbours=neighbour_{kind}", *(f"data.fields.neighbours.{one}" for one in field)]
    more += [f"conditioner=neighbour_{kind}", f"conditioner.encoders.0.encoder.model={clip}"]
    more += ["conditioner.encoders.0.k=2", f"model.cross_attention_dim={12 if kind == 'captions' else 10}"]
    more += ["objective.caption_dropout=0.5"]
    if kind == "captions":
        of_folder = ("length=12", "subfolder=''", "tokenizer_subfolder=''")
        more += [f"conditioner.encoders.0.encoder.{one}" for one in of_folder]

    def trained(world: int, folder: Path, name: str, *overrides: str) -> list[dict]:
        given = [f"name={name}", f"data.sources.drawn.shards={shards}", *more, *overrides]
        return train_on(world, folder, *given, small=["experiment=rdm/imagenet", *TINY], timeout_s=900)

    resumed_as_whole(trained, tmp_path, "fsdp")
    job = [f"source={tmp_path}/runs/fsdp", "sampler.steps=2", f"out={tmp_path}/out"]
    assert cli.execute(["sample", *job, "fields.neighbours=['a red circle', '[3, 17]']"]) == 0, capsys.readouterr().err
    first, second = (np.asarray(Image.open(tmp_path / "out" / f"0000{i}.png"), int) for i in range(2))
    assert np.abs(first - second).max() > 0


def origin(ids: list[int], similarities: list[float]) -> Origin:
    columns = {"neighbours": ids, "neighbours_similarity": similarities}
    return Origin(columns, lambda extension: b"", GEOMETRY, lambda purpose: 0)


def test_the_nearest_are_read_but_those_that_are_too_similar(folder: Path):
    database = Database(folder / "database")
    told = origin([7, 70, 41, 3], [1.0, 0.97, 0.5, 0.2])
    one = Neighbours(str(folder / "database"), k=2)
    assert torch.equal(one.read(told), torch.from_numpy(database.vectors(np.array([7, 70]))))
    one = Neighbours(str(folder / "database"), k=2, most_similar=0.95)
    assert torch.equal(one.read(told), torch.from_numpy(database.vectors(np.array([41, 3]))))
    one = Neighbours(str(folder / "database"), k=4, most_similar=0.4)
    tokens = one.read(told)
    assert torch.equal(tokens[0], torch.from_numpy(database.vectors(np.array([3])))[0]) and not tokens[1:].any()
    assert not one.read(origin([-1, -1], [0.0, 0.0])).any()


def test_columns_of_another_database_are_refused(folder: Path, tmp_path: Path):
    manifests = ensure_indexed([str(path) for path in sorted((folder / "tars").glob("*.tar"))], Store())
    Neighbours(str(folder / "database"), k=20).check(manifests, Store())
    with pytest.raises(ConfigError, match="k=21 neighbours of 20 that are stored"):
        Neighbours(str(folder / "database"), k=21).check(manifests, Store())
    with pytest.raises(ConfigError, match="has embeddings of 32 numbers, not of 512"):
        Neighbours(str(folder / "database"), width=512).check(manifests, Store())
    with pytest.raises(ConfigError, match=r"is not of the database .*other as it is: run `millrace retrieve"):
        Neighbours(str(folder / "other")).check(manifests, Store())
    with pytest.raises(ConfigError, match=r"'mine' beside .* is not of the database"):
        Neighbours(str(folder / "database"), column="mine").check(manifests, Store())


def test_a_run_goes_on_in_its_own_database_or_replanned_in_another_of_its_model(tmp_path: Path, capsys, caplog):
    tars, place = tmp_path / "tars", tmp_path / "database"
    write_task_tars(tars, 20)
    arguments = ["train", "experiment=rdm/imagenet", *TINY, f"data.sources.drawn.shards={tars}", "name=goes_on"]
    arguments += ["validation.every=null", "samples.every=null", f"data.fields.neighbours.database={place}"]
    arguments += [f"runs={tmp_path}/runs", f"data.cache_folder={tmp_path}/cache", "checkpoint.every=1"]

    def remade(seed: int, model: str | None) -> None:
        """The database, by another CLIP or of other pictures, and neighbours retrieved anew."""
        shutil.rmtree(place, ignore_errors=True)
        database = save_index(save_database(place, [clustered(40, 32, 3, seed=seed)]))
        write_neighbours(tars, tell_model(database, model) if model is not None else database, 8)

    def goes_on(steps: int, *more: str) -> str:
        """What is said against it; "" where it does."""
        status = cli.execute([*arguments, f"steps={steps}", *more])
        said = capsys.readouterr().err
        assert status == 0 or said
        return said if status else ""

    remade(0, "b32")
    assert not goes_on(1)
    record = read_record(tmp_path / "runs/goes_on/checkpoints/step_00000001")
    assert record.config["data"]["fields"]["neighbours"]["model"] == "b32"
    shutil.move(place, tmp_path / "moved")
    assert not goes_on(2, f"data.fields.neighbours.database={tmp_path}/moved")  # it is the same
    shutil.rmtree(tmp_path / "moved")
    remade(1, "b32")
    assert "(field neighbours of drawn: database " in (said := goes_on(3)) and "data.replan=true" in said
    remade(1, "l14")
    refused = (
        "data.fields.neighbours: the database .*database holds embeddings of another model than the run was trained"
    )
    for more in ([], ["data.replan=true"]):
        assert re.search(refused, goes_on(3, *more))
    remade(1, "b32")
    assert not goes_on(3, "data.replan=true")
    # A database that does not tell its model is told from others, and what is unknown is said.
    remade(2, None)
    assert "(field neighbours of drawn: database " in goes_on(4)
    caplog.clear()
    assert not goes_on(4, "data.replan=true")
    assert "nothing tells that the database" in caplog.text


def test_a_model_takes_as_many_and_as_wide_neighbours_as_it_was_made_for(folder: Path, capsys):
    """Before the run starts: nothing of it is written."""
    small = save_database(folder / "small", [clustered(3, 32, 1)])
    wide = save_database(folder / "wide", [clustered(9, 48, 1)])
    tars = folder / "other_tars"
    write_task_tars(tars, 12)
    arguments = ["train", "experiment=rdm/imagenet", *TINY, f"data.sources.drawn.shards={tars}", "steps=1"]
    refused = [f"runs={folder}/refused", f"data.cache_folder={folder}/cache"]

    def told(*overrides: str, status: int = 2) -> str:
        assert cli.execute([*arguments, *refused, *overrides]) == status
        assert not list((folder / "refused").rglob("metrics.jsonl"))
        return capsys.readouterr().err

    database = f"data.fields.neighbours.database={folder}"
    wrong = told(f"{database}/database", "data.fields.neighbours.k=3")
    assert "data.fields.neighbours.k is 3, and the conditioner is made for 4 neighbours" in wrong
    assert "data.fields.neighbours is missing: the conditioner reads it" in told(
        f"{database}/database", "~data.fields.neighbours"
    )
    write_neighbours(tars, small, 3)
    assert "k=4 neighbours of a database of 3 rows: choose a smaller k" in told(f"{database}/small", status=1)
    write_neighbours(tars, wide, 3)
    assert "k=4 neighbours of 3 that are stored" in told(f"{database}/wide", status=1)
    write_neighbours(tars, wide, 4)
    assert "data.fields.neighbours gives (4, 48) numbers a sample, and the model was made for (4, 32)" in told(
        f"{database}/wide"
    )


def test_a_vector_for_no_neighbours_is_learned(folder: Path, capsys):
    guided = ["conditioner=neighbours_guided", "objective.train_conditioner=true", "objective.caption_dropout=0.5"]
    run(1, folder, "guided", *guided, "steps=6", "validation.every=null")
    name = "encoder_modules.0.nothing_given"
    first = torch.empty(32).normal_(generator=parameter_generator(0, "conditioner", name))
    last = load_weights(folder / "runs/guided/checkpoints/step_00000006", "conditioner")
    assert list(last) == [name] and 0 < (last[name] - first).abs().max() < 0.1
    arguments = [f"source={folder}/runs/guided", f"out={folder}/out", "sampler.steps=2", "guidance.scale=4"]
    assert cli.execute(["sample", *arguments, "fields.neighbours=['[3, 17, 5, 8]']"]) == 0, capsys.readouterr().err
