"""How diffusers describes a UNet and names its tensors, in terms of `models/unet.py`."""

from collections.abc import Sequence
from typing import Any, Literal

# Attention of diffusers' kinds of levels, and whether they resample by residual blocks of their own accord.
_LEVELS: dict[str, tuple[Literal["pixels", "context"] | None, bool]] = {
    **{"DownBlock2D": (None, False), "UpBlock2D": (None, False)},
    **{"ResnetDownsampleBlock2D": (None, True), "ResnetUpsampleBlock2D": (None, True)},
    **{"AttnDownBlock2D": ("pixels", False), "AttnUpBlock2D": ("pixels", False)},
    **{"CrossAttnDownBlock2D": ("context", False), "CrossAttnUpBlock2D": ("context", False)},
}
# Settings of diffusers' classes that have one value here.
FIXED: dict[str, Any] = {
    **{"act_fn": "silu", "center_input_sample": False, "class_embed_type": None, "downsample_padding": 1},
    **{"dropout": 0.0, "flip_sin_to_cos": True, "freq_shift": 0, "mid_block_scale_factor": 1},
    **{"num_class_embeds": None, "time_embedding_dim": None, "time_embedding_type": "positional"},
}
FIXED_WITH_CONTEXT: dict[str, Any] = {
    **{"addition_embed_type_num_heads": 64, "attention_type": "default", "class_embeddings_concat": False},
    **{"conv_in_kernel": 3, "conv_out_kernel": 3, "cross_attention_norm": None, "dual_cross_attention": False},
    **{"encoder_hid_dim": None, "encoder_hid_dim_type": None, "mid_block_only_cross_attention": None},
    **{"mid_block_type": "UNetMidBlock2DCrossAttn", "num_attention_heads": None, "only_cross_attention": False},
    **{"resnet_out_scale_factor": 1.0, "resnet_skip_time_act": False, "reverse_transformer_layers_per_block": None},
    **{"time_cond_proj_dim": None, "time_embedding_act_fn": None, "timestep_post_act": None},
}
FIXED_WITHOUT_CONTEXT: dict[str, Any] = {"add_attention": True, "mid_block_type": "UNetMidBlock2D"}


def level_kinds(
    key: str, types: Sequence[str], levels: int, reads_context: bool
) -> list[tuple[Literal["pixels", "context"] | None, bool]]:
    """What levels of these types hold: see `_LEVELS`.

    Raises:
        ValueError: not one for each level, or of a kind that is not implemented or does not fit the conditions.
    """
    way = "Up" if key.startswith("up") else "Down"
    known = [name for name in _LEVELS if way in name]
    if len(types) != levels:
        raise ValueError(f"{key} has {len(types)} items for the {levels} of block_out_channels")
    for name in types:
        if name not in known:
            raise ValueError(f"{key}: {name!r} is none of {', '.join(known)}")
        kind, _ = _LEVELS[name]
        if (kind == "context") > reads_context:
            raise ValueError(f"{key}: {name} reads a context: give cross_attention_dim")
        if kind == "pixels" and reads_context:
            raise ValueError(f"{key}: {name} reads no context, but cross_attention_dim is given")
    return [_LEVELS[name] for name in types]


def per_level(key: str, value: int | Sequence[int], levels: int) -> list[int]:
    """A setting of all levels, or of each, as one of each."""
    values = [value] * levels if isinstance(value, int) else list(value or [])
    if len(values) != levels or min(values) < 1:
        raise ValueError(f"{key} is {value}; it takes a positive number, or one for each of {levels} levels")
    return values


def diffusers_names(name: str) -> list[str]:
    """The diffusers tensors that, one above the other, make up our tensor `name`."""
    for ours, theirs in _NAMES.items():
        if f".{ours}." in f".{name}":
            return [name.replace(ours, part) for part in theirs]
    return [name]


_NAMES = {
    "time_embedding.up": ["time_embedding.linear_1"],
    "time_embedding.down": ["time_embedding.linear_2"],
    "add_embedding.up": ["add_embedding.linear_1"],
    "add_embedding.down": ["add_embedding.linear_2"],
    "to_qkv": ["to_q", "to_k", "to_v"],
    "to_kv": ["to_k", "to_v"],
    "to_out": ["to_out.0"],
    "ff.up": ["ff.net.0.proj"],
    "ff.down": ["ff.net.2"],
}
