"""diffusers' pipelines and our configs: what a folder holds, as a run would describe it, and what a run holds, as a
pipeline of diffusers would."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from models.pipeline_folder import PipelineFolder
from models.pretrained import CLASSES, ComponentFolder

Node = dict[str, Any]
"""A part of a config: `_target_` and the arguments of what it builds."""

# InstructPix2Pix, and the field of samples with the picture that it edits.
EDITING, EDITED = "StableDiffusionInstructPix2PixPipeline", "original"


def config_of(folder: PipelineFolder) -> dict[str, Node]:
    """What a pipeline of Stable Diffusion 1, 2, XL, its refiner or 3, or of latent diffusion gives for "model",
    "first_stage", "conditioner", "process", "sampler" and "guidance".

    Raises:
        ValueError: another pipeline, or a component or setting of one that is not implemented.
    """
    describe = _CONDITIONERS.get(folder.kind)
    if describe is None:
        raise ValueError(
            f"{folder.path} is a {folder.kind or 'pipeline of no class'}; known are {', '.join(_CONDITIONERS)}"
        )
    model = network_node(denoiser_of(folder))
    component = autoencoder_of(folder)
    autoencoder = network_node(component)
    kind = "VQFirstStage" if autoencoder["_target_"] == "models.vq.VQModel" else "KLFirstStage"
    return {
        "model": model,
        "first_stage": {
            "_target_": f"models.first_stage.{kind}",
            "folder": str(component.path),
            "autoencoder": autoencoder,
        },
        "conditioner": describe(folder, model),
        "process": process_node(folder.config("scheduler")),
        "sampler": sampler_node(folder.config("scheduler")),
        "guidance": {"_target_": "models.guidance.Guidance"} | _guidance(folder),
    }


def _guidance(folder: PipelineFolder) -> dict[str, float]:
    """The scales to draw with: those of diffusers' pipeline; in latent diffusion the paper's, of what has something
    that stands for no condition."""
    if folder.kind in _SCALES:
        return _SCALES[folder.kind]
    if folder.kind == "LDMClassPipeline":
        rows, _ = ComponentFolder(folder.path / "class_embedder").shape("embedding.weight")
        return {"scale": 1.0 if rows == folder.config("class_embedder")["classes"] else 1.5}
    return {"scale": 1.5 if folder.kind == "LDMTextToImagePipeline" else 1.0}


def denoiser_of(folder: PipelineFolder) -> ComponentFolder:
    """The denoiser's component. Channels that it reads and does not predict (masks, pictures) lie beside the latent,
    which diffusers' configuration does not tell."""
    component = ComponentFolder(folder.path / folder.denoiser)
    beside = component.config.get("in_channels", 0) - component.config.get("out_channels", 0)
    if beside > 0:
        component.config.setdefault("concat_channels", beside)
    return component


def autoencoder_of(folder: PipelineFolder) -> ComponentFolder:
    """The first stage's component. Super-resolution's pipeline leaves the latents of its own as they are."""
    component = ComponentFolder(folder.path / folder.autoencoder)
    if folder.kind == "LDMSuperResolutionPipeline":
        component.config.setdefault("scaling_factor", 1.0)
    return component


def fields_of(folder: PipelineFolder) -> dict[str, Node]:
    """Fields that samples of a pipeline's networks come with, as data sets of these usually have them."""
    if folder.kind == "LDMClassPipeline":
        classes = folder.config("class_embedder")["classes"]
        return {"class": {"_target_": "data.fields.Label", "column": None, "member": "cls", "classes": classes}}
    if folder.kind == "LDMSemanticPipeline":
        return {"map": {"_target_": "data.fields.LabelMap", "member": "seg.png"}}
    if folder.kind == "LDMLayoutPipeline":
        return {"boxes": {"_target_": "data.fields.Boxes", "column": "boxes"}}
    if folder.kind == EDITING:
        return {EDITED: {"_target_": "data.fields.Picture", "member": f"{EDITED}.jpg"}}
    return {"mask": {"_target_": "data.fields.DrawnMask"}} if "Inpaint" in folder.kind else {}


