"""What of a run diffusers has classes for: its pipeline, its scheduler, and what has no counterpart there."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from models import schedules
from models.conditioner import AbsentEncoder, Conditioner, ConditionMap, Encoder
from models.conditions import ClassEncoder, LowResolution, MaskedPicture, PictureMap, SemanticMap
from models.layout import LayoutEncoder
from models.text import ClipEncoder, T5Encoder
from models.token_transformer import BertTextEncoder
from trainer.pipelines import BETA_SCHEDULES, EDITING, PREDICTIONS

# Pipelines by diffusers' class, and ours that it has none for: components of what makes
# conditions, in the conditioner's order.
TEXT_ENCODERS: Mapping[str, tuple[str, ...]] = {
    "LDMPipeline": (),
    "LDMSuperResolutionPipeline": (),
    "LDMInpaintPipeline": (),
    "LDMTextToImagePipeline": ("bert",),
    "LDMLayoutPipeline": ("bert",),
    "LDMClassPipeline": ("class_embedder",),
    "LDMSemanticPipeline": ("map_embedder",),
    "StableDiffusionPipeline": ("text_encoder",),
    "StableDiffusionInpaintPipeline": ("text_encoder",),
    EDITING: ("text_encoder",),
    "StableDiffusionXLPipeline": ("text_encoder", "text_encoder_2"),
    "StableDiffusionXLInpaintPipeline": ("text_encoder", "text_encoder_2"),
    "StableDiffusionXLImg2ImgPipeline": ("text_encoder_2",),
    "StableDiffusion3Pipeline": ("text_encoder", "text_encoder_2", "text_encoder_3"),
}
OURS = {"LDMInpaintPipeline", "LDMLayoutPipeline", "LDMClassPipeline", "LDMSemanticPipeline"}
# Latent diffusion's, by the one encoder.
_OF_LDM: Mapping[type[Encoder], str] = {
    BertTextEncoder: "LDMTextToImagePipeline",
    LayoutEncoder: "LDMLayoutPipeline",
    ClassEncoder: "LDMClassPipeline",
}
# Stable Diffusion 1's and 2's, by what lies beside the latent.
_OF_SD = {"nothing": "StableDiffusionPipeline", "hole": "StableDiffusionInpaintPipeline", "picture": EDITING}
_NONE = [None, None]
_SD = {
    **{"safety_checker": _NONE, "feature_extractor": _NONE, "image_encoder": _NONE},
    "requires_safety_checker": False,
}
# What else stands in model_index.json.
INDEX: Mapping[str, Mapping[str, Any]] = {
    **{"StableDiffusionPipeline": _SD, "StableDiffusionInpaintPipeline": _SD, EDITING: _SD},
    "StableDiffusionXLPipeline": {"feature_extractor": _NONE, "image_encoder": _NONE},
    "StableDiffusionXLInpaintPipeline": {
        **{"feature_extractor": _NONE, "image_encoder": _NONE},
        "requires_aesthetics_score": False,
    },
    "StableDiffusionXLImg2ImgPipeline": {
        **{"feature_extractor": _NONE, "image_encoder": _NONE, "text_encoder": _NONE, "tokenizer": _NONE},
        "requires_aesthetics_score": True,
    },
    "StableDiffusion3Pipeline": {"feature_extractor": _NONE, "image_encoder": _NONE},
}


def pipeline_of(denoiser: Any, conditioner: Any) -> tuple[str | None, str]:
    """diffusers' pipeline for a denoiser under a conditioner, or ours; None, and why, where there is none."""
    if not isinstance(conditioner, Conditioner):
        return None, f"{type(conditioner).__name__} makes conditions that no pipeline of diffusers knows"
    if (of_ldm := _of_ldm(denoiser, conditioner)) is not None:
        return of_ldm, ""
    if conditioner.learned:
        return None, f"{type(conditioner).__name__} makes conditions that no pipeline of diffusers knows"
    encoders, sizes, maps = conditioner.numbered(), conditioner.sizes, conditioner.map_list()
    beside = _beside(maps[0]) if len(maps) == 1 else "nothing" if not maps else None
    if beside is None:
        return None, f"diffusers has no pipeline of {', '.join(type(one).__name__ for one in maps)} beside the latent"
    kind, count = getattr(denoiser, "diffusers_class", None), len(encoders)
    clips = [one for one in encoders if isinstance(one, ClipEncoder)]
    if kind == "SD3Transformer2DModel" and sizes is None and _are_sd3(encoders):
        return "StableDiffusion3Pipeline", ""
    if kind == "UNet2DConditionModel" and len(clips) == count:
        layers = [(one.layer, one.pooled_width > 0) for one in clips]
        if sizes is None and layers == [("last", False)]:
            return _OF_SD[beside], ""
        of_base = sizes is not None and sizes.aesthetic is None and beside != "picture"
        if of_base and layers == [("penultimate", False), ("penultimate", True)]:
            return "StableDiffusionXLPipeline" if beside == "nothing" else "StableDiffusionXLInpaintPipeline", ""
        of_refiner = sizes is not None and sizes.aesthetic is not None and beside == "nothing"
        if of_refiner and layers == [("penultimate", True)]:
            return "StableDiffusionXLImg2ImgPipeline", ""
    names = ", ".join(type(one).__name__ for one in encoders) or "no encoder"
    return None, f"diffusers has no pipeline of {kind or type(denoiser).__name__} under {names}"


