"""`millrace import` and `millrace export`: folders that diffusers opens and draws the same pictures with."""

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from conf.compose import compose
from conf.schema import build, check
from models.guidance import Guidance
from models.original.checkpoint import to_original
from models.pipeline_folder import ComponentTensors, PipelineFolder
from tests.models import tiny_pipelines
from tests.trainer.jobs import QUICK, train_on
from tools import cli
from tools.demo.scenes import write_tars
from trainer.engines.networks import prepare_frozen
from trainer.loading import load_first_stage, load_model
from trainer.pipelines import process_node
from trainer.published import scheduler_of
from trainer.sample import sampler_of
from trainer.sampling import OwnSampler, Picture, SamplingDraws, draw_pass
from trainer.train import Config as TrainConfig

KINDS = {
    "sd1": tiny_pipelines.sd1,
    "sdxl": tiny_pipelines.sdxl,
    "refiner": tiny_pipelines.refiner,
    "sd3": tiny_pipelines.sd3,
}
kinds = pytest.mark.parametrize("kind", KINDS)
# What reads a picture beside the latent.
BESIDE = {
    "inpainting": tiny_pipelines.inpainting,
    "sdxl_inpainting": tiny_pipelines.sdxl_inpainting,
    "editing": tiny_pipelines.editing,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folders: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = (KINDS | BESIDE)[kind](tmp_path_factory.mktemp(kind))
            # What a release to come may write.
            for part in (PipelineFolder(folders[kind]).denoiser, "vae"):
                file = folders[kind] / part / "config.json"
                file.write_text(json.dumps(json.loads(file.read_text()) | {"a_key_of_next_year": [1, 2]}))
        return folders[kind]

    return make


def weights(folder: Path) -> dict[str, torch.Tensor]:
    pipeline = PipelineFolder(folder)
    networks = [name for name in pipeline.components if not name.startswith(("tokenizer", "scheduler"))]
    sources = {name: pipeline.tensors(name) for name in networks}
    return {f"{name}.{key}": source.read(key) for name, source in sources.items() for key in source.names()}


def assert_same_weights(a: Path, b: Path) -> None:
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("kind", KINDS | BESIDE)
def test_a_pipeline_comes_back_from_import_and_export(kind, made, tmp_path):
    runs, out = tmp_path / "runs", tmp_path / "out"
    assert cli.execute(["import", f"source={made(kind)}", "name=it", f"runs={runs}"]) == 0
    assert cli.execute(["export", f"source={runs}/it", f"out={out}"]) == 0
    assert_same_weights(out, made(kind))
    before, after = PipelineFolder(made(kind)), PipelineFolder(out)
    assert after.index == before.index
    for name in before.components:
        assert after.config(name) == before.config(name), name


@pytest.mark.parametrize("kind", KINDS | BESIDE)
def test_a_file_in_the_authors_layout_comes_back_as_the_folder(kind, made, tmp_path, capsys):
    file, beside = tmp_path / "original.safetensors", tmp_path / "original-of-another.safetensors"
    beside.write_text("kept")
    assert cli.execute(["export", f"source={made(kind)}", f"out={file}"]) == 0
    command = ["import", f"source={file}", f"runs={tmp_path}/runs"]
    assert cli.execute([*command, "name=it", f"like={made(kind)}"]) == 0
    assert_same_weights(tmp_path / "runs" / "it", made(kind))
    assert beside.read_text() == "kept"
    assert PipelineFolder(tmp_path / "runs" / "it").kind == PipelineFolder(made(kind)).kind
    diffusers.DiffusionPipeline.from_pretrained(tmp_path / "runs" / "it")
    # It lies there, and is not written over.
    assert cli.execute([*command, "name=it", f"like={made(kind)}"]) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_are_written_in_another_type_and_in_shards(dtype, made, tmp_path):
    command = ["export", f"source={made('sd3')}", f"dtype={dtype}", "shard_bytes=40000"]
    assert cli.execute([*command, f"out={tmp_path}/out"]) == 0
    assert (tmp_path / "out/transformer/diffusion_pytorch_model.safetensors.index.json").is_file()
    opened = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / "out/transformer", torch_dtype="auto")
    kept = weights(made("sd3"))
    for name, tensor in opened.state_dict().items():
        assert torch.equal(tensor, kept[f"transformer.{name}"].to(getattr(torch, dtype)).to(tensor.dtype)), name
    assert {t.dtype for t in weights(tmp_path / "out").values()} == {getattr(torch, dtype)}


