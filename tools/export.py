"""The `export` job: a run, or a pipeline, as a folder that diffusers opens (transformers, of a CLIP) or as one file in
the authors' layout."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from conf.errors import ConfigError
from conf.schema import build
from models.autoencoder import AutoencoderKL
from models.conditions import SemanticMap
from models.first_stage import FirstStage
from models.lora import DENOISER, save_adapters
from models.original.checkpoint import family_of, to_original
from models.original.configs import scaled_linear_betas
from models.pipeline_folder import (
    INDEX,
    TRANSFORMERS_STEM,
    ComponentTensors,
    PipelineFolder,
    is_network,
    stem_of,
    tokenizer_of,
)
from models.pretrained import DIFFUSERS_VERSION, STEM, ComponentFolder, Pretrained, save
from models.tensor_files import Meta, write_file, write_json, write_stem
from models.text import TextEncoder, published_name
from models.token_transformer import BertTextEncoder, TransformerEncoder
from models.vq import VQModel
from tools.importing import converted, rewrite
from trainer.checkpoint import load_weights
from trainer.engines.networks import prepare_frozen
from trainer.loading import (
    Loaded,
    average_of,
    config_of_checkpoint,
    find_checkpoint,
    load_adapter,
    load_model,
    load_text_adapters,
    merge_adapters,
)
from trainer.networks import adapter_base
from trainer.pipelines import autoencoder_of
from trainer.published import INDEX as ENTRIES
from trainer.published import TEXT_ENCODERS, beyond_diffusers, pipeline_of, scheduler_of


@dataclass
class Config:
    """conf/export.yaml, whose comments explain the keys."""

    source: str
    out: str
    average: str
    adapters: list[str]
    merge: bool
    dtype: Literal["float32", "bfloat16", "float16"]
    shard_bytes: PositiveInt


def run(config: Any) -> None:
    """Write the folder or the file, and say what of the source is not in it."""
    out = Path(config.out)
    single = out.suffix == ".safetensors"
    if out.exists() and (single or any(out.iterdir())):
        raise ConfigError(f"out={out}: this is there already; give another name, or remove it.")
    folder = out.with_name(out.name + ".unfinished")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        notes = _write_folder(config, folder)
        if single:
            notes += _write_single(folder, out)
        else:
            shutil.rmtree(out, ignore_errors=True)
            folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for note in notes:
        print(note)
    print(f"{out}: {PipelineFolder(out).kind if (out / INDEX).exists() else 'weights of ' + config.source}")


def _write_folder(config: Any, folder: Path) -> list[str]:
    source = Path(config.source)
    if (source / INDEX).is_file():
        if not config.adapters:
            return _write_pipeline(PipelineFolder(source), folder, config)
    elif not config.merge:
        path = find_checkpoint(source)
        trained = config_of_checkpoint(path)
        if trained.get("adapter"):
            return _write_adapters(path, trained, folder, config)
        if "autoencoder" in (trained.get("networks") or {}):
            return _write_autoencoder(source, folder, config)
        if "clip" in (trained.get("networks") or {}):
            return _write_clip(path, trained, folder, config)
    loaded = load_model(source, config.average, exact=True)
    for one in config.adapters:
        merge_adapters(one, loaded)
    return _write_model(loaded, folder, config)


def _write_adapters(path: Path, trained: Any, folder: Path, config: Any) -> list[str]:
    """What a run has trained beside weights that stay."""
    if config.adapters:
        raise ConfigError("adapters: this run's own are exported alone; set merge=true to put all into the weights.")
    average, base = average_of(path, config.average), adapter_base(trained)
    adapters = {DENOISER: load_adapter(path, trained, average)}
    for number, adapter in load_text_adapters(path, trained, average).items():
        own = trained.conditioner.encoders[number].get("subfolder")
        adapters[own or f"text_encoder{f'_{number + 1}' if number else ''}"] = adapter
    component = "transformer" if "Transformer" in ComponentFolder(base).config["_class_name"] else "unet"
    save_adapters(adapters, folder, component, base)
    return [f"Adapters for {base}, whose weights are not in it (merge=true: with them)."]


def _write_autoencoder(run: Path, folder: Path, config: Any) -> list[str]:
    """The component that a run of an autoencoder has left, whose weights are of the average that it chose."""
    if config.adapters or config.average != "auto":
        key = "adapters" if config.adapters else "average"
        raise ConfigError(f"{key}: a run of an autoencoder has left one component, which is exported; leave this out.")
    own = next(
        (run / c.component for c in (AutoencoderKL, VQModel) if (run / c.component / "config.json").is_file()), None
    )
    if own is None:
        raise ConfigError(f"source: {run} has no autoencoder yet: it is written at a run's last step. Give its folder.")
    shutil.copyfile(own / "config.json", folder / "config.json")
    rewrite(ComponentTensors(own), folder, STEM, config.dtype, config.shard_bytes)
    return []


def _write_clip(path: Path, trained: Any, folder: Path, config: Any) -> list[str]:
    """A checkpoint's CLIP, as transformers opens it."""
    if config.adapters:
        raise ConfigError("adapters: a CLIP takes none; leave them out.")
    with torch.device("meta"):
        network = build(trained.networks.clip)
    weights = load_weights(path, "clip", ema=average_of(path, config.average))
    save(network, folder, weights, getattr(torch, config.dtype), config.shard_bytes)
    return []


