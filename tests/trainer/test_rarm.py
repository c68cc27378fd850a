"""RARM: trained on two ranks under both engines, resumed to the bit, goes on elsewhere, and is sampled."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.retrieval.vectors import clustered, save_database, save_index, write_neighbours
from tests.trainer.jobs import resumed_as_whole, train_on
from tests.trainer.task_tars import write_task_tars
from tools import cli
from trainer.loading import load_model

TINY = [
    *("experiment=rdm/rarm", "scale=tiny", "log.wandb=null", "rehearse=false", "data.holdout=0.2"),
    *("batch=4", "lanes=4", "buckets.sizes=[[16, 16]]", "schedule.warmup=0", "schedule.lr=3e-3", "checkpoint.every=2"),
    *("validation.samples=4", "validation.every=4", "samples.every=4", "samples.count=2"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rarm")
    write_task_tars(folder / "tars", 60)
    write_neighbours(folder / "tars", save_index(save_database(folder / "database", [clustered(40, 32, 5)])), 20)
    return folder


def run(world: int, folder: Path, name: str, *overrides: str) -> list[dict]:
    """Train; rows of metrics.jsonl."""
    places = [f"data.sources.drawn.shards={folder}/tars", f"data.fields.neighbours.database={folder}/database"]
    return train_on(world, folder, f"name={name}", *places, *overrides, small=TINY, timeout_s=900)


@pytest.mark.parametrize("engine", ["fsdp", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_it_trains_resumes_goes_on_elsewhere_and_samples(folder: Path, engine: str, capsys):
    whole = resumed_as_whole(run, folder, engine)
    assert whole[-1]["val/loss"] > 0 and (folder / "runs" / engine / "samples/step_00000004.png").stat().st_size > 500

    def sampled(*overrides: str) -> np.ndarray:
        arguments = [f"source={folder}/runs/{engine}", f"out={folder}/out"]
        assert cli.execute(["sample", *arguments, *overrides]) == 0, capsys.readouterr().err
        return np.asarray(Image.open(folder / "out" / "00000.png"), dtype=int)

    first = sampled("fields.neighbours=['[3, 17, 5, 8]']", "seed=1")
    assert first.shape == (16, 16, 3)
    assert np.array_equal(first, sampled("fields.neighbours=['[3, 17, 5, 8]']", "seed=1"))
    assert np.array_equal(
        first, sampled("fields.neighbours=['[3, 17, 5, 8]']", "seed=1", "sampler=codes", "sampler.cached=false")
    )
    assert sampled("seed=1", "neighbours.top_m=1", "sampler=codes", "sampler.top_p=0.5").shape == (16, 16, 3)
    told = Image.open(folder / "out" / "00000.png").text
    assert (
        (told["sampler"], told["guidance"]) == ("CodeSampler", "1.0")
        and told["top_p"] == "0.5"
        and told["neighbours"].startswith("~")
    )
    for refused, reason in ((["image=a.png"], "image: "), (["sampler=ddim"], "sampler: DDIM does not go with")):
        Image.new("RGB", (16, 16)).save(folder / "a.png")
        arguments = [f"source={folder}/runs/{engine}", "fields.neighbours=['[3]']", f"out={folder}/out", *refused]
        assert cli.execute(["sample", *[one.replace("a.png", f"{folder}/a.png") for one in arguments]]) == 2
        assert reason in capsys.readouterr().err


def test_it_learns_which_codes_there_are(folder: Path):
    rows = run(1, folder, "few", "steps=120", "samples.every=null", "validation.every=null", "log.every=20")
    losses = [row["loss"] for row in rows]
    codes = load_model(folder / "runs/few").networks["denoiser"].codes
    assert losses[-1] < 0.8 * losses[0] and losses[0] < 1.5 * math.log(codes)


def test_a_first_stage_of_another_kind_is_refused(folder: Path, capsys):
    places = [f"data.sources.drawn.shards={folder}/tars", f"runs={folder}/refused"]
    for overrides, told in (
        (["experiment=rdm/rarm", "first_stage=identity"], "first_stage: AutoregressiveTransformer is of codes"),
        (["experiment=rdm/rarm", "model.codes=32"], "model.codes is 32, but the first stage gives 64"),
        (["experiment=rdm/rarm", "model.length=63", "buckets.sizes=[[16, 16]]"], "8 x 8 codes are more than length=63"),
        (["experiment=rdm/imagenet", "first_stage=vq_f16_codes"], "first_stage: UNet is of latents"),
    ):
        assert cli.execute(["train", *overrides, "scale=tiny", *places]) == 2
        assert told in capsys.readouterr().err
