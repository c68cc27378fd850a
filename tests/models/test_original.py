"""Checkpoints in their authors' layout, against diffusers' own readers of single files."""

from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from models.original import configs
from models.original.checkpoint import FAMILIES, OriginalCheckpoint, to_original
from models.pipeline_folder import PipelineFolder
from models.tensor_files import open_file, write_file
from tests.models import tiny_pipelines

KINDS = {
    "sd1": (tiny_pipelines.sd1, {}),
    "sd2": (tiny_pipelines.sd1, {"use_linear_projection": True, "attention_head_dim": [2, 4], "scheduler": "v"}),
    "sdxl": (tiny_pipelines.sdxl, {}),
    "sdxl_refiner": (tiny_pipelines.refiner, {}),
    "sd3": (tiny_pipelines.sd3, {}),
}
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Of each kind a pipeline's folder, and its weights as an original file that we wrote."""
    done: dict[str, tuple[PipelineFolder, Path]] = {}

    def make(kind: str) -> tuple[PipelineFolder, Path]:
        if kind not in done:
            build, options = KINDS[kind]
            at = tmp_path_factory.mktemp(kind)
            folder = PipelineFolder(build(at, **options))
            parts = [name for name in FAMILIES[kind].components if name in folder.components]
            layout, tensors, left_out = to_original(
                kind, {name: folder.tensors(name) for name in parts}, {name: folder.config(name) for name in parts}
            )
            assert not left_out
            write_file(at / "original.safetensors", layout, tensors)
            done[kind] = folder, at / "original.safetensors"
        return done[kind]

    return make


def networks(pipeline) -> dict[str, dict[str, torch.Tensor]]:
    return {name: part.state_dict() for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


@kinds
def test_diffusers_reads_the_same_weights_from_our_single_file(kind, made):
    folder, file = made(kind)
    ours = getattr(diffusers, folder.kind).from_single_file(str(file), config=str(folder.path), local_files_only=True)
    theirs = diffusers.DiffusionPipeline.from_pretrained(folder.path)
    assert networks(ours).keys() == networks(theirs).keys()
    for name, state in networks(theirs).items():
        again = networks(ours)[name]
        assert again.keys() == state.keys()
        for key in state:
            assert torch.equal(again[key], state[key]), f"{name}.{key}"


@kinds
@pytest.mark.parametrize("archive", [False, True])
def test_our_reading_of_the_single_file_is_the_folder(kind, archive, made, tmp_path):
    folder, file = made(kind)
    if archive:
        torch.save({"state_dict": load_file(file), "global_step": 5}, tmp_path / "original.ckpt")
        file = tmp_path / "original.ckpt"
    given = {name: folder.config(name) for name in folder.components}
    checkpoint = OriginalCheckpoint(open_file(file), given)
    assert checkpoint.kind == kind and checkpoint.family.pipeline == folder.kind
    twice = ["text_encoders.t5xxl.transformer.encoder.embed_tokens.weight"]
    assert checkpoint.unused() == (twice if kind == "sd3" else [])
    for name in checkpoint.components:
        source = folder.tensors(name)
        layout, read = checkpoint.layout(name), dict(checkpoint.tensors(name))
        assert read.keys() == layout.keys() == set(source.names())
        for key in read:
            assert torch.equal(read[key], source.read(key)), f"{name}.{key}"
            assert layout[key] == source.meta(key)


@kinds
def test_shapes_tell_the_configuration(kind, made):
    """What shapes do not tell (heads, groups) is of the published sizes; all else is the folder's."""
    folder, file = made(kind)
    checkpoint = OriginalCheckpoint(open_file(file))
    defaults = {"use_linear_projection": False, "addition_embed_type": None, "transformer_layers_per_block": 1}
    untold = {"attention_head_dim", "num_attention_heads", "norm_num_groups", "sample_size", "hidden_act", "d_kv"}
    untold |= {"bos_token_id", "eos_token_id", "pad_token_id", "addition_time_embed_dim", "architectures"}
    untold |= {"num_hidden_layers", "projection_dim"} if kind == "sd2" else set()
    for name, config in checkpoint.components.items():
        theirs = defaults | folder.config(name)
        for key, value in config.items():
            if key not in untold:
                assert value == theirs[key], f"{name}.{key}"


def test_published_sizes_are_recognised():
    """The topology of SDXL's UNet, from shapes alone."""
    from diffusers import UNet2DConditionModel

    from models.original.names import Names, unet

    config = {
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 2,
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "sample_size": 128,
    }
    with torch.device("meta"):
        state = UNet2DConditionModel(**config).state_dict()
    names = Names(unet(config))
    originals, rest = names.originals(state)
    assert not rest and len(originals) == 1680
    shapes = {
        name: tuple(names.to_original(name, [state[p] for p in parts]).shape) for name, parts in originals.items()
    }
    told = configs.unet_of_sdxl(shapes)
    assert {key: told[key] for key in config} == config


def test_an_average_beside_the_weights_is_read_when_asked_for(made, tmp_path):
    folder, file = made("sd1")
    state = load_file(file)
    stem = "model.diffusion_model."
    averages = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): tensor + 1
        for name, tensor in state.items()
        if name.startswith(stem)
    }
    save_file(state | averages, tmp_path / "both.safetensors")
    given = {name: folder.config(name) for name in folder.components}
    for average in (False, True):
        checkpoint = OriginalCheckpoint(open_file(tmp_path / "both.safetensors"), given, average)
        source = folder.tensors("unet")
        for name, tensor in checkpoint.tensors("unet"):
            assert torch.equal(tensor, source.read(name) + float(average))
    with pytest.raises(ValueError, match="holds no average"):
        OriginalCheckpoint(open_file(file), given, average=True)


def test_a_projection_that_files_leave_out_is_the_identity(made, tmp_path):
    _, file = made("sd3")
    state = {name: tensor for name, tensor in load_file(file).items() if "clip_l.transformer.text_proj" not in name}
    save_file(state, tmp_path / "without.safetensors")
    checkpoint = OriginalCheckpoint(open_file(tmp_path / "without.safetensors"))
    assert checkpoint.components["text_encoder"]["architectures"] == ["CLIPTextModelWithProjection"]
    read = dict(checkpoint.tensors("text_encoder"))
    assert read.keys() == checkpoint.layout("text_encoder").keys()
    assert torch.equal(read["text_projection.weight"], torch.eye(8))


class Code:
    """What a file of weights should not hold."""


def test_files_that_are_none_are_refused(tmp_path):
    torch.save({"state_dict": {"a": torch.zeros(1)}, "callback": Code()}, tmp_path / "code.ckpt")
    with pytest.raises(ValueError, match="reading it could run code"):
        open_file(tmp_path / "code.ckpt")
    (tmp_path / "damaged.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="is damaged"):
        open_file(tmp_path / "damaged.safetensors").names()
    save_file({"transformer.h.0.attn": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"no checkpoint of a system that is known .* transformer\.h\.0\.attn"):
        OriginalCheckpoint(open_file(tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match="neither"):
        open_file(tmp_path / "weights.h5")


def test_a_name_without_a_place_is_told(made):
    folder, _ = made("sd1")
    source = folder.tensors("unet")
    names = source.names
    source.names = lambda: [*names(), "a_new_layer.weight"]  # type: ignore[method-assign]
    _, _, left_out = to_original("sd1", {"unet": source}, {"unet": folder.config("unet")})
    assert left_out == ["unet.a_new_layer.weight"]
