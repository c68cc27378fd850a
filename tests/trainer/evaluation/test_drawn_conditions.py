"""`millrace evaluate` of models that read more than captions: each picture is drawn of what a sample comes with."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from models.conditions import LowResolution
from models.given import Given
from tests.data.curation.tiny_models import save_clip
from tests.data.shard_files import write_shard
from tests.models import tiny_pipelines
from tests.trainer.jobs import QUICK, train_on
from tests.trainer.task_tars import NAMES, write_task_tars
from tools import cli

TINY = ["scale=tiny", "data.holdout=0.3", "batch=4", "lanes=2", "buckets.sizes=[[16, 16]]", "schedule.warmup=0"]
TINY += ["steps=2", "schedule.lr=0.05", "sampler.steps=2", "samples.every=null", "validation.every=null"]
STAND_IN = ["features=random_stand_in", "features.num_features=8", "metric=[fid]", "log.wandb=null"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("conditions")
    write_task_tars(folder / "tars", 40)
    write_task_tars(folder / "others", 12, height=32, width=32)
    return folder


def trained(home: Path, task: str, *more: str) -> Path:
    where = [
        *([] if any(m.startswith("name=") for m in more) else [f"name={task}"]),
        f"experiment=ldm/{task}",
        f"data.sources.drawn.shards={home}/tars",
    ]
    train_on(1, home, *where, *TINY, *more, small=QUICK)
    return home / "runs" / task


def evaluated(home: Path, name: str, *overrides: str) -> tuple[int, Path]:
    """Status, and the folder of kept pictures."""
    shared = [f"runs={home}/runs", f"name={name}", f"cache_folder={home}/cache", *STAND_IN, "batch=4", "keep=true"]
    status = cli.execute(["evaluate", *shared, *overrides])
    return status, home / "runs" / name / "pictures"


def kept(pictures: Path) -> dict[int, tuple[np.ndarray, str]]:
    """By number, the pictures and their captions."""
    found = {}
    for path in pictures.rglob("*.tar"):
        with tarfile.open(path) as tar:
            for name in tar.getnames():
                if name.endswith(".png"):
                    stem = name.removesuffix(".png")
                    image = np.asarray(Image.open(tar.extractfile(name)), dtype=int)  # type: ignore[arg-type]
                    caption = tar.extractfile(f"{stem}.txt").read().decode()  # type: ignore[union-attr]
                    found[int(stem)] = image, caption
    return found


@pytest.mark.parametrize("given", [False, True])
def test_classes_are_those_of_samples(home: Path, given: bool, capsys):
    """The first shape that a caption names is the sample's class: `millrace sample` draws the same of it."""
    run = trained(home, "imagenet")
    reference = [f"reference={home}/others"] if given else []
    status, pictures = evaluated(home, f"classes_{given}", f"source={run}", "samples=8", *reference)
    assert status == 0, capsys.readouterr().err
    drawn = kept(pictures)
    assert sorted(drawn) == list(range(8)) and len({caption.split()[0] for _, caption in drawn.values()}) > 1
    for number, (image, caption) in list(drawn.items())[:3]:
        label = NAMES.index(caption.split()[0])
        others = [other for other in (1, 2, 3) if other != label]
        out = home / "out"
        classes = f"fields.class=[{label},{others[0]}]"
        assert cli.execute(["sample", f"source={run}", classes, f"seed={number}", f"out={out}"]) == 0
        same, another = (np.asarray(Image.open(out / f"0000{i}.png"), dtype=int) for i in (0, 1))
        assert np.abs(image - same).max() <= 1 < np.abs(image - another).max()