def tuned(folder: Path, tmp_path: Path, name: str, *overrides: str) -> Path:
    """A run that begins with imported weights."""
    write_tars(tmp_path / "scenes", 20, seed=0)
    data = [f"data.sources.scenes.shards={tmp_path}/scenes", "buckets=square", "buckets.size=16"]
    steps = ["steps=2", "batch=4", "lanes=2", *overrides]
    train_on(1, tmp_path, f"name={name}", f"experiment={folder}/experiment.yaml", *data, *steps, small=QUICK)
    return tmp_path / "runs" / name


@kinds
def test_an_imported_model_is_trained_on_and_drawn_by_diffusers(kind, made, tmp_path):
    """Full fine-tuning: weights that begin as the imported ones, and end in a pipeline that draws what we draw."""
    assert cli.execute(["import", f"source={made(kind)}", "name=base", f"runs={tmp_path}/runs"]) == 0
    run = tuned(tmp_path / "runs/base", tmp_path, "tuned", "schedule.lr=0.001", "ema=none")
    assert cli.execute(["export", f"source={run}", f"out={tmp_path}/out"]) == 0
    ours, theirs = PipelineFolder(tmp_path / "out"), PipelineFolder(made(kind))
    assert ours.index == theirs.index | {"_diffusers_version": ours.index["_diffusers_version"]}
    assert ours.config("scheduler") == theirs.config("scheduler")
    for part in (ours.denoiser, "vae"):
        assert ours.config(part)["a_key_of_next_year"] == [1, 2]
    before, after = weights(made(kind)), weights(tmp_path / "out")
    changed = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {ours.denoiser}

    loaded = load_model(run)
    if kind == "refiner":
        return
    shape = loaded.networks["first_stage"].latent_shape(16, 16)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        "a red circle",
        num_inference_steps=4,
        guidance_scale=3.0,
        latents=SamplingDraws([0]).normal("sampling/start", shape),
        height=16,
        width=16,
        output_type="pt",
        **({"max_sequence_length": 77} if kind == "sd3" else {}),  # of T5, as it is trained with
    ).images
    pictures = [Picture("a red circle", 0, 16, 16)]
    exported = load_model(tmp_path / "out")
    sampler = sampler_of(OwnSampler(4), exported)
    for name, network in loaded.networks.items():
        prepare_frozen(name, network, False, "fp32", 0, torch.device("cpu"))
    images = draw_pass(loaded.networks, loaded.process, sampler, Guidance(3.0), pictures, torch.device("cpu"))
    assert (torch.stack(images).float() / 255 - expected).abs().mean() < 1 / 255


def test_a_run_of_imported_weights_is_planned(made, tmp_path, capsys):
    """With its own folders, and adapters: what a plan does without is not read."""
    assert cli.execute(["import", f"source={made('sd1')}", "name=base", f"runs={tmp_path}/runs"]) == 0
    command = ["plan", f"experiment={tmp_path}/runs/base/experiment.yaml", "buckets=square", "buckets.size=16"]
    command += ["batch=8", "lanes=2", "cluster.processes=2", "adapter=lora", "objective.train_conditioner=true"]
    assert cli.execute([*command, "adapter.text_targets=[q_proj]"]) == 0
    assert "fits: " in capsys.readouterr().out


@pytest.mark.parametrize("kind", BESIDE)
def test_what_reads_a_picture_beside_the_latent_is_trained_on(kind, made, tmp_path):
    assert cli.execute(["import", f"source={made(kind)}", "name=base", f"runs={tmp_path}/runs"]) == 0
    field = ["data.fields.original.member=jpg", "data.sources.scenes.where=list_contains(extensions, 'jpg')"]
    run = tuned(tmp_path / "runs/base", tmp_path, "tuned", "ema=none", *(field if kind == "editing" else []))
    assert cli.execute(["export", f"source={run}", f"out={tmp_path}/out"]) == 0
    assert PipelineFolder(tmp_path / "out").kind == PipelineFolder(made(kind)).kind
    before, after = weights(made(kind)), weights(tmp_path / "out")
    changed = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"unet"}
    diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")