def _write_pipeline(pipeline: PipelineFolder, folder: Path, config: Any) -> list[str]:
    """A pipeline once more, in the wanted type: its components are copied, weights a tensor at a time."""
    for name in pipeline.components:
        networks = is_network(name)
        unread = shutil.ignore_patterns("*.safetensors*", "*.bin", "*.msgpack") if networks else None
        shutil.copytree(pipeline.path / name, folder / name, ignore=unread)
        if networks:
            rewrite(pipeline.tensors(name), folder / name, stem_of(name), config.dtype, config.shard_bytes)
    write_json(folder / INDEX, pipeline.index)
    return []


def _write_model(loaded: Loaded, folder: Path, config: Any) -> list[str]:
    """Networks of a run: a pipeline, or components alone where diffusers has no pipeline of them."""
    denoiser: Any = loaded.networks["denoiser"]
    conditioner: Any = loaded.networks["conditioner"]
    autoencoder = _autoencoder(loaded)
    kind, reason = pipeline_of(denoiser, conditioner)
    scheduler: dict[str, Any] = {}
    if kind is not None and autoencoder is None:
        kind, reason = None, f"diffusers has no class for {type(loaded.networks['first_stage']).__name__}"
    if kind is not None:
        try:
            scheduler = scheduler_of(loaded.config["process"], kind)
        except ValueError as error:
            kind, reason = None, str(error)
    if not isinstance(denoiser, Pretrained):
        raise ConfigError(f"source: diffusers has no class for {type(denoiser).__name__}; there is nothing to export.")

    part = "transformer" if "Transformer" in denoiser.diffusers_class else "unet"
    before = _came_from(loaded.config)
    if denoiser.config.get("sample_size") is None:
        first_stage: Any = loaded.networks["first_stage"]
        denoiser.config["sample_size"] = loaded.size[0] // first_stage.downsampling
    if before is not None and before.components.get(part) == denoiser.diffusers_class:
        denoiser.config = {**before.config(part), **denoiser.config}
    _save(denoiser, folder / part, config)
    first = "vqvae" if kind is not None and kind.startswith("LDM") else "vae"
    if autoencoder is not None:
        _save(autoencoder, folder / first, config)
    notes = beyond_diffusers(kind, denoiser.config)
    if kind is None:
        return [f"Not a pipeline, but components alone, without text encoders and scheduler: {reason}.", *notes]

    index: dict[str, Any] = {"_class_name": kind, "_diffusers_version": DIFFUSERS_VERSION, **ENTRIES.get(kind, {})}
    if "XL" in kind:
        index["force_zeros_for_empty_prompt"] = conditioner.dropped == "zeros"
    index[part] = ["diffusers", denoiser.diffusers_class]
    index[first] = ["diffusers", autoencoder.diffusers_class]
    making = [*conditioner.numbered(), *(one for one in conditioner.map_list() if one.learned)]
    for name, encoder in zip(TEXT_ENCODERS[kind], making, strict=True):
        if encoder.learned:
            index |= _save_learned(encoder, folder, name, config)
            continue
        tokenizer = tokenizer_of(name)
        assert tokenizer is not None
        index[name] = index[tokenizer] = [None, None]
        if isinstance(encoder, TextEncoder):
            index[name], index[tokenizer] = _save_text(encoder, folder, name, tokenizer, config)
    if before is not None and before.kind == kind and _samples_the_same(before.config("scheduler"), scheduler):
        scheduler = before.config("scheduler")
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    write_json(folder / INDEX, index)
    return notes


def _autoencoder(loaded: Loaded) -> Any:
    """The first stage's network with its weights; None where diffusers has no class for it."""
    first_stage: Any = loaded.networks["first_stage"]
    if not isinstance(getattr(first_stage, "autoencoder", None), nn.Module):
        return None
    assert isinstance(first_stage, FirstStage)
    prepare_frozen("first_stage", first_stage, False, "fp32", loaded.seed, torch.device("cpu"))
    return first_stage.autoencoder


