"""Whole systems in one file, in their authors' layout: Stable Diffusion 1, 2, XL, its refiner and 3; latent diffusion's
own of text, classes, maps, and of pictures beside the latent or nothing; and its autoencoders alone.

A family is a pipeline of diffusers' and a list of components: what tensors they begin with, how these are named
(models/original/names.py), and what configuration follows from them (models/original/configs.py).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from models.original import configs, names
from models.original.names import Names, Row, SameNames
from models.pipeline_folder import PipelineFolder
from models.tensor_files import Meta, TensorSource, some


@dataclass(frozen=True)
class Component:
    """A network of a family.

    Args:
        prefix: of its tensors in the original.
        configure: the configuration of tensors of these shapes.
        rows: its table, of a configuration; None: the names are diffusers' own.
        identity: a square matrix, by diffusers' name, which files may leave out where it is the identity.
    """

    prefix: str
    configure: Callable[[configs.Shapes], dict[str, Any]]
    rows: Callable[[Mapping[str, Any]], list[Row]] | None = None
    identity: str | None = None

    def names(self, config: Mapping[str, Any]) -> Names:
        """The two names of each tensor, under a configuration."""
        if self.rows is None:
            return SameNames(self.prefix, {"encoder.embed_tokens.weight": "shared.weight"})  # T5's
        return Names(self.rows(config), self.prefix)


@dataclass(frozen=True)
class Family:
    """Systems of one kind.

    Args:
        pipeline: diffusers' class, or a name where it has none; "" where it is one component.
        mark: what the name of one of the tensors begins with, in this family only; of `PLAIN`, nothing tells it.
        components: by their folder's name in a pipeline.
        scheduler: configuration of the scheduler that the published pipeline has.
        index: further entries of its model_index.json.
    """

    pipeline: str
    mark: str
    components: Mapping[str, Component]
    scheduler: Mapping[str, Any]
    index: Mapping[str, Any]


_UNET, _FIRST, _CONDITION = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
PLAIN = "a UNet and a first stage"
_BETAS = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "prediction_type": "epsilon",
}
_PNDM = {"_class_name": "PNDMScheduler", **_BETAS, "skip_prk_steps": True, "set_alpha_to_one": False}
_DDIM = {"_class_name": "DDIMScheduler", **_BETAS, "clip_sample": False, "set_alpha_to_one": False}
_EULER = {"_class_name": "EulerDiscreteScheduler", **_BETAS, "interpolation_type": "linear"}
# Betas are the file's own. Published samples of latent diffusion were drawn at its DDIM sampler's steps.
_DDIM_OF_LDM = {**_DDIM, "beta_start": None, "beta_end": None}
_NO_CHECKER = {"safety_checker": [None, None], "feature_extractor": [None, None], "image_encoder": [None, None]}

FAMILIES = {
    "sd3": Family(
        "StableDiffusion3Pipeline",
        f"{_UNET}joint_blocks.",
        {
            "transformer": Component(_UNET, configs.mmdit, names.mmdit),
            "vae": Component(_FIRST, configs.autoencoder(1.5305, 0.0609), names.autoencoder),
            "text_encoder": Component(
                "text_encoders.clip_l.transformer.", configs.clip_of_sd3, identity="text_projection.weight"
            ),
            "text_encoder_2": Component("text_encoders.clip_g.transformer.", configs.clip_of_sd3),
            "text_encoder_3": Component("text_encoders.t5xxl.transformer.", configs.t5),
        },
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0},
        {},
    ),
    "sdxl": Family(
        "StableDiffusionXLPipeline",
        "conditioner.embedders.1.",
        {
            "unet": Component(_UNET, configs.unet_of_sdxl, names.unet),
            "vae": Component(_FIRST, configs.autoencoder(0.13025), names.autoencoder),
            "text_encoder": Component("conditioner.embedders.0.transformer.", configs.clip),
            "text_encoder_2": Component("conditioner.embedders.1.model.", configs.open_clip, names.open_clip),
        },
        _EULER,
        {"force_zeros_for_empty_prompt": True},
    ),
    "sdxl_refiner": Family(
        "StableDiffusionXLImg2ImgPipeline",
        "conditioner.embedders.0.model.",
        {
            "unet": Component(_UNET, configs.unet_of_sdxl, names.unet),
            "vae": Component(_FIRST, configs.autoencoder(0.13025), names.autoencoder),
            "text_encoder_2": Component("conditioner.embedders.0.model.", configs.open_clip, names.open_clip),
        },
        _EULER,
        {
            "force_zeros_for_empty_prompt": False,
            "requires_aesthetics_score": True,
            "text_encoder": [None, None],
            "tokenizer": [None, None],
        },
    ),
    "sd2": Family(
        "StableDiffusionPipeline",
        "cond_stage_model.model.",
        {
            "unet": Component(_UNET, configs.unet, names.unet),
            "vae": Component(_FIRST, configs.autoencoder(0.18215), names.autoencoder),
            "text_encoder": Component("cond_stage_model.model.", configs.open_clip_of_sd2, names.open_clip),
        },
        _DDIM,
        {**_NO_CHECKER, "requires_safety_checker": False},
    ),
    "sd1": Family(
        "StableDiffusionPipeline",
        "cond_stage_model.transformer.text_model.",
        {
            "unet": Component(_UNET, configs.unet_of_sd1, names.unet),
            "vae": Component(_FIRST, configs.autoencoder(0.18215), names.autoencoder),
            "text_encoder": Component("cond_stage_model.transformer.", configs.clip),
        },
        _PNDM,
        {**_NO_CHECKER, "requires_safety_checker": False},
    ),
    "ldm_text": Family(
        "LDMTextToImagePipeline",
        "cond_stage_model.transformer.token_emb.",
        {
            "unet": Component(_UNET, configs.unet_of_ldm, names.unet),
            "vqvae": Component(_FIRST, configs.first_stage(0.18215), names.autoencoder),
            "bert": Component("cond_stage_model.transformer.", configs.bert, names.bert),
        },
        _DDIM_OF_LDM,
        {},
    ),
    "ldm_class": Family(
        "LDMClassPipeline",
        "cond_stage_model.embedding.",
        {
            "unet": Component(_UNET, configs.unet_of_ldm, names.unet),
            "vqvae": Component(_FIRST, configs.first_stage(None), names.autoencoder),
            "class_embedder": Component("cond_stage_model.", configs.classes, names.classes),
        },
        _DDIM_OF_LDM,
        {},
    ),
    "ldm_map": Family(
        "LDMSemanticPipeline",
        "cond_stage_model.channel_mapper.",
        {
            "unet": Component(_UNET, configs.unet_of_ldm, names.unet),
            "vqvae": Component(_FIRST, configs.first_stage(None), names.autoencoder),
            "map_embedder": Component("cond_stage_model.", configs.maps, names.maps),
        },
        _DDIM_OF_LDM,
        {},
    ),
    "ldm": Family(
        "LDMPipeline",
        PLAIN,
        {
            "unet": Component(_UNET, configs.unet_of_ldm, names.unet),
            "vqvae": Component(_FIRST, configs.first_stage(None), names.autoencoder),
        },
        _DDIM_OF_LDM,
        {},
    ),
    "vq": Family("", "quantize.embedding.", {"vqvae": Component("", configs.vq, names.autoencoder)}, {}, {}),
    "kl": Family("", "encoder.down.", {"vae": Component("", configs.autoencoder(None), names.autoencoder)}, {}, {}),
}
# Files of numbers of 8 bits that are to be multiplied by others beside them.
_SCALES = (".scale_weight", ".weight_scale", "scaled_fp8")


class OriginalCheckpoint:
    """An original checkpoint, whose components are read under diffusers' names, one tensor at a time.

    Args:
        source: the file.
        given: configurations by component, where they are known; the others follow from the tensors.
        average: take the average of the UNet's weights that training files of 2022 hold beside them ("model_ema").
        assumed: the family of a file that holds a denoiser alone, which does not tell it.

    Raises:
        ValueError: it is of no family that is known, has no such average, or keeps its weights divided by scales.
    """

    def __init__(
        self,
        source: TensorSource,
        given: Mapping[str, Mapping[str, Any]] | None = None,
        average: bool = False,
        assumed: str | None = None,
    ) -> None:
        self._source, self._given, self._average = source, given or {}, average
        self._names = source.names()
        if scaled := [name for name in self._names if name.endswith(_SCALES)]:
            raise ValueError(
                f"its weights are kept divided by scales ({some(scaled)}), which are not read: take a file without"
            )
        if average and not any(name.startswith("model_ema.") for name in self._names):
            raise ValueError("the checkpoint holds no average (model_ema): leave average=none")
        marked = (n for n, f in FAMILIES.items() if any(tensor.startswith(f.mark) for tensor in self._names))
        kind = next(marked, None)
        if kind is None and any(tensor.startswith(_UNET) for tensor in self._names):
            kind = assumed or self._plain()
            if kind is None:
                raise ValueError(f"a checkpoint of a denoiser alone ({_UNET}...): name a pipeline like it")
        if kind is None:
            raise ValueError(
                f"no checkpoint of a system that is known ({', '.join(FAMILIES)}): its tensors are {some(self._names)}"
            )
        self.kind, self.family = kind, FAMILIES[kind]

    @cached_property
    def components(self) -> dict[str, dict[str, Any]]:
        """Configurations of the components that the file holds, by component."""
        found = {}
        for name, component in self.family.components.items():
            stem = component.prefix
            shapes = {n.removeprefix(stem): self._source.meta(n).shape for n in self._names if n.startswith(stem)}
            if shapes:
                found[name] = dict(self._given[name]) if name in self._given else self._configured(component, shapes)
        return found

    @staticmethod
    def _configured(component: Component, shapes: configs.Shapes) -> dict[str, Any]:
        try:
            return component.configure(shapes)
        except KeyError as error:
            raise ValueError(f"it lacks {component.prefix}{error.args[0]}") from error

    def _plain(self) -> str | None:
        """Latent diffusion's systems whose conditions, if they have any, need no weights; None: no such system.

        Raises:
            ValueError: it has a network that makes conditions, of no kind that is known, or lacks one.
        """
        if not any(name.startswith(_FIRST) for name in self._names):
            return None
        # Inpainting's encoder of the masked picture is the first stage, which the file holds twice.
        seconds = {_CONDITION + name.removeprefix(_FIRST) for name in self._names if name.startswith(_FIRST)}
        if more := [name for name in self._names if name.startswith(_CONDITION) and name not in seconds]:
            raise ValueError(f"its conditions are made by {some(more)}, of no kind that is known")
        if read := [name for name in self._names if name.startswith(_UNET) and name.endswith("attn2.to_k.weight")]:
            raise ValueError(
                f"its UNet reads a context ({read[0]}), and no network of the file ({_CONDITION}...) makes one: name a"
                " pipeline like it"
            )
        return "ldm"

    def number(self, name: str) -> Tensor | None:
        """A tensor that belongs to no network: the noise schedule's "betas", the latents' "scale_factor"."""
        return self._source.read(name) if name in self._names else None

    def layout(self, name: str) -> dict[str, Meta]:
        """Types and shapes of a component's tensors, by diffusers' names."""
        layout = {
            theirs: Meta(part.dtype, tuple(part.shape))
            for original in self._of(name)
            for theirs, part in self._convert(name, original, _unread(self._source.meta(original))).items()
        }
        if (left_out := self.family.components[name].identity) is not None and left_out not in layout:
            width = self.components[name]["hidden_size"]
            layout[left_out] = Meta(next(iter(layout.values())).dtype, (width, width))
        return layout

    def tensors(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """A component's tensors, by diffusers' names."""
        for original in self._of(name):
            yield from self._convert(name, original, self._source.read(self._averaged(name, original))).items()
        left_out = self.family.components[name].identity
        if left_out is not None and self.family.components[name].prefix + left_out not in self._names:
            yield left_out, torch.eye(self.components[name]["hidden_size"])

    def unused(self) -> list[str]:
        """Tensors that no component takes: averages, what is for training alone. Not counted are numbers of the noise
        schedule, which stand in no network, and a first stage that makes conditions, too, and stands there twice."""
        taken = {
            original
            for name in self.components
            for original in self._of(name)
            if self._convert(name, original, _unread(self._source.meta(original)))
        }
        taken |= {_CONDITION + name.removeprefix(_FIRST) for name in taken if name.startswith(_FIRST)}
        return [name for name in self._names if name not in taken and "." in name]

    @cached_property
    def _converters(self) -> dict[str, Names]:
        return {name: self.family.components[name].names(config) for name, config in self.components.items()}

    def _of(self, name: str) -> list[str]:
        stem = self.family.components[name].prefix
        return [original for original in self._names if original.startswith(stem)]

    def _convert(self, name: str, original: str, tensor: Tensor) -> dict[str, Tensor]:
        return self._converters[name].to_diffusers(original, tensor)

    def _averaged(self, name: str, original: str) -> str:
        if not self._average or name != "unet":
            return original
        # LitEma names its buffers by the parameters' names without dots, which buffers' names may not have.
        return "model_ema." + original.removeprefix("model.").replace(".", "")


def family_of(pipeline: PipelineFolder) -> str:
    """The family of a pipeline in diffusers' layout."""
    if pipeline.kind.startswith("LDM"):
        own = {"bert": "ldm_text", "class_embedder": "ldm_class", "map_embedder": "ldm_map"}
        return next((kind for component, kind in own.items() if component in pipeline.components), "ldm")
    if "StableDiffusion3" in pipeline.kind:
        return "sd3"
    if "XL" in pipeline.kind:
        return "sdxl" if "text_encoder" in pipeline.components else "sdxl_refiner"
    return "sd2" if pipeline.config("unet").get("use_linear_projection", False) else "sd1"


def _unread(meta: Meta) -> Tensor:
    return torch.empty(meta.shape, dtype=meta.dtype, device="meta")


def to_original(
    kind: str, sources: Mapping[str, TensorSource], configs: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Meta], Iterator[tuple[str, Tensor]], list[str]]:
    """A family's components as one original checkpoint.

    Args:
        kind: the family.
        sources: tensors of the components by diffusers' names.
        configs: their configurations.

    Returns:
        Types and shapes by original names, the tensors, and what has no place in the original.
    """
    layout: dict[str, Meta] = {}
    left_out: list[str] = []
    wanted: list[tuple[str, Names, str, tuple[str, ...]]] = []
    for component, source in sources.items():
        converter = FAMILIES[kind].components[component].names(configs[component])
        originals, rest = converter.originals(source.names())
        left_out += [f"{component}.{name}" for name in rest]
        for original, parts in originals.items():
            unread = converter.to_original(original, [_unread(source.meta(part)) for part in parts])
            layout[original] = Meta(unread.dtype, tuple(unread.shape))
            wanted.append((component, converter, original, parts))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for component, converter, original, parts in wanted:
            yield original, converter.to_original(original, [sources[component].read(part) for part in parts])

    return layout, tensors(), left_out
