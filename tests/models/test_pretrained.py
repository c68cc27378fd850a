"""Folders in diffusers' layout, against diffusers' own readers and writers."""

import json
import os
import shutil

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from models.autoencoder import AutoencoderKL
from models.initialization import initialize
from models.mmdit import MMDiT
from models.pretrained import STEM, load, save
from models.tensor_files import index_file
from models.unet import UNet

MMDIT = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 3,
    "joint_attention_dim": 16,
    "caption_projection_dim": 24,
    "pooled_projection_dim": 12,
    "pos_embed_max_size": 6,
    "dual_attention_layers": (0,),
    "qk_norm": "rms_norm",
}
AUTOENCODER = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "shift_factor": 0.0609,
    "sample_size": 64,
}
UNET = {
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 12,
    "attention_head_dim": (2, 4),
    "norm_num_groups": 4,
    "layers_per_block": 1,
}
UNCONDITIONAL_UNET = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}
VQ = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    "norm_num_groups": 4,
    "num_vq_embeddings": 40,
    "vq_embed_dim": 2,
}
THEIRS = {
    "mmdit": lambda: diffusers.SD3Transformer2DModel(**MMDIT),
    "autoencoder": lambda: diffusers.AutoencoderKL(**AUTOENCODER),
    "unet": lambda: diffusers.UNet2DConditionModel(**UNET),
    "unconditional unet": lambda: diffusers.UNet2DModel(**UNCONDITIONAL_UNET),
    "vq": lambda: diffusers.VQModel(**VQ),
}
both = pytest.mark.parametrize("kind", THEIRS)


def assert_same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@both
@pytest.mark.parametrize("shard_size", ["10GB", "40KB"])
def test_loads_what_diffusers_saved(kind, shard_size, tmp_path):
    theirs = THEIRS[kind]()
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert index_file(tmp_path, STEM).exists() == (shard_size == "40KB")
    ours = load(tmp_path)
    named = {k: v for name, t in ours.state_dict().items() for k, v in ours.to_diffusers(name, t).items()}
    assert_same_tensors(named, theirs.state_dict())


@both
@pytest.mark.parametrize("shard_bytes", [10**10, 40_000])
def test_diffusers_loads_what_we_saved(kind, shard_bytes, tmp_path):
    theirs = THEIRS[kind]()
    theirs.save_pretrained(tmp_path / "theirs")
    save(load(tmp_path / "theirs"), tmp_path / "ours", shard_bytes=shard_bytes)
    again, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert_same_tensors(again.state_dict(), theirs.state_dict())
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1 or shard_bytes == 10**10


@both
def test_the_whole_configuration_comes_back(kind, tmp_path):
    THEIRS[kind]().save_pretrained(tmp_path / "theirs")
    config_file = tmp_path / "theirs" / "config.json"
    config = json.loads(config_file.read_text()) | {
        "a_key_of_next_year": [1, {"deep": None}],
        "_diffusers_version": "0.20",
    }
    config_file.write_text(json.dumps(config))
    save(load(tmp_path / "theirs"), tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text()) == config


def test_a_fresh_network_is_saved_with_a_configuration_that_diffusers_needs(tmp_path):
    ours = initialize(AutoencoderKL(block_out_channels=[8, 16], norm_num_groups=4), seed=3)
    save(ours, tmp_path)
    assert_same_tensors(diffusers.AutoencoderKL.from_pretrained(tmp_path).state_dict(), ours.state_dict())