@pytest.mark.parametrize("task", ["layout_openimages", "semantic", "super_resolution", "inpainting"])
def test_boxes_maps_and_pictures_are_those_of_samples(home: Path, task: str, capsys, monkeypatch):
    run = trained(home, task)
    levels = set()
    forward = LowResolution.forward

    def watched(map_: LowResolution, given: Given) -> Tensor:
        levels.update(forward(map_, given)[:, 3].unique().tolist())
        return forward(map_, given)

    monkeypatch.setattr(LowResolution, "forward", watched)
    status, pictures = evaluated(home, f"of_{task}", f"source={run}", f"reference={home}/others", "samples=14")
    assert status == 0, capsys.readouterr().err
    drawn = kept(pictures)
    assert len(drawn) == 14 and drawn[0][1] == drawn[12][1] != ""  # of 12 samples
    (row,) = json.loads((home / "runs" / f"of_{task}" / "evaluation.json").read_text())
    assert row["samples"] == 14 and row["fid_random_stand_in"] > 0
    assert levels == ({0.0} if task == "super_resolution" else set())
    assert row.get("noise_level") == (0 if levels else None)


def test_nothing_is_asked_of_an_unconditional_model(home: Path, tmp_path: Path, capsys):
    run = trained(home, "celebahq")
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(8), sigma=np.eye(8))
    given = [f"source={run}", f"reference={tmp_path}/statistics.npz", "samples=5"]
    status, pictures = evaluated(home, "unconditional", *given)
    assert status == 0 and len(kept(pictures)) == 5
    for key, more in (("guidance_scales=2", "guidance_scales=[1,2]"), ("guidance.scale=3", "guidance.scale=3")):
        status, _ = evaluated(home, "guided", *given, more)
        assert status == 2 and f"{key}: there is nothing that" in capsys.readouterr().err


def test_neighbours_are_those_of_samples_of_captions_or_of_drawn_entries(home: Path, tmp_path: Path, capsys):
    """Pictures are those that `millrace sample` draws of the same queries and seeds."""
    clip, shards, database = save_clip(home / "clip"), f"{home}/tars", f"{home}/database"
    retrieve = [f"database={database}", f"shards={shards}", f"neighbours_of={shards}"]
    retrieve += [f"embedding.model={clip}", "k=6", "log.wandb=null", f"runs={home}/runs"]
    assert cli.execute(["retrieve", *retrieve]) == 0, capsys.readouterr().err
    of_width = ["conditioner.encoders.0.width=10", "model.cross_attention_dim=10"]
    place = [f"data.sources.drawn.shards={shards}", f"data.fields.neighbours.database={database}", *of_width]
    train_on(1, home, "name=rdm", "experiment=rdm/imagenet", *place, *TINY, small=QUICK)
    run = home / "runs/rdm"
    given = [f"source={run}", "neighbours.top_m=1"]
    found = {}
    for queries in ("samples", "captions", "drawn"):
        status, pictures = evaluated(home, f"of_{queries}", *given, f"queries={queries}")
        assert status == 0, capsys.readouterr().err
        found[queries] = kept(pictures)
    of_samples, of_captions, of_entries = found.values()
    assert len(of_samples) == len(of_captions) == len(of_entries) > 4
    assert all(caption for _, caption in of_captions.values()) and not any(text for _, text in of_entries.values())
    for of in (of_captions, of_entries):
        for number in range(4):
            prompts = [f"prompts=['{of[number][1]}']"] if of is of_captions else []
            assert cli.execute(["sample", *given, *prompts, f"seed={number}", f"out={home}/out"]) == 0
            same = np.asarray(Image.open(home / "out/00000.png"), dtype=int)
            assert np.abs(of[number][0] - same).max() <= 1
    assert any(np.abs(of_samples[number][0] - of_captions[number][0]).max() > 1 for number in range(4))

    # Fewer of those that are stored, of held-out samples and of others.
    for name, more in (("held_out", []), ("reference", [f"reference={shards}", "samples=4"])):
        whole, fewer = (
            kept(evaluated(home, f"{name}{len(k)}", *given, *more, *k)[1]) for k in ([], ["neighbours.k=1"])
        )
        assert any(np.abs(whole[number][0] - fewer[number][0]).max() > 1 for number in range(4))
    # Captions are no command line: none is a row or a file, whatever it looks like.
    (home / "odd.txt").write_text("[3]\n[Sold] a car\n~ a view ~\nIMG_2034.jpg\n")
    status, pictures = evaluated(home, "odd", *given, "queries=captions", f"prompts_file={home}/odd.txt")
    assert status == 0 and len(kept(pictures)) == 4, capsys.readouterr().err
    # Neighbours that are stored anew are others.
    rows = []
    for name, more in (("first", []), ("again", []), ("first", ["without_itself=true"])):
        assert cli.execute(["retrieve", *retrieve, *more]) == 0
        assert evaluated(home, name, *given)[0] == 0
        rows.append(json.loads((home / f"runs/{name}/evaluation.json").read_text())[-1])
    assert rows[0]["identity"] == rows[1]["identity"] != rows[2]["identity"] and rows[0]["queries"] == "samples"

    classes = trained(home, "imagenet", "name=without")
    for source, more, told in [
        (
            run,
            ["prompts=[a cat]"],
            "reads neighbours of samples, and no captions; leave it out, or add queries=captions",
        ),
        (run, ["queries=drawn", f"database={home}/nothing"], "nothing"),
        (run, ["queries=drawn", "prompts=[a cat]"], "prompts: with queries=drawn nothing is asked for"),
        (classes.parent / "without", ["queries=drawn"], "queries=drawn: "),
        (classes.parent / "without", ["neighbours.k=2"], "neighbours: the model was trained without neighbours"),
    ]:
        assert evaluated(home, "missing", f"source={source}", *more)[0] == 2
        assert told in capsys.readouterr().err


