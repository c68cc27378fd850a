"""Configurations that follow from an original checkpoint's tensors: from their shapes, and, for what shapes do not tell
(heads, groups, the latents' scale), from what every published model of the family has."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]
"""Of a component's tensors, by name without the component's prefix."""

_HEAD_CHANNELS = 64
_HEADS_OF_SD1 = 8
# Latent diffusion's have 32 channels a head, but for these, by channels of the levels and of the context.
_HEAD_CHANNELS_OF_LDM = 32
_HEADS_OF_LDM = {
    ((320, 640, 1280, 1280), 1280): 8,  # text, 1.45 B
    ((192, 384, 576, 960), 512): 1,  # ImageNet, cin256-v2
    ((192, 384, 384, 768, 768), None): 8,  # churches
    ((256, 512, 768, 1024), None): 8,  # inpainting
    ((128, 512, 1024), None): 8,  # semantic maps
}


def _count(shapes: Shapes, pattern: str) -> int:
    """One more than the highest number that stands for # in the names."""
    found = [
        int(m.group(1)) for name in shapes if (m := re.match(pattern.replace(".", r"\.").replace("#", r"(\d+)"), name))
    ]
    return max(found, default=-1) + 1


def mmdit(shapes: Shapes) -> dict[str, Any]:
    """Of SD3Transformer2DModel."""
    width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    layers = _count(shapes, "joint_blocks.#.")
    return {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": 128,
        "patch_size": patch,
        "in_channels": channels,
        "num_layers": layers,
        "attention_head_dim": _HEAD_CHANNELS,
        "num_attention_heads": width // _HEAD_CHANNELS,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "caption_projection_dim": width,
        "pooled_projection_dim": shapes["y_embedder.mlp.0.weight"][1],
        "out_channels": shapes["final_layer.linear.weight"][0] // patch**2,
        "pos_embed_max_size": round(shapes["pos_embed"][1] ** 0.5),
        "dual_attention_layers": [i for i in range(layers) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in shapes],
        "qk_norm": "rms_norm" if "joint_blocks.0.x_block.attn.ln_q.weight" in shapes else None,
    }


