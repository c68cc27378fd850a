"""Latent diffusion's tasks at tiny scale on two ranks: trained under both engines, resumed to the bit, sampled from."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.trainer.jobs import train_on
from tests.trainer.task_tars import write_task_tars
from tools import cli
from trainer.checkpoint import load_weights

TINY = [
    *("scale=tiny", "log.wandb=null", "rehearse=false", "data.holdout=0.2", "data.log_keys=true", "data.flip=true"),
    *("batch=4", "lanes=2", "buckets.sizes=[[16, 16]]", "sampler.steps=2", "schedule.warmup=0", "schedule.lr=1e-3"),
    *("validation.samples=4", "validation.every=4", "samples.every=4", "samples.count=2", "checkpoint.every=2"),
]
LOW = "fields.low_resolution=['{folder}/low.png','{folder}/other.png']"
# What `millrace sample` is given.
TASKS: dict[str, list[str]] = {
    "celebahq": [],
    "imagenet": ["fields.class=[1,3]"],
    "text2img": ["prompts=[red and blue,green]"],
    "layout_openimages": ["fields.boxes=['[[4,4,8,8,1]]','{folder}/boxes.json']"],
    "semantic": ["fields.map=['{folder}/map.png','{folder}/other_map.png']"],
    "super_resolution": [LOW, "fields.noise_level=[0.05]"],
    "inpainting": ["images=['{folder}/picture.png']", "fields.mask=['{folder}/mask.png','{folder}/other_mask.png']"],
}
# In pixels, as `scale=tiny` has it, and in latents.
RUNS = [(task, None) for task in TASKS] + [("imagenet", "vq_f4"), ("inpainting", "vq_f4_noattn")]
LEARNED = {"imagenet": "encoder", "text2img": "encoder", "layout_openimages": "encoder", "semantic": "maps"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_task_tars(folder / "tars", 60)
    rng = np.random.default_rng(0)
    for name, size in (("picture", 16), ("low", 4), ("other", 4)):
        Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    for prefix, side in (("", 5), ("other_", 10)):
        labels = np.zeros((16, 16), np.uint8)
        labels[:side, 3:12] = 2
        Image.fromarray(labels).save(folder / f"{prefix}map.png")
        Image.fromarray(labels // 2 * 255).save(folder / f"{prefix}mask.png")
    (folder / "boxes.json").write_text('[{"bbox": [0, 0, 10, 15], "category_id": 2}]')
    return folder


def run(world: int, folder: Path, name: str, *overrides: str) -> list[dict]:
    """Train; rows of metrics.jsonl."""
    source = f"data.sources.drawn.shards={folder}/tars"
    return train_on(world, folder, f"name={name}", source, *overrides, small=TINY, timeout_s=900)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
@pytest.mark.parametrize(("task", "first_stage"), RUNS)
def test_it_trains_resumes_and_samples(folder: Path, task: str, first_stage: str | None, engine: str, capsys):
    name = f"{task}_{first_stage}_{engine}"
    chosen = [f"experiment=ldm/{task}", f"engine={engine}"]
    chosen += [f"first_stage={first_stage}"] if first_stage is not None else []
    whole = run(2, folder, name, *chosen, "steps=4")
    run(2, folder, f"{name}_twice", *chosen, "steps=2")
    twice = run(2, folder, f"{name}_twice", *chosen, "steps=4")
    assert [row["step"] for row in whole] == [1, 2, 3, 4] == [row["step"] for row in twice]
    for first, second in zip(whole, twice, strict=True):
        assert first["loss"] == second["loss"] and first["grad_norm"] == second["grad_norm"] and first["loss"] > 0
    assert whole[-1]["val/loss"] == twice[-1]["val/loss"] > 0
    runs = folder / "runs"
    for part in ("denoiser", *(["conditioner"] if task in LEARNED else [])):
        ends = [load_weights(runs / r / "checkpoints/step_00000004", part) for r in (name, f"{name}_twice")]
        assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
        before = load_weights(runs / name / "checkpoints/step_00000002", part)
        assert any(not torch.equal(before[key], ends[0][key]) for key in before), f"{part} learns"
        assert part == "denoiser" or all(key.startswith(LEARNED[task]) for key in before)
    keys = [(runs / r / "keys.jsonl").read_bytes() for r in (name, f"{name}_twice")]
    assert keys[0] == keys[1]
    assert (runs / name / "samples/step_00000004.png").stat().st_size > 500

    arguments = [f"source={runs}/{name}", f"out={folder}/out", "sampler.steps=2", "each=2"]
    given = [text.replace("{folder}", str(folder)) for text in TASKS[task]]
    assert cli.execute(["sample", *arguments, *given]) == 0, capsys.readouterr().err
    count = 4 if given else 2
    pictures = [np.asarray(Image.open(folder / "out" / f"{i:05d}.png"), dtype=int) for i in range(count)]
    assert all(picture.shape == (16, 16, 3) for picture in pictures)
    if first_stage is not None:
        return  # a decoder of random weights makes all latents grey
    assert np.abs(pictures[0] - pictures[1]).max() > 0, "another seed"
    if given:
        assert np.abs(pictures[0] - pictures[2]).max() > 0, "another condition"


def test_one_rank_and_two_take_the_same_steps(folder: Path):
    chosen = ["experiment=ldm/inpainting", "steps=2", "samples.every=null", "validation.every=null"]
    one = run(1, folder, "alone", *chosen)
    two = run(2, folder, "together", *chosen)
    assert (folder / "runs/alone/keys.jsonl").read_bytes() == (folder / "runs/together/keys.jsonl").read_bytes()
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-5)


def test_sampling_beyond_the_size_of_training(folder: Path, capsys):
    run(1, folder, "wide", "experiment=ldm/semantic", "steps=2", "samples.every=null", "validation.every=null")
    source = [f"source={folder}/runs/wide", f"out={folder}/wide", "sampler.steps=2"]
    assert cli.execute(["sample", *source, f"fields.map=[{folder}/map.png]", "height=32", "width=48"]) == 0
    assert Image.open(folder / "wide/00000.png").size == (48, 32)
    run(1, folder, "large", "experiment=ldm/super_resolution", "steps=2", "samples.every=null", "validation.every=null")
    Image.new("RGB", (20, 12), "red").save(folder / "small.png")
    source = [f"source={folder}/runs/large", f"out={folder}/large", "sampler.steps=2"]
    assert cli.execute(["sample", *source, f"fields.low_resolution=[{folder}/small.png]"]) == 0
    assert Image.open(folder / "large/00000.png").size == (80, 48)
    assert cli.execute(["sample", *source, f"fields.mask=[{folder}/mask.png]"]) == 2
    assert "fields.mask: the model was trained without such a field" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "given"),
    [
        ("imagenet", "fields.class=[0]"),
        ("text2img", "prompts=['a red circle'] or prompts_file=<a prompt a line>"),
        ("layout_openimages", "fields.boxes=[a.json]"),
        ("semantic", "fields.map=[a.png]"),
        ("super_resolution", "fields.low_resolution=[a.png]"),
    ],
)
def test_what_is_to_be_given_is_what_the_model_reads(folder: Path, task: str, given: str, capsys):
    experiment = [f"experiment=ldm/{task}", "steps=1", "samples.every=null", "validation.every=null"]
    run(1, folder, f"asks_{task}", *experiment)
    source = [f"source={folder}/runs/asks_{task}", f"out={folder}/out"]
    assert cli.execute(["sample", *source]) == 2
    assert f"there is nothing to draw: give {given}." in capsys.readouterr().err
    if task in ("semantic", "super_resolution"):
        assert cli.execute(["sample", *source, "prompts=[a red circle]"]) == 2
        assert f"draws nothing without it: give {given}" in capsys.readouterr().err


def test_guidance_that_cannot_act_is_refused_and_a_runs_own_falls_back(folder: Path, capsys):
    """Where nothing is left out of the unconditional prediction, and where no picture lies beside the latent."""
    quick = ["steps=1", "samples.every=1", "validation.every=null", "guidance=cfg", "guidance.scale=3"]
    run(1, folder, "unguided", "experiment=ldm/celebahq", *quick)
    run(1, folder, "classes", "experiment=ldm/imagenet", *quick)
    source = ["sample", f"source={folder}/runs/unguided", f"out={folder}/unguided", "sampler.steps=2"]
    for more in (["guidance.scale=3"], ["guidance=cfg", "guidance.scale=3"]):
        assert cli.execute([*source, *more]) == 2
        assert "guidance.scale=3: there is nothing that" in capsys.readouterr().err
    pictures = []
    for more in ([], ["guidance.scale=1"]):
        assert cli.execute([*source, *more]) == 0
        drawn = Image.open(folder / "unguided/00000.png")
        assert float(drawn.text["guidance"]) == 1 and "picture_scale" not in drawn.text
        pictures.append(np.asarray(drawn))
    assert np.array_equal(*pictures)
    source = ["sample", f"source={folder}/runs/classes", f"out={folder}/classes", "fields.class=[1]", "sampler.steps=2"]
    assert cli.execute([*source, "guidance.picture_scale=1.5"]) == 2
    assert "guidance.picture_scale=1.5: " in capsys.readouterr().err
    assert cli.execute(source) == 0
    assert float(Image.open(folder / "classes/00000.png").text["guidance"]) == 3


def test_a_low_resolution_picture_is_sampled_without_noise_unless_it_is_told(folder: Path):
    run(1, folder, "low", "experiment=ldm/super_resolution", "steps=1", "samples.every=null", "validation.every=null")
    source = [f"source={folder}/runs/low", f"out={folder}/low", "sampler.steps=2", LOW.replace("{folder}", str(folder))]
    pictures = []
    for more in ([], ["fields.noise_level=[0]"], ["fields.noise_level=[0.1]"]):
        assert cli.execute(["sample", *source, *more]) == 0
        drawn = Image.open(folder / "low/00000.png")
        assert float(drawn.text["noise_level"]) == (0.1 if "0.1" in str(more) else 0)
        pictures.append(np.asarray(drawn, dtype=int))
    assert np.array_equal(pictures[0], pictures[1]) and not np.array_equal(pictures[0], pictures[2])


REFUSED = [
    (["experiment=ldm/imagenet", "~data.fields.class"], "data.fields.class is missing: the conditioner reads it"),
    (["experiment=ldm/imagenet", "objective.train_conditioner=false"], "set objective.train_conditioner=true"),
    (["experiment=ldm/celebahq", "objective.train_conditioner=true"], "the conditioner is frozen"),
    (["experiment=ldm/inpainting", "model.concat_channels=3"], "the conditioner's maps have 4 channels"),
    (["experiment=ldm/semantic", "model=mmdit_pixels"], "MMDiT takes nothing beside the latent"),
    (["experiment=ldm/imagenet", "model=ldm_celebahq"], "it reads no context"),
    (
        ["experiment=ldm/imagenet", "model.cross_attention_dim=16"],
        "model.cross_attention_dim is 16, but the",
    ),
]


@pytest.mark.parametrize(("overrides", "reason"), REFUSED)
def test_parts_that_do_not_fit_are_refused_before_anything_starts(folder: Path, overrides, reason, capsys):
    assert cli.execute(["train", "scale=tiny", f"data.sources.drawn.shards={folder}/tars", *overrides]) == 2
    assert reason in capsys.readouterr().err


def test_an_image_and_a_mask_are_what_an_inpainting_model_reads(folder: Path):
    run(1, folder, "hole", "experiment=ldm/inpainting", "steps=2", "samples.every=null", "validation.every=null")
    source = [f"source={folder}/runs/hole", f"out={folder}/hole", "sampler.steps=2"]
    pictures = []
    for given in (
        [f"images=[{folder}/picture.png]", f"fields.mask=[{folder}/mask.png]"],
        [f"image={folder}/picture.png", f"mask={folder}/mask.png"],
        [f"image={folder}/picture.png", f"mask={folder}/other_mask.png"],
    ):
        assert cli.execute(["sample", *source, *given]) == 0
        pictures.append(np.asarray(Image.open(folder / "hole/00000.png"), dtype=int))
    assert np.array_equal(pictures[0], pictures[1]) and not np.array_equal(pictures[0], pictures[2])
