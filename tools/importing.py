"""The `import` job: published weights as a run's folder, in diffusers' layout, to sample from and to train on."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import PositiveFloat, PositiveInt

from conf.errors import ConfigError
from data.run_directory import check_name
from models.original.checkpoint import OriginalCheckpoint, family_of
from models.pipeline_folder import INDEX, PipelineFolder, stem_of
from models.pretrained import DIFFUSERS_VERSION, ComponentFolder
from models.tensor_files import Meta, TensorSource, open_file, write_json, write_stem
from trainer.pipelines import EDITING, config_of, denoiser_of

# Tokenizers of the published models, for files, which hold none.
_TOKENIZERS = {
    "tokenizer": ("openai/clip-vit-large-patch14", "CLIPTokenizer"),
    "tokenizer_2": ("laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", "CLIPTokenizer"),
    "tokenizer_3": ("google/t5-v1_1-xxl", "T5Tokenizer"),
}


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
            for key in ("like", "prediction", "scaling_factor"):
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
    for name in folder.components:
        _copy(folder.path / name, target / name)
        if config.dtype is not None and is_network(name):
            rewrite(folder.tensors(name), target / name, stem_of(name), config.dtype, config.shard_bytes)
    write_json(target / INDEX, folder.index)
    return []


def _check(folder: PipelineFolder) -> None:
    """Whether a pipeline is known, and holds all weights of its networks.

    Raises:
        ValueError: it is not, or does not.
    """
    config_of(folder)
    for component in (denoiser_of(folder), ComponentFolder(folder.path / "vae")):
        component.check(component.on_meta())


def _copy(source: Path, target: Path) -> None:
    """A component's folder, without weights in pickle; files are shared where the file system lets them be, as nothing
    writes into files of weights."""
    target.mkdir()
    for file in source.iterdir():
        if file.suffix in (".bin", ".msgpack", ".h5", ".onnx") or file.is_dir():
            continue
        try:
            os.link(file.resolve(), target / file.name)
        except OSError:
            shutil.copyfile(file, target / file.name)


def is_network(component: str) -> bool:
    """Whether a component of the pipelines that are known holds weights that count."""
    return component in ("unet", "transformer", "vae") or component.startswith("text_encoder")


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
    if config.scaling_factor is not None:
        raise ConfigError(f"scaling_factor: {source} is of a family that has one; leave it out.")
    kind = _kind(family.pipeline, checkpoint.components.get("unet", {}))
    if like is not None and like.kind not in (kind, family.pipeline):
        raise ConfigError(f"like: {like.path} is a {like.kind}, but {source} holds a {kind}.")
    if checkpoint.kind == "sd2" and config.prediction is None and like is None:
        raise ConfigError(
            f"prediction: {source} does not tell what it predicts; give prediction=epsilon (Stable Diffusion 2 base,"
            " 512 px) or prediction=v_prediction (768 px)."
        )
    index: dict[str, Any] = {"_class_name": kind, "_diffusers_version": DIFFUSERS_VERSION, **family.index}
    notes = []
    for name, settings in checkpoint.components.items():
        _write_component(checkpoint, name, settings, target, config)
        text = name.startswith("text_encoder")
        index[name] = ["transformers", settings["architectures"][0]] if text else ["diffusers", settings["_class_name"]]
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
    for name in [n.replace("text_encoder", "tokenizer") for n in family.components if n.startswith("text_encoder")]:
        index[name] = _tokenizer(name, target, like, index)
    scheduler = dict(like.config("scheduler") if like is not None else family.scheduler)
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
    for key in ("like", "prediction"):
        if config[key] is not None:
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


def _kind(pipeline: str, unet: Mapping[str, Any]) -> str:
    """The pipeline of a UNet in the place of the family's own: what lies beside its latent tells them apart."""
    beside = unet.get("in_channels", 0) - unet.get("out_channels", 0)
    if beside <= 0 or "Img2Img" in pipeline:
        return pipeline
    return pipeline.replace("Pipeline", "InpaintPipeline") if beside == unet["out_channels"] + 1 else EDITING


def _tokenizer(name: str, target: Path, like: PipelineFolder | None, index: Mapping[str, Any]) -> list[str | None]:
    if index.get(name.replace("tokenizer", "text_encoder")) == [None, None]:
        return [None, None]
    if like is not None:
        _copy(like.path / name, target / name)
        return like.index[name]
    from transformers import AutoTokenizer

    published, kind = _TOKENIZERS[name]
    try:
        AutoTokenizer.from_pretrained(published).save_pretrained(target / name)
    except OSError as error:
        raise ConfigError(
            f"like: a single file holds no tokenizer, and {published} cannot be reached; give like=<a folder of such a"
            " pipeline>."
        ) from error
    return ["transformers", kind]


def _write_experiment(target: Path) -> None:
    """What `experiment=<file>` sets: networks as they are in the folder, where their weights come from, and fields that
    they read."""
    folder = PipelineFolder(target.resolve())
    config: dict[str, Any] = dict(config_of(folder))
    config["init_from"] = {"path": str(folder.path), "networks": {"denoiser": folder.denoiser}}
    for one in config["conditioner"].get("maps", []):
        masked = one["_target_"].endswith(".MaskedPicture")
        field = {"_target_": "data.fields.DrawnMask"}
        if not masked:  # its text and its picture are left out now and then, as that model was trained
            field = {"_target_": "data.fields.Picture", "member": f"{one['field']}.jpg"}
            config["objective"] = {"caption_dropout": [0.1] * (len(config["conditioner"]["encoders"]) + 1)}
        config["data"] = {"fields": {one["field"]: field}}
    text = yaml.safe_dump(config, sort_keys=False)
    (target / "experiment.yaml").write_text(
        f"# {folder.kind}, written by `millrace import`: millrace train experiment=<this file> data.sources...\n{text}"
    )
