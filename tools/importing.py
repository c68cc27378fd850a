"""The `import` job: published weights as a run's folder, in diffusers' layout, to sample from and to train on."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import yaml
from pydantic import PositiveFloat, PositiveInt

from conf.errors import ConfigError
from conf.schema import build
from data.run_directory import check_name
from models.original.checkpoint import OriginalCheckpoint, family_of
from models.original.configs import scaled_linear, with_heads
from models.pipeline_folder import (
    INDEX,
    TRANSFORMERS_STEM,
    PipelineFolder,
    is_network,
    is_text,
    stem_of,
    tokenizer_of,
)
from models.pretrained import DIFFUSERS_VERSION, STEM, ComponentFolder
from models.tensor_files import (
    Meta,
    TensorSource,
    index_file,
    open_file,
    some,
    stem_files,
    variant_of,
    whole_file,
    write_json,
    write_stem,
)
from trainer.networks import conditioner_learns
from trainer.pipelines import EDITED, EDITING, autoencoder_of, config_of, denoiser_of, fields_of
from trainer.published import beyond_diffusers


class _Published(NamedTuple):
    """A tokenizer on the hub: its name and class, and the token that fills up captions, which encoders attend to; None:
    the hub's own."""

    place: str
    kind: str
    padding: str | None = None


# Of the published models' text encoders, for files, which hold none. OpenCLIP's were trained with token 0 at the end,
# and their folders on the hub name another.
_OPEN_CLIP = _Published("laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", "CLIPTokenizer", "!")
_TOKENIZERS = {
    "text_encoder": _Published("openai/clip-vit-large-patch14", "CLIPTokenizer", "<|endoftext|>"),
    "text_encoder_2": _OPEN_CLIP,
    "text_encoder_3": _Published("google/t5-v1_1-xxl", "T5Tokenizer"),
    "bert": _Published("google-bert/bert-base-uncased", "BertTokenizer"),
}
_TOKENIZERS_OF = {"sd2": {"text_encoder": _OPEN_CLIP}}  # in the place of these
_UNREAD = (".bin", ".msgpack", ".h5", ".onnx")  # files of weights that are not copied
_LAYOUT_TOKENS = 8192  # of latent diffusion's transformer over boxes
# Settings of original files, which folders tell themselves.
_OF_FILES = ("like", "prediction", "scaling_factor", "heads", "head_channels", "classes")


@dataclass
class Config:
    """conf/import.yaml, whose comments explain the keys."""

    source: str
    name: str
    runs: str
    like: str | None
    average: Literal["none", "ema"]
    prediction: Literal["epsilon", "v_prediction"] | None
    scaling_factor: PositiveFloat | None
    heads: PositiveInt | None
    head_channels: PositiveInt | None
    classes: PositiveInt | None
    dtype: Literal["float32", "bfloat16", "float16"] | None
    shard_bytes: PositiveInt


def run(config: Any) -> None:
    """Write `<runs>/<name>`: a pipeline in diffusers' layout, and `experiment.yaml`, which trains it on."""
    check_name(config.name)
    source, target = Path(config.source), Path(config.runs) / config.name
    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"name={config.name}: {target} is there already; give another name, or remove it.")
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        if source.is_dir():
            for key in _OF_FILES:
                if config[key] is not None:
                    raise ConfigError(f"{key}: {source} is a folder, whose own configs count; leave it out.")
            notes = _from_folder(PipelineFolder(source), partial, config)
        elif source.is_file():
            notes = _from_file(source, partial, config)
        else:
            raise ConfigError(f"source: there is neither a folder nor a file {source}.")
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for note in notes:
        print(note)
    if not (target / INDEX).is_file():
        print(f"{target}: an autoencoder, for first_stage.folder={target}.")
        return
    _write_experiment(target)
    print(
        f"{target}: {PipelineFolder(target).kind}. Train it on: millrace train experiment={target}/experiment.yaml ..."
    )


def _from_folder(folder: PipelineFolder, target: Path, config: Any) -> list[str]:
    _check(folder)  # what is not known is refused before anything is copied
    index, notes = dict(folder.index), []
    for name in folder.components:
        if unread := _weights_of_other_kinds(folder.path / name):
            index[name] = [None, None]
            notes.append(f"{name} is left out: it has no safetensors, but {some(unread)}, which are never read.")
            continue
        rewritten = config.dtype is not None and is_network(name)
        _copy(folder.path / name, target / name, weights=not rewritten)
        if rewritten:
            rewrite(folder.tensors(name), target / name, stem_of(name), config.dtype, config.shard_bytes)
    write_json(target / INDEX, index)
    return notes


