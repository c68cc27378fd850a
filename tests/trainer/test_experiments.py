"""Every experiment at `scale=tiny`, from tars to a sample grid, in this process; sizes at full scale."""

from pathlib import Path

import pytest
import torch

from conf.compose import ROOT, compose
from conf.schema import build
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


@pytest.mark.parametrize(("task", "millions"), [("text2img", 1450), ("layout_openimages", 306)])
def test_whole_models_are_as_large_as_published_with_logits_of_their_tokens(task, millions):
    """The paper's 1.45 B and 306 M count, of the transformer over tokens, logits that nothing reads, too."""
    config = compose("train", [f"experiment=ldm/{task}"], missing="null")
    with torch.device("meta"):
        parts = [build(config[part]) for part in ("model", "conditioner")]
    (table,) = [p for name, p in parts[1].named_parameters() if name.endswith("embed_tokens.weight")]
    tokens, width = table.shape
    logits = tokens * (width + 1)
    assert sum(p.numel() for part in parts for p in part.parameters()) + logits == pytest.approx(
        millions * 1e6, rel=4e-3
    )