def test_a_model_of_text_begins_to_learn_to_edit(made, tmp_path):
    """Channels for the picture beside the latent begin at zero, all others as they were."""
    assert cli.execute(["import", f"source={made('sd1')}", "name=base", f"runs={tmp_path}/runs"]) == 0
    reads = "{_target_: models.conditions.PictureMap, field: original, channels: 4, encode: true, scaled: false}"
    more = ["model.concat_channels=4", f"+conditioner.maps=[{reads}]", "schedule.lr=1e-9", "ema=none"]
    more += ["data.fields.original._target_=data.fields.Picture", "data.fields.original.member=jpg"]
    run = tuned(
        tmp_path / "runs/base", tmp_path, "edits", *more, "data.sources.scenes.where=list_contains(extensions, 'jpg')"
    )
    assert cli.execute(["export", f"source={run}", f"out={tmp_path}/out"]) == 0
    assert PipelineFolder(tmp_path / "out").kind == "StableDiffusionInstructPix2PixPipeline"
    before, after = (weights(folder)["unet.conv_in.weight"] for folder in (made("sd1"), tmp_path / "out"))
    assert after.shape[1] == 8 and after[:, 4:].abs().max() < 1e-6
    assert torch.allclose(after[:, :4], before, atol=1e-6)


def test_a_file_of_a_unet_alone_takes_the_rest_from_a_pipeline_like_it(made, tmp_path, capsys):
    whole, alone = tmp_path / "whole.safetensors", tmp_path / "alone.safetensors"
    assert cli.execute(["export", f"source={made('sd1')}", f"out={whole}"]) == 0
    save_file({k: v + 1 for k, v in load_file(whole).items() if k.startswith("model.diffusion_model.")}, alone)
    command = ["import", f"source={alone}", "name=it", f"runs={tmp_path}/runs"]
    assert cli.execute(command) == 1
    assert "name a pipeline like it" in capsys.readouterr().err
    assert cli.execute([*command, f"like={made('sd1')}"]) == 0
    ours, like = weights(tmp_path / "runs/it"), weights(made("sd1"))
    assert ours.keys() == like.keys()
    for name in ours:
        assert torch.equal(ours[name], like[name] + name.startswith("unet.")), name


def test_numbers_of_8_bits_are_read_and_written_in_16(made, tmp_path, capsys):
    """SD3 is also published with its T5 so."""
    whole, small = tmp_path / "whole.safetensors", tmp_path / "small.safetensors"
    assert cli.execute(["export", f"source={made('sd3')}", f"out={whole}"]) == 0
    state = {key: value.to(torch.float8_e4m3fn) for key, value in load_file(whole).items()}
    save_file(state, small)
    command = ["import", f"source={small}", f"runs={tmp_path}/runs", f"like={made('sd3')}"]
    assert cli.execute([*command, "name=it"]) == 0
    ours, before = weights(tmp_path / "runs/it"), weights(made("sd3"))
    assert {tensor.dtype for tensor in ours.values()} == {torch.float16}
    for name, tensor in ours.items():
        assert torch.equal(tensor, before[name].to(torch.float8_e4m3fn).to(torch.float16)), name
    save_file(state | {"model.diffusion_model.context_embedder.scale_weight": torch.ones(1)}, small)
    assert cli.execute([*command, "name=scaled"]) == 1
    assert "kept divided by scales" in capsys.readouterr().err