def network_node(component: ComponentFolder) -> Node:
    """The network of a component's folder; what of its configuration says nothing here is left out."""
    network: Any = component.on_meta()
    cls = CLASSES[network.diffusers_class]
    takes = inspect.signature(cls).parameters
    return {"_target_": f"{cls.__module__}.{cls.__qualname__}"} | {
        key: value for key, value in network.config.items() if key in takes
    }


# Text encoders


def _clip(folder: PipelineFolder, number: str, layer: str, pooled: bool) -> Node:
    return {
        "_target_": "models.text.ClipEncoder",
        "model": str(folder.path),
        "subfolder": f"text_encoder{number}",
        "tokenizer_subfolder": f"tokenizer{number}",
        "length": folder.config(f"tokenizer{number}").get("model_max_length", 77),
        "layer": layer,
        "pooled": pooled,
    }


def _conditioner(encoders: list[Node], dropped: str, **more: Any) -> Node:
    return {"_target_": "models.conditioner.Conditioner", "encoders": encoders, "dropped": dropped, **more}


def _maps(folder: PipelineFolder, model: Node) -> dict[str, Any]:
    """What lies beside the latent, which the number of its channels tells: a masked picture, or one to edit.

    Raises:
        ValueError: something else.
    """
    channels, beside = model["out_channels"], model.get("concat_channels", 0)
    if not beside:
        return {}
    if beside == channels + 1:
        masked = {"latent_channels": channels, "field": "mask", "form": "sd"}
        return {"maps": [{"_target_": "models.conditions.MaskedPicture", **masked}]}
    if beside == channels and folder.kind == EDITING:
        latent = {"field": EDITED, "channels": channels, "encode": True, "scaled": False}
        return {"maps": [{"_target_": "models.conditions.PictureMap", **latent}]}
    raise ValueError(f"{folder.path}: {folder.kind} with {beside} channels beside its latent is not implemented")


def _sd(folder: PipelineFolder, model: Node) -> Node:
    return _conditioner([_clip(folder, "", "last", pooled=False)], "empty", **_maps(folder, model))


def _sdxl(folder: PipelineFolder, model: Node) -> Node:
    encoders = [_clip(folder, "", "penultimate", pooled=False)] if "text_encoder" in folder.components else []
    sizes = {"_target_": "models.conditioner.SizeIds"}
    if folder.index.get("requires_aesthetics_score", False):
        sizes["aesthetic"] = "aesthetic_score"
    dropped = "zeros" if folder.index.get("force_zeros_for_empty_prompt", True) else "empty"
    encoders.append(_clip(folder, "_2", "penultimate", pooled=True))
    return _conditioner(encoders, dropped, sizes=sizes, **_maps(folder, model))


def _sd3(folder: PipelineFolder, model: Node) -> Node:
    encoders = [_clip(folder, number, "penultimate", pooled=True) for number in ("", "_2")]
    width = model["joint_attention_dim"]
    if "text_encoder_3" in folder.components:
        t5 = {"_target_": "models.text.T5Encoder", "model": str(folder.path), "subfolder": "text_encoder_3"}
        encoders.append(t5 | {"tokenizer_subfolder": "tokenizer_3"})
    else:
        absent = {"_target_": "models.conditioner.AbsentEncoder", "length": encoders[0]["length"], "width": width}
        encoders.append(absent)
    # These pipelines sample with the encoding of "" as the unconditional one.
    return _conditioner(encoders, "empty", context_dim=width)


def _ldm(folder: PipelineFolder, model: Node) -> Node:
    return _conditioner([], "zeros")


def _ldm_text(folder: PipelineFolder, model: Node) -> Node:
    told = folder.config("bert")
    tokenizer = {"tokenizer": str(folder.path), "tokenizer_subfolder": "tokenizer"}
    length = {"length": told.get("max_position_embeddings", 77)}
    return _conditioner([_bert(folder, "models.token_transformer.BertTextEncoder", tokenizer | length)], "empty")


def _ldm_layout(folder: PipelineFolder, model: Node) -> Node:
    objects = (folder.config("bert").get("max_position_embeddings", 92) - 2) // 3
    return _conditioner([_bert(folder, "models.layout.LayoutEncoder", {"objects": objects})], "empty")