def _came_from(config: dict[str, Any]) -> PipelineFolder | None:
    """The pipeline that a run's weights began as, if it is still there: its configs may have keys that we lack."""
    source = config.get("init_from")
    path = source.get("path") if isinstance(source, dict) else source
    adapted = (config.get("adapter") or {}).get("base")
    path = adapted or path
    return PipelineFolder(path) if path and (Path(path) / INDEX).is_file() else None


def _samples_the_same(theirs: dict[str, Any], ours: dict[str, Any]) -> bool:
    keys = ("beta_schedule", "beta_start", "beta_end", "prediction_type", "num_train_timesteps", "shift")
    rescaled = "rescale_betas_zero_snr"  # which older files do not tell
    same = bool(theirs.get(rescaled)) == bool(ours.get(rescaled))
    return same and all(theirs.get(key) == ours[key] for key in keys if key in ours)


def _save(network: Any, folder: Path, config: Any) -> None:
    save(network, folder, dtype=getattr(torch, config.dtype), shard_bytes=config.shard_bytes)


def _save_text(
    encoder: TextEncoder, folder: Path, name: str, tokenizer: str, config: Any
) -> tuple[list[str | None], list[str | None]]:
    """A text encoder and its tokenizer; returns their classes, for model_index.json."""
    model: Any = encoder.model
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder / name)
    state = {published_name(key): tensor for key, tensor in model.state_dict().items()}
    state.pop("encoder.embed_tokens.weight", None)  # T5's second name for its embeddings

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield from state.items()

    layout = {key: converted(Meta(t.dtype, tuple(t.shape)), config.dtype) for key, t in state.items()}
    write_stem(folder / name, TRANSFORMERS_STEM, layout, tensors(), config.shard_bytes)
    encoder.tokenizer.save_pretrained(folder / tokenizer)
    return ["transformers", type(model).__name__], ["transformers", type(encoder.tokenizer).__name__]


def _save_learned(encoder: Any, folder: Path, name: str, config: Any) -> dict[str, Any]:
    """What makes conditions of latent diffusion and was trained with the denoiser, and its tokenizer; returns their
    entries of model_index.json."""
    state = dict(encoder.named_parameters())
    layout = {key: converted(Meta(t.dtype, tuple(t.shape)), config.dtype) for key, t in state.items()}
    write_stem(folder / name, stem_of(name), layout, state.items(), config.shard_bytes)
    if not isinstance(encoder, TransformerEncoder):
        if isinstance(encoder, SemanticMap):
            told = {"_class_name": "MapEmbedder", "classes": encoder.classes, "channels": encoder.channels}
        else:
            told = {"_class_name": "ClassEmbedder", "classes": encoder.nothing, "width": encoder.width}
        write_json(folder / name / "config.json", told)
        return {name: ["millrace", told["_class_name"]]}
    write_json(folder / name / "config.json", encoder.ldm_bert_config())
    index: dict[str, Any] = {name: ["latent_diffusion", "LDMBertModel"]}
    if isinstance(encoder, BertTextEncoder):
        encoder.tokenizer.save_pretrained(folder / "tokenizer")
        index["tokenizer"] = ["transformers", type(encoder.tokenizer).__name__]
    return index


def _write_single(folder: Path, out: Path) -> list[str]:
    """The folder's networks as one file in the authors' layout."""
    if not (folder / INDEX).is_file():
        raise ConfigError(f"out={out}: the authors' layout holds a whole pipeline, which this is not; give a folder.")
    pipeline = PipelineFolder(folder)
    kind = family_of(pipeline)
    parts = [name for name in pipeline.components if is_network(name)]
    layout, tensors, left_out = to_original(
        kind, {name: pipeline.tensors(name) for name in parts}, {name: pipeline.config(name) for name in parts}
    )
    numbers = _numbers(pipeline) if kind.startswith("ldm") else {}
    layout |= {name: Meta(tensor.dtype, tuple(tensor.shape)) for name, tensor in numbers.items()}
    write_file(out, layout, chain(tensors, numbers.items()))
    notes = [f"Tokenizers{'' if numbers else ' and scheduler'} have no place in one file."]
    return notes + ([f"Neither have {len(left_out)} tensors, such as {left_out[0]}."] if left_out else [])


def _numbers(pipeline: PipelineFolder) -> dict[str, Tensor]:
    """What a file of latent diffusion holds beside its networks: the noise schedule, and what scales the latents."""
    scheduler = pipeline.config("scheduler")
    if scheduler.get("beta_schedule") != "scaled_linear":
        raise ConfigError("out: a single file tells latent diffusion's own noise schedule alone; export a folder.")
    betas = scaled_linear_betas(scheduler)
    return {"betas": betas, "scale_factor": torch.tensor(autoencoder_of(pipeline).config["scaling_factor"])}