def _check(folder: PipelineFolder) -> None:
    """Whether a pipeline is known, and holds all weights of its networks.

    Raises:
        ValueError: it is not, or does not.
    """
    for name in filter(is_network, folder.components):
        stem_files(folder.path / name, stem_of(name))
    config = config_of(folder)
    denoiser: Any = denoiser_of(folder).on_meta()
    denoiser_of(folder).check(denoiser)
    autoencoder_of(folder).check(autoencoder_of(folder).on_meta())
    if not folder.kind.startswith("LDM"):
        return
    with torch.device("meta"):
        conditioner = build(config["conditioner"])
    for part in (*conditioner.numbered(), *conditioner.map_list()):
        if part.learned:
            part.check_folder()
    gives = {"concat_channels": conditioner.concat_channels}
    gives |= denoiser.condition_keys(conditioner.context_dim, conditioner.pooled_dim)
    for key, given in gives.items():
        if denoiser.config[key] != given:
            raise ValueError(f"its UNet has {key}={denoiser.config[key]}, but what makes its conditions gives {given}")


def _weights_of_other_kinds(component: Path) -> list[str]:
    """Names of a component's files of weights in pickle and the like, where it has no others."""
    files = sorted(file.name for file in component.iterdir())
    return [] if any(".safetensors" in name for name in files) else [name for name in files if name.endswith(_UNREAD)]


def _copy(source: Path, target: Path, weights: bool = True) -> None:
    """A component's folder, without weights in pickle; files are shared where the file system lets them be, as nothing
    writes into files of weights. Those of a variant alone ("fp16") get the names that are opened without asking for it.

    Raises:
        ValueError: see `variant_of`.
    """
    target.mkdir()
    names: dict[str, str] = {}
    for stem in (STEM, TRANSFORMERS_STEM):
        variant = variant_of(source, stem)
        names |= {file(source, stem, variant).name: file(source, stem).name for file in (whole_file, index_file)}
    for file in source.iterdir():
        unread = file.name.endswith(_UNREAD) or file.is_dir()
        if unread or (not weights and ".safetensors" in file.name):
            continue
        own = target / names.get(file.name, file.name)
        try:
            os.link(file.resolve(), own)
        except OSError:
            shutil.copyfile(file, own)


def rewrite(source: TensorSource, folder: Path, stem: str, dtype: str | None, shard_bytes: int) -> None:
    """Write a component's tensors, one at a time.

    Args:
        dtype: of floating-point tensors; None keeps theirs.
    """
    layout = {name: converted(source.meta(name), dtype) for name in source.names()}
    write_stem(folder, stem, layout, ((name, source.read(name)) for name in source.names()), shard_bytes)


def converted(meta: Meta, dtype: str | None) -> Meta:
    """The same in another floating-point type; numbers of 8 bits, which nothing computes in, in one that holds them."""
    if dtype is None and meta.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        dtype = "float16"
    return Meta(getattr(torch, dtype), meta.shape) if dtype is not None and meta.dtype.is_floating_point else meta


def _from_file(source: Path, target: Path, config: Any) -> list[str]:
    like = PipelineFolder(config.like) if config.like is not None else None
    given = {name: like.config(name) for name in like.components} if like is not None else {}
    checkpoint = OriginalCheckpoint(
        open_file(source), given, config.average == "ema", family_of(like) if like is not None else None
    )
    family = checkpoint.family
    if not family.pipeline:
        return _autoencoder_from_file(checkpoint, target, config)
    notes = _of_latent_diffusion(checkpoint, source, given, config)
    kind = _kind(checkpoint, source, given)
    if like is not None and like.kind not in (kind, family.pipeline):
        raise ConfigError(f"like: {like.path} is a {like.kind}, but {source} holds a {kind}.")
    if checkpoint.kind == "sd2" and config.prediction is None and like is None:
        raise ConfigError(
            f"prediction: {source} does not tell what it predicts; give prediction=epsilon (Stable Diffusion 2 base,"
            " 512 px) or prediction=v_prediction (768 px)."
        )
    index: dict[str, Any] = {"_class_name": kind, "_diffusers_version": DIFFUSERS_VERSION, **family.index}
    for name, settings in checkpoint.components.items():
        _write_component(checkpoint, name, settings, target, config)
        index[name] = _class_of(name, settings)
    for name in family.components:
        if name in checkpoint.components:
            continue
        if like is not None and name in like.components:
            _copy(like.path / name, target / name)
            index[name] = like.index[name]
        elif name == "text_encoder_3":
            index[name] = [None, None]
            notes.append("The file has no T5: captions are read by the CLIP encoders alone.")
        else:
            raise ConfigError(f"like: {source} has no {name}; give like=<a folder of a {kind} that has one>.")
    published = _TOKENIZERS | _TOKENIZERS_OF.get(checkpoint.kind, {})
    for name in family.components:
        if (own := tokenizer_of(name)) is not None and kind != "LDMLayoutPipeline":
            index[own] = [None, None] if index[name] == [None, None] else _tokenizer(own, published[name], target, like)
    scheduler = dict(like.config("scheduler")) if like is not None else _scheduler(checkpoint, source)
    if config.prediction is not None:
        scheduler["prediction_type"] = config.prediction
    write_json(target / "scheduler" / "scheduler_config.json", scheduler)
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    write_json(target / INDEX, index)
    _check(PipelineFolder(target))
    if unused := [name for name in checkpoint.unused() if not name.startswith("model_ema.")]:
        notes.append(f"{len(unused)} tensors have no place in it, such as {unused[0]}.")
    return notes