def _bert(folder: PipelineFolder, target: str, more: Node) -> Node:
    """A transformer over tokens, which learns with the denoiser.

    Raises:
        ValueError: of other activations or inner widths than ours.
    """
    told, path = folder.config("bert"), str(folder.path / "bert")
    width = told.get("d_model", 1280)
    fixed = {"activation_function": "gelu", "encoder_ffn_dim": 4 * width, "scale_embedding": False}
    for key, value in fixed.items():
        if told.get(key, value) != value:
            raise ValueError(f"{path}: {key} is {told[key]!r}, but is {value!r} here")
    sizes = {
        "vocabulary": told.get("vocab_size", 30522),
        "width": width,
        "layers": told.get("encoder_layers", 32),
        "heads": told.get("encoder_attention_heads", 8),
        "head_dim": told.get("head_dim", 64),
    }
    return {"_target_": target, **more, **sizes, "folder": path}


def _ldm_class(folder: PipelineFolder, model: Node) -> Node:
    told = folder.config("class_embedder")
    sizes = {"classes": told["classes"], "width": told["width"], "folder": str(folder.path / "class_embedder")}
    return _conditioner([{"_target_": "models.conditions.ClassEncoder", **sizes}], "empty")


def _ldm_semantic(folder: PipelineFolder, model: Node) -> Node:
    told = folder.config("map_embedder")
    sizes = {"classes": told["classes"], "channels": told["channels"], "folder": str(folder.path / "map_embedder")}
    return _conditioner([], "zeros", maps=[{"_target_": "models.conditions.SemanticMap", **sizes}])


def _ldm_super_resolution(folder: PipelineFolder, model: Node) -> Node:
    # What lies beside the latent are pixels, as many: the picture's sides are divided by what the first stage divides.
    factor = 2 ** (len(ComponentFolder(folder.path / folder.autoencoder).config["block_out_channels"]) - 1)
    map_ = {"_target_": "models.conditions.LowResolution", "factor": factor, "noise": 0.0}
    return _conditioner([], "zeros", maps=[map_])


def _ldm_inpainting(folder: PipelineFolder, model: Node) -> Node:
    masked = {"latent_channels": model["out_channels"], "field": "mask", "form": "ldm"}
    return _conditioner([], "zeros", maps=[{"_target_": "models.conditions.MaskedPicture", **masked}])


_CONDITIONERS: Mapping[str, Callable[[PipelineFolder, Node], Node]] = {
    "LDMPipeline": _ldm,
    "LDMTextToImagePipeline": _ldm_text,
    "LDMSuperResolutionPipeline": _ldm_super_resolution,
    # Of ours, which diffusers has no pipelines for.
    "LDMClassPipeline": _ldm_class,
    "LDMInpaintPipeline": _ldm_inpainting,
    "LDMLayoutPipeline": _ldm_layout,
    "LDMSemanticPipeline": _ldm_semantic,
    "StableDiffusionPipeline": _sd,
    "StableDiffusionImg2ImgPipeline": _sd,
    "StableDiffusionInpaintPipeline": _sd,
    EDITING: _sd,
    "StableDiffusionXLPipeline": _sdxl,
    "StableDiffusionXLImg2ImgPipeline": _sdxl,
    "StableDiffusionXLInpaintPipeline": _sdxl,
    "StableDiffusion3Pipeline": _sd3,
    "StableDiffusion3Img2ImgPipeline": _sd3,
    "StableDiffusion3InpaintPipeline": _sd3,
}

# What diffusers draws with where nothing is asked for: guidance_scale, image_guidance_scale.
_SCALES: Mapping[str, dict[str, float]] = {
    "StableDiffusionPipeline": {"scale": 7.5},
    "StableDiffusionImg2ImgPipeline": {"scale": 7.5},
    "StableDiffusionInpaintPipeline": {"scale": 7.5},
    EDITING: {"scale": 7.5, "picture_scale": 1.5},
    "StableDiffusionXLPipeline": {"scale": 5.0},
    "StableDiffusionXLImg2ImgPipeline": {"scale": 5.0},
    "StableDiffusionXLInpaintPipeline": {"scale": 7.5},
    "StableDiffusion3Pipeline": {"scale": 7.0},
    "StableDiffusion3Img2ImgPipeline": {"scale": 7.0},
    "StableDiffusion3InpaintPipeline": {"scale": 7.0},
}

