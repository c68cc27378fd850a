"""`millrace import` of what hubs have: files without tokenizers, folders of half precision, components in pickle."""

import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPTokenizer

from models.pipeline_folder import PipelineFolder
from tests.models import tiny_pipelines
from tools import cli
from trainer.loading import load_model

END, ZEROTH = "<|endoftext|>", "!"
VOCABULARY = [ZEROTH, "a", "b", "!</w>", "a</w>", "b</w>", "<|startoftext|>", END]


def wide_autoencoder(**options) -> diffusers.AutoencoderKL:
    """Of 32 channels, as many as the groups that files of weights do not tell."""
    options["latent_channels"] = 4
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return diffusers.AutoencoderKL(block_out_channels=(32, 32), layers_per_block=1, **kinds, **options)


WIDE = {"block_out_channels": (64, 128)}
FILES = {
    "sd1": (lambda folder: tiny_pipelines.sd1(folder, **WIDE), [], {"tokenizer": END}),
    "sd2": (
        lambda folder: tiny_pipelines.sd1(folder, use_linear_projection=True, **WIDE),
        ["prediction=epsilon"],
        {"tokenizer": ZEROTH},
    ),
    "sdxl": (lambda folder: tiny_pipelines.sdxl(folder, **WIDE), [], {"tokenizer": END, "tokenizer_2": ZEROTH}),
    "refiner": (lambda folder: tiny_pipelines.refiner(folder, **WIDE), [], {"tokenizer_2": ZEROTH}),
    "sd3": (
        lambda folder: tiny_pipelines.sd3(
            folder, attention_head_dim=64, num_attention_heads=1, caption_projection_dim=64
        ),
        [],
        {"tokenizer": END, "tokenizer_2": ZEROTH},
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_tokenizers_of_files_fill_up_as_their_encoders_were_trained(kind, tmp_path, monkeypatch):
    """OpenCLIP's with token 0, as the published folders of Stable Diffusion 2, XL and 3 have it."""
    make, more, expected = FILES[kind]
    monkeypatch.setattr(tiny_pipelines, "autoencoder", wide_autoencoder)
    folder, file = make(tmp_path), tmp_path / "original.safetensors"
    assert cli.execute(["export", f"source={folder}", f"out={file}"]) == 0
    hub, real = tmp_path / "hub", AutoTokenizer.from_pretrained
    # With a padding token of its own, as laion's folders have.
    CLIPTokenizer({token: i for i, token in enumerate(VOCABULARY)}, [], pad_token=END).save_pretrained(hub)

    def from_pretrained(place, **options):
        return real(hub if "CLIP" in place or "clip" in place else folder / "tokenizer_3", **options)

    with monkeypatch.context() as patch:
        patch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
        assert cli.execute(["import", f"source={file}", "name=it", f"runs={tmp_path}/runs", *more]) == 0
    for name, token in expected.items():
        tokenizer = real(tmp_path / "runs/it" / name)
        ids = tokenizer(["a"], padding="max_length", max_length=5).input_ids[0]
        assert (tokenizer.pad_token, ids) == (token, [6, 4, 7, *[VOCABULARY.index(token)] * 2]), name


@pytest.mark.parametrize(
    "kind, channels, told",
    [
        ("sdxl", 8, "reads 8 channels, 4 beside a latent of 4"),
        ("sd2", 5, "reads 5 channels, 1 beside a latent of 4"),  # Stable Diffusion 2's model of depth
        ("refiner", 9, "reads 9 channels, 5 beside a latent of 4"),
    ],
)
def test_channels_beside_the_latent_that_no_pipeline_has_are_told(kind, channels, told, tmp_path, monkeypatch, capsys):
    """And not taken for InstructPix2Pix."""
    make, more, _ = FILES[kind]
    monkeypatch.setattr(tiny_pipelines, "autoencoder", wide_autoencoder)
    file = tmp_path / "original.safetensors"
    assert cli.execute(["export", f"source={make(tmp_path)}", f"out={file}"]) == 0
    state = load_file(file)
    first = "model.diffusion_model.input_blocks.0.0.weight"
    state[first] = torch.zeros(len(state[first]), channels, 3, 3)
    save_file(state, file)
    capsys.readouterr()
    assert cli.execute(["import", f"source={file}", "name=it", f"runs={tmp_path}/runs", *more]) == 2
    assert f"{file} {told}" in capsys.readouterr().err
    assert not list((tmp_path / "runs").iterdir())


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Of a pipeline's networks."""
    found = {}
    for name in ("unet", "vae", "text_encoder"):
        source = PipelineFolder(folder).tensors(name)
        found |= {f"{name}.{key}": source.read(key) for key in source.names()}
    return found


@pytest.mark.parametrize("dtype", ["null", "float32"])
@pytest.mark.parametrize("shard", ["10GB", "20KB"])
def test_a_folder_of_half_precision_alone_is_opened_and_imported(shard, dtype, tmp_path):
    """Of a variant, in diffusers' word; what is written has names that are opened without one."""
    plain, half = tiny_pipelines.sd1(tmp_path / "made"), tmp_path / "half"
    pipeline = diffusers.DiffusionPipeline.from_pretrained(plain, torch_dtype=torch.float16)
    pipeline.save_pretrained(half, variant="fp16", max_shard_size=shard)
    files = {file.name for file in half.glob("*/*.safetensors*")}
    assert ("diffusion_pytorch_model.safetensors.index.fp16.json" in files) == (shard == "20KB")
    assert all("fp16" in name for name in files)
    told = {name: tensor.half() for name, tensor in tensors_of(plain).items()}
    load_model(half)  # its text encoder, too
    assert cli.execute(["import", f"source={half}", "name=it", f"runs={tmp_path}/runs", f"dtype={dtype}"]) == 0
    for folder in (half, tmp_path / "runs/it"):
        for name, tensor in tensors_of(folder).items():
            assert torch.equal(tensor.half(), told[name]), name
    opened = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "runs/it", torch_dtype=torch.float16)
    for name, tensor in opened.unet.state_dict().items():
        assert torch.equal(tensor, told[f"unet.{name}"]), name
    names = {file.name for file in (tmp_path / "runs/it/unet").iterdir()}
    whole = {"diffusion_pytorch_model.safetensors", "config.json"}
    shards = dtype == "null" and shard == "20KB"
    assert "diffusion_pytorch_model.safetensors.index.json" in names if shards else names == whole


def test_of_several_variants_one_is_to_be_left(tmp_path, capsys):
    folder = tiny_pipelines.sd1(tmp_path / "made")
    whole = folder / "unet" / "diffusion_pytorch_model.safetensors"
    for variant in ("bf16", "fp16"):
        shutil.copyfile(whole, whole.with_suffix(f".{variant}.safetensors"))
    command = ["import", f"source={folder}", f"runs={tmp_path}/runs"]
    assert cli.execute([*command, "name=plain"]) == 0
    whole.unlink()
    assert cli.execute([*command, "name=it"]) == 1
    assert f"{folder}/unet holds no {whole.name}, but several variants of it, bf16, fp16" in capsys.readouterr().err
    whole.with_suffix(".bf16.safetensors").unlink()
    assert cli.execute([*command, "name=it"]) == 0


def test_a_text_encoder_in_pickle_alone_is_refused(tmp_path, capsys):
    folder = tiny_pipelines.sd1(tmp_path / "made")
    (folder / "text_encoder/model.safetensors").rename(folder / "text_encoder/pytorch_model.bin")
    assert cli.execute(["import", f"source={folder}", "name=it", f"runs={tmp_path}/runs"]) == 1
    assert "text_encoder holds neither model.safetensors nor" in capsys.readouterr().err


def test_a_safety_checker_in_pickle_alone_is_left_out_and_told_of(tmp_path, capsys):
    """As some of the folders of Stable Diffusion 1 have it; one in safetensors is copied."""
    folder = tiny_pipelines.sd1(tmp_path / "made")
    towers = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(vision_config=towers | {"image_size": 8, "patch_size": 4}, text_config=towers, projection_dim=8)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        folder, safety_checker=StableDiffusionSafetyChecker(config), feature_extractor=CLIPImageProcessor()
    )
    pipeline.save_pretrained(tmp_path / "checked")
    weights = tmp_path / "checked/safety_checker/model.safetensors"
    command = ["import", f"source={tmp_path}/checked", f"runs={tmp_path}/runs"]
    assert cli.execute([*command, "name=safe"]) == 0
    assert "left out" not in capsys.readouterr().out
    assert diffusers.DiffusionPipeline.from_pretrained(tmp_path / "runs/safe").safety_checker is not None

    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    assert cli.execute([*command, "name=pickled"]) == 0
    assert "safety_checker is left out: it has no safetensors, but pytorch_model.bin" in capsys.readouterr().out
    opened = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "runs/pickled")
    assert opened.safety_checker is None and opened.feature_extractor is not None
    index = PipelineFolder(tmp_path / "runs/pickled").index
    assert index == PipelineFolder(tmp_path / "checked").index | {"safety_checker": [None, None]}