def test_saving_again_leaves_nothing_of_the_former_weights(tmp_path):
    THEIRS["mmdit"]().save_pretrained(tmp_path, max_shard_size="40KB")
    save(load(tmp_path), tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_given_tensors_are_saved_in_place_of_a_meta_networks(tmp_path):
    filled = initialize(MMDiT(**MMDIT), seed=5)
    with torch.device("meta"):
        empty = MMDiT(**MMDIT)
    with pytest.raises(ValueError, match=r"without values of patch_embedding\.weight"):
        save(empty, tmp_path)
    save(empty, tmp_path, filled.state_dict())
    assert_same_tensors(load(tmp_path).state_dict(), filled.state_dict())


def test_any_grid_of_the_files_own_positions_is_kept(tmp_path):
    """Published tables follow another formula than diffusers' constructor: the file's values count."""
    config = MMDIT | {"position_offset": 1.5, "position_scale": 0.5}
    ours = initialize(MMDiT(**config), seed=0)
    save(ours, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    del written["position_offset"], written["position_scale"]
    (tmp_path / "config.json").write_text(json.dumps(written))
    theirs = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(load(tmp_path).positions(2, 5), theirs.pos_embed.cropped_pos_embed(4, 10)[0])


def test_channels_beside_the_latents_count_as_input_channels_in_diffusers(tmp_path):
    ours = initialize(UNet(**UNET, in_channels=3, concat_channels=2), seed=0)
    save(ours, tmp_path)
    assert diffusers.UNet2DConditionModel.from_pretrained(tmp_path).config.in_channels == 5
    again = load(tmp_path)
    assert again.config["in_channels"] == 3 and again.config["concat_channels"] == 2
    assert_same_tensors(again.state_dict(), ours.state_dict())


@pytest.mark.parametrize(
    ("kind", "old_name"),
    [
        ("autoencoder", "encoder.mid_block.attentions.0.proj_attn.weight"),
        ("unconditional unet", "down_blocks.1.attentions.1.query.bias"),
    ],
)
def test_the_names_of_2022_are_understood(kind, old_name, tmp_path):
    theirs = THEIRS[kind]()
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in load_file(file).items():
        for new, former in old.items():
            name = name.replace(f".{new}.", f".{former}.")
        tensors[name] = tensor
    assert old_name in tensors
    save_file(tensors, file)
    ours = load(tmp_path)
    named = {k: v for name, t in ours.state_dict().items() for k, v in ours.to_diffusers(name, t).items()}
    assert_same_tensors(named, theirs.state_dict())
    assert_same_tensors(type(theirs).from_pretrained(tmp_path).state_dict(), theirs.state_dict())


def edit_tensors(folder, change) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_errors_name_what_is_wrong(tmp_path):
    def fails(change, message):
        folder = tmp_path / "broken"
        shutil.rmtree(folder, ignore_errors=True)
        THEIRS["mmdit"]().save_pretrained(folder)
        change(folder)
        with pytest.raises(ValueError, match=message):
            load(folder)

    def setting(**values):
        def change(folder):
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | values))

        return change

    def rename(tensors):
        tensors["proj_out.bais"] = tensors.pop("proj_out.bias")

    fails(lambda f: edit_tensors(f, rename), r"missing: proj_out\.bias; unexpected: proj_out\.bais")
    fails(
        lambda f: edit_tensors(f, lambda t: t.update({"proj_out.bias": torch.zeros(3)})), r"proj_out\.bias \(3,\) where"
    )
    fails(lambda f: (f / "config.json").unlink(), "no config.json")
    fails(lambda f: (f / "diffusion_pytorch_model.safetensors").rename(f / "diffusion_pytorch_model.bin"), "pickle")
    fails(setting(_class_name="FluxTransformer2DModel"), "'FluxTransformer2DModel'; implemented are")
    fails(setting(num_layers=3), r"missing: transformer_blocks\.1\.attn\.to_add_out\.\w+.* and \d+ more")
    fails(lambda f: edit_tensors(f, lambda t: t["pos_embed.pos_embed"].normal_()), "learned_positions=true")
    fails(lambda f: shutil.copy(__file__, index_file(f, STEM)), "index.json is no JSON")
    fails(lambda f: os.truncate(f / "diffusion_pytorch_model.safetensors", 1000), "safetensors is damaged")


def test_a_setting_that_is_not_implemented_is_refused(tmp_path):
    THEIRS["autoencoder"]().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"act_fn": "gelu"}))
    with pytest.raises(ValueError, match="act_fn is 'gelu', but AutoencoderKL here has only 'silu'"):
        load(tmp_path)