# Schedulers

PREDICTIONS = {"epsilon": "Noise", "v_prediction": "V", "sample": "Image"}
BETA_SCHEDULES = {"scaled_linear": "ScaledLinear", "linear": "Linear", "squaredcos_cap_v2": "SquaredCosine"}


def process_node(scheduler: Mapping[str, Any]) -> Node:
    """The process that a network was trained with, of its scheduler's configuration.

    Raises:
        ValueError: a schedule that is not implemented; names the setting.
    """
    kind = scheduler.get("_class_name", "")
    if kind.startswith("FlowMatch"):
        straight = {"_target_": "models.schedules.RectifiedFlow"}
        return _process(straight, "Velocity", "LogitNormal", scheduler.get("shift", 1.0))
    schedule = scheduler.get("beta_schedule", "linear")
    if schedule not in BETA_SCHEDULES:
        raise ValueError(f"scheduler: beta_schedule {schedule!r} of {kind} is none of {', '.join(BETA_SCHEDULES)}")
    if scheduler.get("trained_betas"):
        raise ValueError(f"scheduler: trained_betas of {kind} is not implemented")
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise ValueError(f"scheduler: prediction_type {prediction!r} is none of {', '.join(PREDICTIONS)}")
    steps = scheduler.get("num_train_timesteps", 1000)
    rates = {"beta_start": scheduler.get("beta_start", 0.0001), "beta_end": scheduler.get("beta_end", 0.02)}
    path = {"_target_": f"models.schedules.{BETA_SCHEDULES[schedule]}", "steps": steps}
    path |= rates if schedule != "squaredcos_cap_v2" else {}
    if scheduler.get("rescale_betas_zero_snr"):
        path = {"_target_": "models.schedules.ZeroTerminalSNR", "of": path, "steps": steps}
    return _process(path, PREDICTIONS[prediction], "Uniform")


def _process(path: Node, parameterization: str, density: str, shift: float = 1.0) -> Node:
    return {
        "_target_": "models.process.Process",
        "path": path,
        "parameterization": {"_target_": f"models.parameterizations.{parameterization}"},
        "density": {"_target_": f"models.densities.{density}"},
        "weight": {"_target_": "models.weighting.Unweighted"},
        "shift": shift,
    }


_SAMPLERS: Mapping[str, tuple[str, Node]] = {
    "PNDMScheduler": ("PLMS", {}),
    "DDIMScheduler": ("DDIM", {}),
    "EulerDiscreteScheduler": ("Euler", {}),
    "EulerAncestralDiscreteScheduler": ("DDIM", {"eta": 1.0}),
    "DPMSolverMultistepScheduler": ("DPMSolverPP2M", {}),
}


def sampler_node(scheduler: Mapping[str, Any], steps: int = 50) -> Node:
    """The sampler that a scheduler's configuration describes; Euler's method on the same times where there is no
    counterpart of it here."""
    kind = scheduler.get("_class_name", "")
    if kind.startswith("FlowMatch"):
        # Its last time before 0 is 1 of 1000 levels, shifted; the grid shifts it once more.
        shift = scheduler.get("shift", 1.0)
        last = shift / (1000 + shift - 1)
        grid = {"_target_": "models.samplers.UniformTimes", "last": last}
        return {"_target_": "models.samplers.Euler", "steps": steps, "grid": grid}
    default = "leading" if kind in ("PNDMScheduler", "DDIMScheduler") else "linspace"
    to_image = (
        True if kind not in ("PNDMScheduler", "DDIMScheduler") else scheduler.get("set_alpha_to_one", kind[0] == "D")
    )
    grid = {
        "_target_": "models.samplers.DiscreteTimes",
        "spacing": scheduler.get("timestep_spacing", default),
        "offset": scheduler.get("steps_offset", 0),
        "train_steps": scheduler.get("num_train_timesteps", 1000),
        "to_image": to_image,
    }
    sampler, options = _SAMPLERS.get(kind, ("Euler", {}))
    return {"_target_": f"models.samplers.{sampler}", "steps": steps, **options, "grid": grid}