def _write_component(
    checkpoint: OriginalCheckpoint, name: str, settings: Mapping[str, Any], target: Path, config: Any
) -> None:
    layout = {key: converted(meta, config.dtype) for key, meta in checkpoint.layout(name).items()}
    write_stem(target / name, stem_of(name), layout, checkpoint.tensors(name), config.shard_bytes)
    write_json(target / name / "config.json", settings)


def _autoencoder_from_file(checkpoint: OriginalCheckpoint, target: Path, config: Any) -> list[str]:
    """The one component of a file of an autoencoder alone."""
    for key in _OF_FILES:
        if key != "scaling_factor" and config[key] is not None:
            raise ConfigError(f"{key}: {config.source} holds an autoencoder alone; leave it out.")
    (name, settings), *_ = checkpoint.components.items()
    if config.scaling_factor is not None:
        settings["scaling_factor"] = config.scaling_factor
    if settings["scaling_factor"] is None:
        raise ConfigError(
            f"scaling_factor: {config.source} does not tell how its latents are scaled: 0.18215 in Stable Diffusion 1"
            " and 2, 0.13025 in XL."
        )
    _write_component(checkpoint, name, settings, target, config)
    component = ComponentFolder(target / name)
    component.check(component.on_meta())
    return []


def _of_latent_diffusion(
    checkpoint: OriginalCheckpoint, source: Path, given: Mapping[str, Any], config: Any
) -> list[str]:
    """Complete the configurations of latent diffusion's components by what their weights do not tell.

    Raises:
        ConfigError: it is nowhere told, or told of another family, which has it.
    """
    told = [key for key in ("scaling_factor", "heads", "head_channels", "classes") if config[key] is not None]
    if not checkpoint.kind.startswith("ldm"):
        if told:
            raise ConfigError(f"{told[0]}: {source} is of a family that has one; leave it out.")
        return []
    notes, components = [], checkpoint.components
    if "unet" in components and "unet" not in given:
        unet = components["unet"]
        if config.heads is not None or config.head_channels is not None:
            if config.heads is not None and config.head_channels is not None:
                raise ConfigError("head_channels: heads tells the same; leave one of them out.")
            unet.pop("attention_heads", None)
            unet |= with_heads(unet, config.heads, config.head_channels or 0)
        else:
            notes.append("Its weights do not tell heads, which are those of the published models, or of 32 channels.")
    if (first := components.get("vqvae")) is not None and "vqvae" not in given:
        measured = checkpoint.number("scale_factor")
        factor = config.scaling_factor or (float(measured) if measured is not None else first["scaling_factor"])
        if factor is None:
            raise ConfigError(f"scaling_factor: {source} does not tell how its latents are scaled (scale_factor).")
        first["scaling_factor"] = factor
        if "unet" in components and "unet" not in given:
            components["unet"]["sample_size"] = 256 >> (len(first["block_out_channels"]) - 1)
    if (embedder := components.get("class_embedder")) is not None and "class_embedder" not in given:
        embedder["classes"] = config.classes or embedder["classes"]
        rows = checkpoint.layout("class_embedder")["embedding.weight"].shape[0]
        if embedder["classes"] is None:
            raise ConfigError(f"classes: {source} has {rows} vectors: give their number without one for none, if any.")
        if embedder["classes"] == rows:
            notes.append("No vector of its classes stands for none: they are drawn without guidance.")
    notes += beyond_diffusers(_kind(checkpoint, source, given), components.get("unet", {}))
    if config.average == "none" and any(name.startswith("model_ema.") for name in checkpoint.unused()):
        notes.append("It holds the average of its weights, too, which the authors sample with: average=ema.")
    return notes