def unet(shapes: Shapes, heads: int | None = None, sample_size: int = 64) -> dict[str, Any]:
    """Of UNet2DConditionModel.

    Args:
        heads: of every attention; None: one for each 64 channels.
        sample_size: side of the latents that it was trained on.
    """
    ends = sorted(int(m.group(1)) for name in shapes if (m := re.match(r"input_blocks\.(\d+)\.0\.op\.weight", name)))
    depth = ends[0] - 1
    levels = len(ends) + 1
    first = [1 + level * (depth + 1) for level in range(levels)]
    widths = [shapes[f"input_blocks.{number}.0.out_layers.3.weight"][0] for number in first]
    inner = "input_blocks.{}.1.transformer_blocks.#."
    # What a level without attention has counts only in the middle, which follows the last level.
    layers = [_count(shapes, inner.format(number)) for number in first]
    attends = [count > 0 for count in layers]
    middle = _count(shapes, "middle_block.1.transformer_blocks.#.")
    layers = [count or (middle if level == levels - 1 else 1) for level, count in enumerate(layers)]
    context = next(shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight"))
    projections = next(shape for name, shape in shapes.items() if name.endswith(".1.proj_in.weight"))
    config = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": sample_size,
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": widths,
        "layers_per_block": depth,
        "down_block_types": ["CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in attends[::-1]],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "cross_attention_dim": context,
        "transformer_layers_per_block": layers if len(set(layers)) > 1 else layers[0],
        # diffusers' name for the number of heads, for historical reasons
        "attention_head_dim": heads or [width // _HEAD_CHANNELS for width in widths],
        "use_linear_projection": len(projections) == 2,
    }
    if "label_emb.0.0.weight" in shapes:
        config |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
        config["projection_class_embeddings_input_dim"] = shapes["label_emb.0.0.weight"][1]
    elif "label_emb.weight" in shapes:
        config["num_class_embeds"] = shapes["label_emb.weight"][0]
    return config


def unet_of_sd1(shapes: Shapes) -> dict[str, Any]:
    """Of Stable Diffusion 1's and LDM's UNet: 8 heads everywhere."""
    return unet(shapes, heads=_HEADS_OF_SD1)


def unet_of_ldm(shapes: Shapes) -> dict[str, Any]:
    """Of latent diffusion's, which reads a context or not. Its weights do not tell heads: they are those of the
    published models."""
    if any(name.endswith("attn2.to_k.weight") for name in shapes):
        return _with_published_heads(unet(shapes))
    blocks = _count(shapes, "input_blocks.#.")
    ends = [
        int(m.group(1))
        for name in shapes
        if (m := re.match(r"output_blocks\.(\d+)\.[12]\.(conv\.weight|in_layers\.0\.weight)$", name))
    ]
    depth = min(ends, default=blocks - 1)
    levels = blocks // (depth + 1)
    first = [1 + level * (depth + 1) for level in range(levels)]
    attends = [f"input_blocks.{number}.1.qkv.weight" in shapes for number in first]
    residual = [f"input_blocks.{number + depth}.0.in_layers.0.weight" in shapes for number in first[:-1]]
    resampling = "resnet" if any(residual) else "conv"
    scale_shift = shapes["middle_block.0.emb_layers.1.weight"][0] > shapes["middle_block.0.out_layers.3.weight"][0]

    def types(way: str, last: int) -> list[str]:
        """Of the levels from fine to coarse; the `last` does not change sides."""
        plain = [f"Resnet{way}sampleBlock2D" if any(residual) and i != last else f"{way}Block2D" for i in range(levels)]
        return [f"Attn{way}Block2D" if yes else kind for yes, kind in zip(attends, plain, strict=True)]

    config = {
        "_class_name": "UNet2DModel",
        "sample_size": 64,
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": [shapes[f"input_blocks.{number}.0.out_layers.3.weight"][0] for number in first],
        "layers_per_block": depth,
        "down_block_types": types("Down", levels - 1),
        "up_block_types": types("Up", 0)[::-1],
        "downsample_type": resampling,
        "upsample_type": resampling,
        "resnet_time_scale_shift": "scale_shift" if scale_shift else "default",
        "attn_norm_num_groups": 32 if scale_shift else None,
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "add_attention": True,
    }
    return _with_published_heads(config)


def _with_published_heads(config: Mapping[str, Any]) -> dict[str, Any]:
    size = (tuple(config["block_out_channels"]), config.get("cross_attention_dim"))
    return with_heads(config, _HEADS_OF_LDM.get(size))


def with_heads(config: Mapping[str, Any], heads: int | None, channels: int = _HEAD_CHANNELS_OF_LDM) -> dict[str, Any]:
    """The configuration of a UNet whose every attention has so many heads; None: as many as have so many channels.

    Raises:
        ValueError: the channels of a level do not divide so.
    """
    widths: list[int] = config["block_out_channels"]
    attends = [*(w for w, kind in zip(widths, config["down_block_types"], strict=True) if "Attn" in kind), widths[-1]]
    for width in attends:
        if width % (heads or channels):
            told = f"head_channels={channels}" if heads is None else f"heads={heads}"
            raise ValueError(f"{told}: the {width} channels of a level do not divide so")
    if config["_class_name"] == "UNet2DConditionModel":
        return {**config, "attention_head_dim": heads or [width // channels for width in widths]}
    if heads is None or len(set(attends)) == 1:
        return {**config, "attention_head_dim": channels if heads is None else widths[-1] // heads}
    return {**config, "attention_heads": heads}  # which diffusers has no word for


def unet_of_sdxl(shapes: Shapes) -> dict[str, Any]:
    """Of SDXL's, trained at 1024 px."""
    return unet(shapes, sample_size=128)


def autoencoder(scaling_factor: float | None, shift_factor: float | None = None) -> Callable[[Shapes], dict[str, Any]]:
    """Of AutoencoderKL, whose latents this family scales so."""

    def config(shapes: Shapes) -> dict[str, Any]:
        return {
            "_class_name": "AutoencoderKL",
            **_levels(shapes),
            "scaling_factor": scaling_factor,
            "shift_factor": shift_factor,
            "use_quant_conv": "quant_conv.weight" in shapes,
            "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        }

    return config


def first_stage(scaling_factor: float | None) -> Callable[[Shapes], dict[str, Any]]:
    """Of VQModel or AutoencoderKL, whichever it is; the scale is of the latter's latents."""

    def config(shapes: Shapes) -> dict[str, Any]:
        return vq(shapes) if "quantize.embedding.weight" in shapes else autoencoder(scaling_factor)(shapes)

    return config


def vq(shapes: Shapes) -> dict[str, Any]:
    """Of VQModel, whose latents go to denoisers as they are."""
    codes, channels = shapes["quantize.embedding.weight"]
    told = {"num_vq_embeddings": codes, "vq_embed_dim": channels, "scaling_factor": 1.0, "norm_type": "group"}
    return {"_class_name": "VQModel", **_levels(shapes), **told}


def _levels(shapes: Shapes) -> dict[str, Any]:
    """What autoencoders of both kinds have."""
    levels = _count(shapes, "encoder.down.#.")
    down = [f"encoder.down.{i}.attn.0.q.weight" in shapes for i in range(levels)]
    up = [f"decoder.up.{i}.attn.0.q.weight" in shapes for i in reversed(range(levels))]
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "block_out_channels": [shapes[f"encoder.down.{i}.block.0.conv2.weight"][0] for i in range(levels)],
        "down_block_types": ["AttnDownEncoderBlock2D" if attends else "DownEncoderBlock2D" for attends in down],
        "up_block_types": ["AttnUpDecoderBlock2D" if attends else "UpDecoderBlock2D" for attends in up],
        "layers_per_block": _count(shapes, "encoder.down.0.block.#."),
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "norm_num_groups": 32,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in shapes,
    }


def clip(shapes: Shapes) -> dict[str, Any]:
    """Of CLIP's text model in transformers' names: OpenAI's ViT-L, or OpenCLIP's in SD3's files."""
    stem = "text_model.encoder.layers."
    inner, width = shapes[f"{stem}0.mlp.fc1.weight"]
    projected = shapes.get("text_projection.weight", (None,))[0]
    length = shapes["text_model.embeddings.position_embedding.weight"][0]
    vocabulary = shapes["text_model.embeddings.token_embedding.weight"][0]
    layers = _count(shapes, stem + "#.")
    return _clip(width, inner, layers, length, vocabulary, projected, "quick_gelu" if width == 768 else "gelu")


def clip_of_sd3(shapes: Shapes) -> dict[str, Any]:
    """The same with a projection, which SD3's files leave out of ViT-L, where it is the identity."""
    return clip(shapes) | {"architectures": ["CLIPTextModelWithProjection"]}


def open_clip(shapes: Shapes) -> dict[str, Any]:
    """Of OpenCLIP's, with its projection."""
    inner, width = shapes["transformer.resblocks.0.mlp.c_fc.weight"]
    length, vocabulary = shapes["positional_embedding"][0], shapes["token_embedding.weight"][0]
    layers = _count(shapes, "transformer.resblocks.#.")
    return _clip(width, inner, layers, length, vocabulary, shapes.get("text_projection", (None,))[-1], "gelu")


def open_clip_of_sd2(shapes: Shapes) -> dict[str, Any]:
    """Of Stable Diffusion 2's, which stops before the last layer and has no use for the projection."""
    config = open_clip(shapes)
    config["num_hidden_layers"] -= 1
    config["architectures"] = ["CLIPTextModel"]
    config["projection_dim"] = 512  # as published, unused
    return config


def _clip(
    width: int, inner: int, layers: int, length: int, vocabulary: int, projected: int | None, act: str
) -> dict[str, Any]:
    return {
        "architectures": ["CLIPTextModelWithProjection" if projected else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": width // _HEAD_CHANNELS,
        "max_position_embeddings": length,
        "vocab_size": vocabulary,
        "projection_dim": projected or width,
        "hidden_act": act,
        "layer_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 2,  # transformers' word for "the highest id", which all published CLIPs are configured with
        "pad_token_id": 1,
    }


def t5(shapes: Shapes) -> dict[str, Any]:
    """Of T5 v1.1's encoder."""
    vocabulary, width = shapes["shared.weight"]
    first = "encoder.block.0.layer."
    buckets, heads = shapes[f"{first}0.SelfAttention.relative_attention_bias.weight"]
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "d_model": width,
        "d_ff": shapes[f"{first}1.DenseReluDense.wi_0.weight"][0],
        "d_kv": shapes[f"{first}0.SelfAttention.q.weight"][0] // heads,
        "num_heads": heads,
        "num_layers": _count(shapes, "encoder.block.#."),
        "vocab_size": vocabulary,
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False,
        "layer_norm_epsilon": 1e-6,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }


def bert(shapes: Shapes) -> dict[str, Any]:
    """Of latent diffusion's transformer over tokens, diffusers' LDMBertModel."""
    vocabulary, width = shapes["token_emb.weight"]
    return {
        "architectures": ["LDMBertModel"],
        "model_type": "ldmbert",
        "vocab_size": vocabulary,
        "max_position_embeddings": shapes["pos_emb.emb.weight"][0],
        "encoder_layers": _count(shapes, "attn_layers.layers.#.") // 2,
        "encoder_ffn_dim": shapes["attn_layers.layers.1.1.net.0.0.weight"][0],
        "encoder_attention_heads": shapes["attn_layers.layers.0.1.to_q.weight"][0] // _HEAD_CHANNELS,
        "head_dim": _HEAD_CHANNELS,
        "d_model": width,
        "activation_function": "gelu",
        "pad_token_id": 0,
    }


def classes(shapes: Shapes) -> dict[str, Any]:
    """Of latent diffusion's classes, a vector each, the last one perhaps for none. ImageNet's are known."""
    rows, width = shapes["embedding.weight"]
    return {"_class_name": "ClassEmbedder", "classes": 1000 if rows in (1000, 1001) else None, "width": width}


def maps(shapes: Shapes) -> dict[str, Any]:
    """Of latent diffusion's labels of maps, a colour each."""
    channels, labels, *_ = shapes["channel_mapper.weight"]
    return {"_class_name": "MapEmbedder", "classes": labels, "channels": channels}


def scaled_linear(betas: Tensor) -> dict[str, Any]:
    """Settings of a scheduler, of the noise schedule that a file holds.

    Raises:
        ValueError: it is not latent diffusion's "linear" one, whose square roots grow evenly.
    """
    start, end = (float(f"{float(betas[i]):.6g}") for i in (0, -1))
    told = {"num_train_timesteps": len(betas), "beta_start": start, "beta_end": end}
    if not 0 < start < end or not torch.allclose(scaled_linear_betas(told), betas.float(), rtol=1e-4):
        raise ValueError("betas: their square roots do not grow evenly, as those of all published models do")
    return told


def scaled_linear_betas(scheduler: Mapping[str, Any]) -> Tensor:
    """The schedule of such settings, float32."""
    start, end = (float(scheduler[key]) ** 0.5 for key in ("beta_start", "beta_end"))
    return (torch.linspace(start, end, scheduler.get("num_train_timesteps", 1000), dtype=torch.float64) ** 2).float()