def test_an_imported_pipeline_draws_captions(home: Path):
    folder = tiny_pipelines.sd1(home / "pipeline")
    given = [f"source={folder}", f"reference={home}/others", "samples=3", "steps=[2]", "guidance_scales=[1,3]"]
    status, pictures = evaluated(home, "imported", *given)
    assert status == 0
    without, guided = (kept(one) for one in sorted(pictures.iterdir()))
    assert without.keys() == guided.keys() == {0, 1, 2} and all(caption for _, caption in without.values())
    assert any(np.abs(without[i][0] - guided[i][0]).max() > 1 for i in range(3))
    rows = json.loads((home / "runs/imported/evaluation.json").read_text())
    assert [row["guidance"] for row in rows] == [1, 3] and {row["sampler"] for row in rows} == {"PLMS"}


def test_an_editing_pipelines_scale_by_pictures_is_told_and_another_one_is_another_setting(home: Path):
    folder = tiny_pipelines.editing(home / "editing")
    rng = np.random.default_rng(0)
    samples = [
        {"__key__": f"{i}", "txt": "a red circle", "png": _encoded(rng), "original.jpg": _encoded(rng, "JPEG")}
        for i in range(3)
    ]
    write_shard(home / "edits/0.tar", samples)
    given = [f"source={folder}", f"reference={home}/edits", "steps=[2]", "samples=3"]
    for more, scale in (([], 1.5), (["guidance.picture_scale=1"], None)):
        assert evaluated(home, "edited", *given, *more)[0] == 0
        (row,) = json.loads((home / "runs/edited/evaluation.json").read_text())
        assert row["guidance"] == 7.5 and row.get("picture_scale") == scale and row["samples"] == 3


def _encoded(rng: np.random.Generator, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file, form)
    return file.getvalue()


def test_what_is_missing_is_named(home: Path, tmp_path: Path, capsys):
    run = trained(home, "imagenet", "name=all", "data.holdout=0")
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (16, 16)).save(folder / "a.png")
    for more, told in [
        (["prompts=[a cat]", f"reference={home}/others"], "reads class of samples, and no captions"),
        ([f"reference={folder}"], "reads class of samples; give tars of such samples"),
    ]:
        assert evaluated(home, "missing", f"source={run.parent}/all", *more)[0] == 2
        assert told in capsys.readouterr().err