def test_a_file_that_lacks_weights_is_refused(made, tmp_path, capsys):
    file = tmp_path / "whole.safetensors"
    assert cli.execute(["export", f"source={made('sd1')}", f"out={file}"]) == 0
    state = load_file(file)
    for lost in ("model.diffusion_model.middle_block.2.out_layers.3.weight", "first_stage_model.decoder.conv_in.bias"):
        save_file({name: tensor for name, tensor in state.items() if name != lost}, file)
        assert cli.execute(["import", f"source={file}", "name=it", f"runs={tmp_path}/runs", f"like={made('sd1')}"]) == 1
        assert "missing: " in capsys.readouterr().err
        assert not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_a_file_of_an_autoencoder_alone_becomes_a_first_stage(kind, tmp_path, capsys):
    """As its authors save it, beside what only training needs. The vector-quantised one attends at a level, and not in
    the middle, which diffusers' reader of such files does not know of."""
    torch.manual_seed(0)
    small = {"block_out_channels": (32, 64), "layers_per_block": 1, "latent_channels": 3}
    if kind == "kl":
        types = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
        theirs: Any = diffusers.AutoencoderKL(**small, **types, scaling_factor=0.3)
        component, scale = "vae", 0.3
    else:
        types = {
            "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
            "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
        }
        codes = {"num_vq_embeddings": 9, "vq_embed_dim": 2, "mid_block_add_attention": False}
        theirs = diffusers.VQModel(**small, **types, **codes)
        component, scale = "vqvae", 1.0
    theirs.save_pretrained(tmp_path / "theirs")
    source = ComponentTensors(tmp_path / "theirs")
    layout, tensors, left_out = to_original(kind, {component: source}, {component: dict(theirs.config)})
    assert not left_out and ("encoder.down.1.attn.0.q.weight" in layout) == (kind == "vq")
    training = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.bias": torch.zeros(4)}
    file = tmp_path / "model.ckpt"
    torch.save({"state_dict": dict(tensors) | training}, file)

    command = ["import", f"source={file}", "name=it", f"runs={tmp_path}/runs"]
    if kind == "kl":
        assert cli.execute(command) == 2
        assert "scaling_factor: " in capsys.readouterr().err
        command.append("scaling_factor=0.3")
        again = diffusers.AutoencoderKL.from_single_file(str(file), config=str(tmp_path / "theirs"))
        assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in theirs.state_dict().items())
    assert cli.execute(command) == 0
    reopened = type(theirs).from_pretrained(tmp_path / "runs/it" / component)
    assert all(torch.equal(tensor, reopened.state_dict()[name]) for name, tensor in theirs.state_dict().items())
    first_stage = load_first_stage(tmp_path / "runs/it").first_stage
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        encoded = theirs.encode(images)
        expected = encoded.latent_dist.mean if kind == "kl" else encoded.latents
        latents = first_stage.encode(images)
        torch.testing.assert_close(latents, scale * expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(first_stage.decode(latents), theirs.decode(expected).sample, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "overrides, told",
    [
        (["process=v_zero_snr"], {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
        (["process=eps_ddpm"], {"beta_schedule": "linear", "beta_end": 0.02}),
        (["process=eps_linear", "process.parameterization._target_=models.parameterizations.Image"], {}),
    ],
)
def test_processes_come_back_from_schedulers(overrides, told):
    """What a run was trained with, as diffusers' scheduler, has the same levels and prediction there, and is the same
    process again here."""
    process = OmegaConf.to_container(compose("train", overrides).process, resolve=True)
    for pipeline in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"):
        config = scheduler_of(process, pipeline)
        assert config.items() >= told.items()
        scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
        again, ours = build(process_node(config)), build(process)
        t = torch.arange(1, 1001, dtype=torch.float64) / 1000
        assert torch.allclose(ours.alpha_sigma(t)[0] ** 2, scheduler.alphas_cumprod.double(), rtol=1e-3, atol=1e-7)
        assert torch.equal(ours.alpha_sigma(t)[0], again.alpha_sigma(t)[0])
        assert type(ours.parameterization) is type(again.parameterization)


def test_a_run_without_a_pipeline_gives_components_and_says_why(tmp_path, capsys):
    write_tars(tmp_path / "scenes", 20, seed=0)
    train_on(1, tmp_path, "name=run", f"data.sources.scenes.shards={tmp_path}/scenes", "steps=1")
    assert cli.execute(["export", f"source={tmp_path}/runs/run", f"out={tmp_path}/out"]) == 0
    assert "components alone" in (told := capsys.readouterr().out) and "AbsentEncoder" in told
    opened = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / "out/transformer")
    assert (
        load_file(tmp_path / "out/transformer/diffusion_pytorch_model.safetensors").keys() == opened.state_dict().keys()
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["transformer"]
    assert cli.execute(["export", f"source={tmp_path}/runs/run", f"out={tmp_path}/one.safetensors"]) == 2
    assert "whole pipeline" in capsys.readouterr().err


def test_mistakes_are_one_sentence_each(made, tmp_path, capsys):
    runs = f"runs={tmp_path}/runs"
    for more, named in [
        ([f"source={tmp_path}/nothing"], "neither a folder nor a file"),
        ([f"source={made('sd1')}", f"like={made('sd1')}"], "like: "),
        ([f"source={made('sd1')}", "name=../x"], "no folder within"),
    ]:
        assert cli.execute(["import", "name=x", runs, *more]) == 2
        assert named in capsys.readouterr().err
    assert not (tmp_path / "runs" / "x").exists()
    assert cli.execute(["train", f"experiment={tmp_path}/no.yaml"]) == 2
    assert "no such file" in capsys.readouterr().err


def test_an_experiment_of_a_file_gives_way_to_the_command_line(made, tmp_path):
    assert cli.execute(["import", f"source={made('sd3')}", "name=it", f"runs={tmp_path}"]) == 0
    experiment = f"experiment={tmp_path}/it/experiment.yaml"
    config = compose("train", [experiment])
    check(config, TrainConfig)
    assert config.model.num_layers == 3 and config.process.shift == 3.0
    assert config.init_from.networks.denoiser == "transformer"
    config = compose("train", [experiment, "model=mmdit", "process.shift=2.0", "sampler=heun"])
    assert config.model.num_layers == 4 and config.process.shift == 2.0
    assert config.sampler._target_.endswith("Heun")