def beyond_diffusers(kind: str | None, unet: Mapping[str, Any]) -> list[str]:
    """Sentences on what of a folder with such a pipeline and denoiser diffusers does not know."""
    notes = []
    if kind in OURS:
        notes.append(f"diffusers has no pipeline of this kind: {kind} is Millrace's word, and no class of its.")
    if unet.get("attention_heads") is not None:
        notes.append("diffusers cannot tell attention_heads: its class would attend in other heads than this UNet.")
    if unet.get("pooled_projection_dim") == 0:
        notes.append("diffusers cannot leave out the pooled text: its SD3Transformer2DModel has layers for it.")
    return notes


def _of_ldm(denoiser: Any, conditioner: Conditioner) -> str | None:
    """Latent diffusion's pipeline."""
    encoders, maps = conditioner.numbered(), conditioner.map_list()
    kind = getattr(denoiser, "diffusers_class", None)
    if conditioner.sizes is not None or len(encoders) + len(maps) > 1:
        return None
    if encoders:
        return _OF_LDM.get(type(encoders[0])) if kind == "UNet2DConditionModel" else None
    if kind != "UNet2DModel":
        return None
    if not maps:
        return "LDMPipeline"
    if isinstance(maps[0], SemanticMap):
        return "LDMSemanticPipeline"
    if isinstance(maps[0], MaskedPicture) and maps[0].form == "ldm":
        return "LDMInpaintPipeline"
    plain = isinstance(maps[0], LowResolution) and not maps[0].noise
    return "LDMSuperResolutionPipeline" if plain else None


def _beside(one: ConditionMap) -> Literal["hole", "picture"] | None:
    """What of Stable Diffusion's inpainting and editing models a map is."""
    if isinstance(one, MaskedPicture) and one.form == "sd":
        return "hole"
    return "picture" if isinstance(one, PictureMap) and one.encode and not one.scaled else None


def _are_sd3(encoders: Sequence[Encoder]) -> bool:
    if len(encoders) != 3 or not all(isinstance(one, ClipEncoder) and one.pooled_width for one in encoders[:2]):
        return False
    return isinstance(encoders[2], AbsentEncoder) or (isinstance(encoders[2], T5Encoder) and not encoders[2].masked)


def scheduler_of(process: Mapping[str, Any], pipeline: str) -> dict[str, Any]:
    """The configuration of the scheduler that samples what was trained with a process.

    Args:
        process: its description in a config.
        pipeline: diffusers' class.

    Raises:
        ValueError: diffusers has no such scheduler; names the part of the process.
    """
    path, predicts = process["path"], process["parameterization"]["_target_"].rpartition(".")[2]
    kind = path["_target_"].rpartition(".")[2]
    if kind == "RectifiedFlow" and predicts == "Velocity":
        shift = process.get("shift", 1.0)
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": shift}
    by_prediction = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    by_path = {ours: theirs for theirs, ours in BETA_SCHEDULES.items()}
    rescaled = kind == "ZeroTerminalSNR"
    if rescaled:
        path = path["of"]
        kind = path["_target_"].rpartition(".")[2]
    if kind not in by_path or predicts not in by_prediction:
        raise ValueError(f"process: diffusers has no scheduler for {predicts} on the path {kind}")
    own = inspect.signature(getattr(schedules, kind)).parameters
    betas = {
        "num_train_timesteps": path.get("steps", own["steps"].default),
        "beta_schedule": by_path[kind],
        **{key: path.get(key, own[key].default) for key in ("beta_start", "beta_end") if key in own},
        "prediction_type": by_prediction[predicts],
        "timestep_spacing": "trailing" if rescaled else "leading",  # which begins at pure noise
        "rescale_betas_zero_snr": rescaled,
        "steps_offset": 1,
    }
    if "XL" in pipeline:
        return {"_class_name": "EulerDiscreteScheduler", **betas, "interpolation_type": "linear"}
    return {"_class_name": "DDIMScheduler", **betas, "clip_sample": False, "set_alpha_to_one": False}
