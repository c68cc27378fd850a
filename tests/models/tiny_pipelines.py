"""Whole pipelines of diffusers, tiny and random, saved by diffusers itself."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from models.text_training import train_tokenizer
from tests.models.test_text import CAPTIONS, save_clip

_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SCHEDULERS: dict[str, Callable[[], Any]] = {
    "pndm": lambda: diffusers.PNDMScheduler(**_BETAS, skip_prk_steps=True),
    "ddim": lambda: diffusers.DDIMScheduler(**_BETAS, clip_sample=False, set_alpha_to_one=False),
    "v": lambda: diffusers.DDIMScheduler(
        **_BETAS, clip_sample=False, set_alpha_to_one=False, prediction_type="v_prediction"
    ),
    "euler": lambda: diffusers.EulerDiscreteScheduler(**_BETAS, timestep_spacing="leading"),
    "linear": lambda: diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False, steps_offset=1),
    "cosine": lambda: diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False, steps_offset=1),
    "zero_snr": lambda: diffusers.DDIMScheduler(
        **_BETAS,
        clip_sample=False,
        set_alpha_to_one=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    ),
    "flow": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
}


def random_(module: torch.nn.Module, std: float = 0.2) -> torch.nn.Module:
    """Weights that no prediction is near zero with."""
    for name, parameter in module.named_parameters():
        if "norm" in name and name.endswith("weight"):
            torch.nn.init.normal_(parameter, mean=1, std=0.1)
        else:
            torch.nn.init.normal_(parameter, std=std if parameter.ndim < 2 else std / parameter[0].numel() ** 0.5 * 4)
    return module


def autoencoder(channels: int = 4, **options: Any) -> diffusers.AutoencoderKL:
    options = {"scaling_factor": 0.18215, "layers_per_block": 1} | options
    return random_(
        diffusers.AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=channels,
            norm_num_groups=4,
            sample_size=16,
            **options,
        ),
        std=0.15,
    )


def unet(context: int, **options: Any) -> diffusers.UNet2DConditionModel:
    options = {
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 2,
        "in_channels": 4,
        "out_channels": 4,
    } | options
    return random_(
        diffusers.UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            cross_attention_dim=context,
            norm_num_groups=4,
            **options,
        )
    )


SDXL_UNET = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": [2, 4],
    "transformer_layers_per_block": [1, 2],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
}


def _text(folder: Path, number: str, kind: Any) -> dict[str, Any]:
    return {
        f"text_encoder{number}": kind.from_pretrained(folder / f"text_encoder{number}"),
        f"tokenizer{number}": AutoTokenizer.from_pretrained(folder / f"tokenizer{number}"),
    }


def sd1(folder: Path, scheduler: str = "pndm", kind: str = "StableDiffusionPipeline", **options: Any) -> Path:
    """Stable Diffusion 1; with `use_linear_projection` and several heads, 2. `in_channels=9`: the inpainting model, 8:
    one that edits."""
    torch.manual_seed(0)
    save_clip(folder / "parts", "", width=8, projection=8, act="quick_gelu")
    pipeline = getattr(diffusers, kind)(
        unet=unet(8, **options),
        vae=autoencoder(),
        scheduler=SCHEDULERS[scheduler](),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **_text(folder / "parts", "", CLIPTextModel),
    )
    pipeline.save_pretrained(folder / "sd1")
    return folder / "sd1"


def sdxl(folder: Path, scheduler: str = "euler", kind: str = "StableDiffusionXLPipeline", **options: Any) -> Path:
    """Stable Diffusion XL; `in_channels=9`: the inpainting model."""
    torch.manual_seed(1)
    save_clip(folder / "parts", "", width=8, projection=8, act="quick_gelu")
    save_clip(folder / "parts", "_2", width=12, projection=10, act="gelu")
    pipeline = getattr(diffusers, kind)(
        unet=unet(20, projection_class_embeddings_input_dim=10 + 6 * 8, **SDXL_UNET, **options),
        vae=autoencoder(scaling_factor=0.13025),
        scheduler=SCHEDULERS[scheduler](),
        add_watermarker=False,
        **_text(folder / "parts", "", CLIPTextModel),
        **_text(folder / "parts", "_2", CLIPTextModelWithProjection),
    )
    pipeline.save_pretrained(folder / "sdxl")
    return folder / "sdxl"


def inpainting(folder: Path) -> Path:
    """Stable Diffusion 1's inpainting model."""
    return sd1(folder, "ddim", "StableDiffusionInpaintPipeline", in_channels=9)


def sdxl_inpainting(folder: Path) -> Path:
    """SDXL's inpainting model."""
    return sdxl(folder, "euler", "StableDiffusionXLInpaintPipeline", in_channels=9)


def editing(folder: Path) -> Path:
    """InstructPix2Pix."""
    return sd1(folder, "ddim", "StableDiffusionInstructPix2PixPipeline", in_channels=8)


def refiner(folder: Path, scheduler: str = "euler", **options: Any) -> Path:
    """SDXL's refiner."""
    torch.manual_seed(2)
    save_clip(folder / "parts", "_2", width=12, projection=10, act="gelu")
    pipeline = diffusers.StableDiffusionXLImg2ImgPipeline(
        unet=unet(12, projection_class_embeddings_input_dim=10 + 5 * 8, **SDXL_UNET, **options),
        vae=autoencoder(scaling_factor=0.13025),
        scheduler=SCHEDULERS[scheduler](),
        text_encoder=None,
        tokenizer=None,
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
        **_text(folder / "parts", "_2", CLIPTextModelWithProjection),
    )
    pipeline.save_pretrained(folder / "refiner")
    return folder / "refiner"


def sd3(folder: Path, **options: Any) -> Path:
    """Stable Diffusion 3."""
    torch.manual_seed(3)
    save_clip(folder / "parts", "", width=8, projection=8, act="quick_gelu")
    save_clip(folder / "parts", "_2", width=12, projection=10, act="gelu")
    train_tokenizer([*CAPTIONS[:1], CAPTIONS[2]], folder / "parts" / "tokenizer_3", vocab_size=60)
    config = T5Config(
        vocab_size=100, d_model=24, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    T5EncoderModel(config).save_pretrained(folder / "parts" / "text_encoder_3")
    transformer = diffusers.SD3Transformer2DModel(
        **{
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 24,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 18,
            "pos_embed_max_size": 16,
            "qk_norm": "rms_norm",
            "dual_attention_layers": (0,),
        }
        | options
    )
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=random_(transformer),
        vae=autoencoder(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        scheduler=SCHEDULERS["flow"](),
        **_text(folder / "parts", "", CLIPTextModelWithProjection),
        **_text(folder / "parts", "_2", CLIPTextModelWithProjection),
        **_text(folder / "parts", "_3", T5EncoderModel),
    )
    # As published: what is pooled of ViT-L is not projected.
    torch.nn.init.eye_(pipeline.text_encoder.text_projection.weight)
    pipeline.save_pretrained(folder / "sd3")
    return folder / "sd3"


def made_once(kinds: Mapping[str, Callable[[Path], Path]], factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders by kind, each made when it is first asked for."""
    folders: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = kinds[kind](factory.mktemp(kind))
        return folders[kind]

    return make