def _scheduler(checkpoint: OriginalCheckpoint, source: Path) -> dict[str, Any]:
    scheduler = dict(checkpoint.family.scheduler)
    if "beta_start" in scheduler and scheduler["beta_start"] is None:
        betas = checkpoint.number("betas")
        if betas is None:
            raise ConfigError(f"like: {source} does not tell its noise schedule (betas); give like=<a folder of such>.")
        scheduler |= scaled_linear(betas)
    return scheduler


def _kind(checkpoint: OriginalCheckpoint, source: Path, given: Mapping[str, Any]) -> str:
    """The pipeline of a file in the place of the family's own: what lies beside its UNet's latent tells them apart, and
    of which tokens its transformer reads.

    Raises:
        ConfigError: there is no pipeline of the family with so many channels beside the latent.
    """
    pipeline, unet = checkpoint.family.pipeline, checkpoint.components.get("unet", {})
    if checkpoint.kind == "ldm_text":
        bert = checkpoint.components.get("bert") or given.get("bert", {})
        pipeline = "LDMLayoutPipeline" if bert.get("vocab_size") == _LAYOUT_TOKENS else pipeline
    out = unet.get("out_channels", 0)
    beside = unet.get("in_channels", 0) - out
    if beside <= 0 or checkpoint.kind == "ldm_map":
        return pipeline
    kinds = {}
    if checkpoint.kind in ("ldm", "sd1", "sd2", "sdxl"):
        kinds[out + 1] = pipeline.replace("Pipeline", "InpaintPipeline")
    if checkpoint.kind in ("ldm", "sd1", "sd2"):
        kinds[out] = "LDMSuperResolutionPipeline" if checkpoint.kind == "ldm" else EDITING
    if beside not in kinds:
        known = f"those of {' or '.join(map(str, kinds))} are" if kinds else "none with any are"
        raise ConfigError(
            f"source: the UNet of {source} reads {out + beside} channels, {beside} beside a latent of {out}"
            f" (input_blocks.0.0.weight); of its family, {checkpoint.kind}, {known} known"
        )
    return kinds[beside]


def _class_of(component: str, settings: Mapping[str, Any]) -> list[str | None]:
    """A component's entry in model_index.json."""
    if component == "bert":
        return ["latent_diffusion", "LDMBertModel"]
    if component in ("class_embedder", "map_embedder"):
        return ["millrace", settings["_class_name"]]
    return (
        ["transformers", settings["architectures"][0]] if is_text(component) else ["diffusers", settings["_class_name"]]
    )


def _tokenizer(name: str, published: _Published, target: Path, like: PipelineFolder | None) -> list[str | None]:
    if like is not None:
        _copy(like.path / name, target / name)
        return like.index[name]
    from transformers import AutoTokenizer

    told = {"pad_token": published.padding} if published.padding is not None else {}
    try:
        AutoTokenizer.from_pretrained(published.place, **told).save_pretrained(target / name)
    except OSError as error:
        raise ConfigError(
            f"like: a single file holds no tokenizer, and {published.place} cannot be reached; give like=<a folder of"
            " such a pipeline>."
        ) from error
    return ["transformers", published.kind]


def _write_experiment(target: Path) -> None:
    """What `experiment=<file>` sets: networks as they are in the folder, where their weights come from, and fields that
    they read."""
    folder = PipelineFolder(target.resolve())
    config: dict[str, Any] = dict(config_of(folder))
    config["init_from"] = {"path": str(folder.path), "networks": {"denoiser": folder.denoiser}}
    encoders, fields = len(config["conditioner"]["encoders"]), fields_of(folder)
    if fields:
        config["data"] = {"fields": fields}
    if EDITED in fields:  # text and picture are left out now and then, as that model was trained
        config["objective"] = {"caption_dropout": [0.1] * (encoders + 1)}
    if not encoders:
        config["objective"] = {"caption_dropout": 0.0}
    if conditioner_learns(config["conditioner"]):
        config["objective"] = {"caption_dropout": 0.1, "train_conditioner": True}
    text = yaml.safe_dump(config, sort_keys=False)
    (target / "experiment.yaml").write_text(
        f"# {folder.kind}, written by `millrace import`: millrace train experiment=<this file> data.sources...\n{text}"
    )
