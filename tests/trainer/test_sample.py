"""`millrace sample`: the pictures of diffusers' own pipeline from its folder, and reproducible ones from our runs."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conf.compose import compose
from conf.schema import build
from data.draws import Draws
from models.guidance import Guidance
from models.samplers import Euler
from tests.data.curation.tiny_models import save_clip
from tests.models.test_text import CAPTIONS, JOINT, LENGTH, sd3  # noqa: F401 (a fixture)
from tests.trainer.jobs import train_on
from tools import cli
from tools.demo.scenes import write_tars
from trainer import loading
from trainer.checkpoint import CheckpointError
from trainer.loading import load_model
from trainer.samples import pictures_for
from trainer.sampling import SAMPLING_STEP, Picture, draw, grid


@pytest.fixture(scope="module")
def folder(sd3: Path) -> Path:  # noqa: F811
    """A whole Stable Diffusion 3 pipeline of diffusers, tiny and random, saved by diffusers."""
    import diffusers
    from transformers import AutoTokenizer, CLIPTextModelWithProjection, T5EncoderModel

    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=JOINT,
        caption_projection_dim=16,
        pooled_projection_dim=18,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5305,
        shift_factor=0.0609,
    )
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=CLIPTextModelWithProjection.from_pretrained(sd3 / "text_encoder"),
        tokenizer=AutoTokenizer.from_pretrained(sd3 / "tokenizer"),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(sd3 / "text_encoder_2"),
        tokenizer_2=AutoTokenizer.from_pretrained(sd3 / "tokenizer_2"),
        text_encoder_3=T5EncoderModel.from_pretrained(sd3 / "text_encoder_3"),
        tokenizer_3=AutoTokenizer.from_pretrained(sd3 / "tokenizer_3"),
    )
    folder = sd3.parent / "pipeline"
    pipeline.save_pretrained(folder)
    return folder


def test_pictures_are_those_of_diffusers_pipeline(folder: Path):
    import diffusers

    loaded = load_model(folder)
    pictures = [Picture(caption, seed, *loaded.size) for seed, caption in enumerate(CAPTIONS)]
    steps = 6
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    # The same times: the pipeline's scheduler takes ours, before its shift.
    sampler = Euler(steps)
    sigmas = torch.linspace(1, 1 / steps, steps).tolist()
    shape = loaded.networks["first_stage"].latent_shape(*loaded.size)
    noise = [Draws(p.seed, ((SAMPLING_STEP, 0, 0),)).normal("sampling/start", shape) for p in pictures]
    theirs = pipeline(
        prompt=CAPTIONS,
        sigmas=sigmas,
        guidance_scale=3.0,
        latents=torch.cat(noise),
        height=loaded.size[0],
        width=loaded.size[1],
        max_sequence_length=77,
        output_type="pt",
    ).images
    ours = draw(loaded.networks, loaded.process, sampler, Guidance(3.0), pictures, torch.device("cpu"))
    difference = (torch.stack(ours).float() / 255 - theirs).abs()
    assert difference.mean() < 1 / 255
    assert theirs.std() > 0.05, "a blank picture would agree with anything"


def test_the_job_writes_files_that_tell_prompt_and_seed(folder: Path, tmp_path: Path, capsys):
    arguments = [f"source={folder}", f"out={tmp_path}/out", "sampler.steps=2", "seed=5", "each=2"]
    assert cli.execute(["sample", *arguments, "prompts=['a red circle','two, of them']"]) == 0
    picture = Image.open(tmp_path / "out" / "00003.png")
    assert picture.info["prompt"] == "two, of them" and picture.info["seed"] == "6"
    sheet = Image.open(tmp_path / "out" / "grid.png")
    assert json.loads(sheet.info["seeds"]) == [5, 6, 5, 6]
    amid = (tmp_path / "out" / "00003.png").read_bytes()
    # Alone, or among others: the same picture.
    assert cli.execute(["sample", *arguments, "prompts=['two, of them']", "batch=1"]) == 0
    alone = (tmp_path / "out" / "00001.png").read_bytes()
    first, second = (np.asarray(Image.open(io.BytesIO(data)), dtype=int) for data in (amid, alone))
    assert np.abs(first - second).max() <= 1


@pytest.mark.parametrize("seed", [3, 4])
def test_a_random_first_stage_is_the_runs_own_whatever_the_pictures_seed(tmp_path: Path, capsys, seed: int):
    """The run's own grid and the job draw the same picture, through an autoencoder that is in no file."""
    write_tars(tmp_path / "scenes", 20, seed=0)
    model = ["first_stage=kl_tiny", "model.in_channels=4", "model.out_channels=4", "model.patch_size=2"]
    shown = ["samples.every=2", "samples.prompts=['a red circle']", "sampler.steps=3", "buckets=square"]
    data = [f"data.sources.scenes.shards={tmp_path}/scenes", "buckets.size=32", "steps=2"]
    train_on(1, tmp_path, "name=kl", f"seed={seed}", *model, *shown, *data)
    source, out = tmp_path / "runs" / "kl", tmp_path / "out"
    sheet = np.asarray(Image.open(source / "samples" / "step_00000002.png"), dtype=int)
    expected = sheet[::4, ::4][2:-2, 2:-2]  # enlarged four times, with a margin of two
    arguments = [f"source={source}", f"out={out}", "prompts=['a red circle']", "sampler.steps=3", "each=2", "seed=0"]
    assert cli.execute(["sample", *arguments]) == 0
    ours, other = (np.asarray(Image.open(out / f"0000{i}.png"), dtype=int) for i in range(2))
    assert np.abs(ours - expected).max() <= 1
    assert np.abs(other - expected).max() > 20
    # The same picture as the first of another seed: only noise depends on it.
    assert cli.execute(["sample", *arguments[:-2], "seed=1"]) == 0
    assert np.abs(np.asarray(Image.open(out / "00000.png"), dtype=int) - other).max() <= 1


