"""Every experiment at `scale=tiny`, from tars to a sample grid, in this process."""

from pathlib import Path

import pytest

from conf.compose import ROOT
from data.run_directory import read_jsonl
from tests.data.retrieval.vectors import clustered, save_database, write_neighbours
from tests.trainer.task_tars import write_task_tars
from tools import cli
from tools.demo.scenes import write_tars

EXPERIMENTS = sorted(
    path.relative_to(ROOT / "experiment").with_suffix("").as_posix() for path in (ROOT / "experiment").rglob("*.yaml")
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Scenes, and a text encoder that the first run trains for all; pictures with classes, boxes, maps."""
    folder = tmp_path_factory.mktemp("experiments")
    write_tars(folder / "scenes", 60, seed=0)
    write_task_tars(folder / "fields", 60)
    write_neighbours(folder / "fields", save_database(folder / "database", [clustered(40, 32, 5)]), 20)
    return folder


@pytest.mark.parametrize(
    "chosen",
    [f"experiment={name}" for name in EXPERIMENTS] + ["first_stage=kl_tiny", "first_stage=kl_sd3", "model=unet_pixels"],
)
def test_it_trains_validates_saves_and_samples(folder, chosen):
    name = chosen.replace("/", "_")
    neighbours = chosen.startswith("experiment=rdm/")
    task = neighbours or (chosen.startswith("experiment=ldm/") and "autoencoder" not in chosen)
    with_fields = task or chosen == "experiment=sdxl/refiner"
    arguments = [
        *("train", chosen, "scale=tiny", "steps=2", "samples.every=2", "validation.every=2", "log.wandb=null"),
        *(f"runs={folder}/runs", f"name={name}", f"data.cache_folder={folder}/cache"),
        *([f"data.fields.neighbours.database={folder}/database"] if neighbours else []),
        *([] if task else [f"conditioner.folder={folder}/text_encoder"]),
        f"data.sources.some.shards={folder / ('fields' if with_fields else 'scenes')}",
    ]
    assert cli.execute(arguments) == 0
    run = folder / "runs" / name
    rows = read_jsonl(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2] and rows[-1]["val/loss"] > 0
    assert (run / "checkpoints/step_00000002/committed.json").exists()
    assert (run / "samples/step_00000002.png").stat().st_size > 500