def test_an_image_encoder_sees_held_out_pictures_in_grids_and_given_ones_in_the_job(tmp_path: Path, capsys):
    write_tars(tmp_path / "scenes", 40, seed=0)
    clip = save_clip(tmp_path / "clip")
    conditioner = ["conditioner=clip_image", f"conditioner.encoders.0.model={clip}"]
    widths = ["model.joint_attention_dim=10", "model.pooled_projection_dim=10"]
    shown = ["samples.every=6", "samples.count=2", "sampler.steps=3", "guidance.scale=2"]
    data = [f"data.sources.scenes.shards={tmp_path}/scenes", "buckets=square", "buckets.size=32", "data.flip=true"]
    settings = [
        "data.holdout=0.2",
        "steps=6",
        "schedule=constant",
        "schedule.lr=0.02",
        "schedule.warmup=0",
        "objective.caption_dropout=0.2",
        f"data.cache_folder={tmp_path}/cache",
    ]
    overrides = [*conditioner, *widths, *shown, *data, *settings]
    train_on(1, tmp_path, "name=seen", *overrides)
    sheet = np.asarray(Image.open(tmp_path / "runs/seen/samples/step_00000006.png"), dtype=int)[::4, ::4]

    config = compose("train", overrides)
    held_out = build(config.data).open(build(config.buckets), "validation")
    picture = pictures_for([], 2, held_out)[1]
    assert picture.image is not None and picture.image.float().std() > 10
    Image.fromarray(picture.image.permute(1, 2, 0).numpy()).save(tmp_path / "seen.png")
    job = [f"source={tmp_path}/runs/seen", "sampler.steps=3", "seed=1", f"out={tmp_path}/out"]  # the run's own guidance
    assert cli.execute(["sample", *job, f"images=[{tmp_path}/seen.png]"]) == 0
    drawn = Image.open(tmp_path / "out/00000.png")
    assert drawn.info["image"] == f"{tmp_path}/seen.png"
    given = np.asarray(drawn, dtype=int)
    assert np.abs(given - sheet[2:34, 36:68]).max() <= 1 and float(drawn.text["guidance"]) == 2
    # prompts alone come with the null embedding, under which guidance changes nothing
    assert cli.execute(["sample", *job, "prompts=[a red circle]"]) == 0
    alone = np.asarray(Image.open(tmp_path / "out/00000.png"), dtype=int)
    assert cli.execute(["sample", *job, "guidance.scale=1", "prompts=[something else]"]) == 0
    unguided = np.asarray(Image.open(tmp_path / "out/00000.png"), dtype=int)
    assert np.abs(alone - unguided).max() <= 1 and np.abs(alone - given).max() > 1

    for more, named in [
        (["prompts=[a,b]", f"images=[{clip},{clip},{clip}]"], "2 prompts and 3 images"),
        ([f"images=[{tmp_path}/nothing.png]"], "nothing.png"),
    ]:
        assert cli.execute(["sample", *job, *more]) == 2
        assert named in capsys.readouterr().err


def test_images_for_a_model_that_sees_none_are_refused(folder: Path, tmp_path: Path, capsys):
    assert cli.execute(["sample", f"source={folder}", f"out={tmp_path}", f"images=[{tmp_path}/any.png]"]) == 2
    assert "no encoder of" in capsys.readouterr().err


def test_sources_that_are_no_model_are_named(tmp_path: Path, capsys):
    assert cli.execute(["sample", f"source={tmp_path}", "prompts=[x]"]) != 0
    assert str(tmp_path) in capsys.readouterr().err
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    assert cli.execute(["sample", f"source={tmp_path}", "prompts=[x]"]) != 0
    assert "FluxPipeline" in capsys.readouterr().err


def test_a_grid_holds_pictures_of_several_sizes():
    sheet = grid([torch.zeros(3, 4, 6, dtype=torch.uint8), torch.zeros(3, 6, 4, dtype=torch.uint8)], columns=2, gap=1)
    assert sheet.shape == (3, 8, 15)
    assert int((sheet == 0).sum()) == 3 * 48


def test_a_checkpoint_that_is_not_of_its_configs_model_is_named(tmp_path: Path, monkeypatch):
    write_tars(tmp_path / "scenes", 20, seed=0)
    train_on(1, tmp_path, "name=run", f"data.sources.scenes.shards={tmp_path}/scenes", "steps=1")
    (path,) = (tmp_path / "runs" / "run" / "checkpoints").glob("step_*")
    # As if the model's class had changed since: the record itself is guarded by a checksum.
    record = loading.read_record(path)
    record.config["model"]["num_layers"] = 1
    monkeypatch.setattr(loading, "read_record", lambda _: record)
    with pytest.raises(CheckpointError, match=r"does not fit the denoiser of its own config: \d+ parameters differ"):
        load_model(path)
