"""Networks ready to sample from: of one of our runs, or of a diffusers pipeline."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from conf.schema import build
from data.fields import Field
from models.autoencoder import AutoencoderKL
from models.first_stage import FirstStage, KLFirstStage, VQFirstStage
from models.lora import DENOISER, Adapter, load_adapters
from models.pipeline_folder import INDEX, PipelineFolder
from models.pretrained import ComponentFolder, load
from models.process import Process
from models.text_lora import text_adapters
from models.vq import VQModel
from trainer.checkpoint import CheckpointError, CheckpointPolicy, load_weights, read_record
from trainer.checkpoint.format import is_committed
from trainer.networks import adapted, adapter_base, adapts_text, conditioner_learns
from trainer.pipelines import autoencoder_of, config_of, denoiser_of, fields_of
from trainer.published import TEXT_ENCODERS, pipeline_of

# Latents' side where a network does not tell the size that it was trained at.
_SIDE = 64
_PIXELS = 256


@dataclass(frozen=True)
class Loaded:
    """What to sample from.

    Args:
        networks: "denoiser", "conditioner" and "first_stage", on the CPU in float32. The first stage may still be on
            the meta device, for `prepare_frozen` to fill.
        process: that the denoiser was trained with.
        config: "model", "first_stage", "conditioner", "process", "sampler" and "guidance" as a run's config describes
            them; a pipeline's sampler is that of its scheduler.
        size: (height, width) in pixels that it was trained at (the first bucket).
        source: where it came from, for pictures' metadata.
        seed: of the run, from which a first stage without weights of its own is drawn again.
        fields: what samples that it was trained on come with, by name.
    """

    networks: dict[str, nn.Module]
    process: Process
    config: dict[str, Any]
    size: tuple[int, int]
    source: str
    seed: int = 0
    fields: Mapping[str, Field] = field(default_factory=dict)


@dataclass(frozen=True)
class LoadedFirstStage:
    """A first stage to reconstruct with.

    Args:
        first_stage: on the CPU in float32, or still on the meta device, for `prepare_frozen` to fill.
        config: of the run; empty of what is no run of ours.
        size: (height, width) in pixels that it was trained at, as far as that is told.
        source, seed: see `Loaded`.
    """

    first_stage: FirstStage
    config: dict[str, Any]
    size: tuple[int, int]
    source: str
    seed: int = 0

    @property
    def networks(self) -> dict[str, nn.Module]:
        """As those of `Loaded`."""
        return {"first_stage": self.first_stage}


def load_model(path: str | Path, ema: str = "auto", exact: bool = False) -> Loaded:
    """Load a run's folder (its newest whole checkpoint), one of its checkpoints, or a diffusers pipeline's folder.

    Args:
        ema: an average's name, "none" for the weights themselves, or "auto": the run's first average if it keeps one.
        exact: load a run's encoders in float32, whatever type it computes them in.

    Raises:
        ValueError: there is nothing of the kind at the path.
        CheckpointError: the checkpoint is damaged, or is not of the model that its config describes.
    """
    path = Path(path)
    return _load_pipeline(path) if (path / INDEX).is_file() else _load_checkpoint(find_checkpoint(path), ema, exact)


def load_first_stage(path: str | Path) -> LoadedFirstStage:
    """The first stage of a run or one of its checkpoints, or the autoencoder that a run has trained, of a diffusers
    pipeline, or of a component's own folder.

    Raises:
        ValueError: there is nothing of the kind at the path.
    """
    path = Path(path)
    inside = [path / kind.component for kind in (AutoencoderKL, VQModel)]
    component = next((folder for folder in [path, *inside] if (folder / "config.json").is_file()), None)
    if component is not None:
        autoencoder = load(component)
        if not isinstance(autoencoder, AutoencoderKL | VQModel):
            raise ValueError(f"{component} holds a {type(autoencoder).__name__}, and no autoencoder")
        side = ComponentFolder(component).config.get("sample_size") or _PIXELS
        first_stage = VQFirstStage(autoencoder) if isinstance(autoencoder, VQModel) else KLFirstStage(autoencoder)
        return LoadedFirstStage(first_stage, {}, (side, side), str(component))
    checkpoint = find_checkpoint(path)
    config = config_of_checkpoint(checkpoint)
    if "first_stage" not in config:
        raise ValueError(f"{checkpoint} is of a run without a first stage")
    with torch.device("meta"):
        first_stage = build(config.first_stage)
    buckets = build(config.buckets)
    return LoadedFirstStage(
        first_stage,
        OmegaConf.to_container(config),  # type: ignore[arg-type]
        (buckets[0].height, buckets[0].width),
        f"{checkpoint}, first stage",
        config.seed,
    )


def find_checkpoint(path: Path) -> Path:
    """The newest whole checkpoint of a run's folder, or the one that the path is.

    Raises:
        ValueError: there is none.
    """
    if is_committed(path):
        return path
    if (path / "checkpoints").is_dir():
        found = CheckpointPolicy().build(path / "checkpoints").latest()
        if found.path is None:
            raise ValueError(f"{path} has no whole checkpoint" + "".join(f"; {reason}" for reason in found.refused))
        return found.path
    raise ValueError(
        f"{path} is neither a run (checkpoints/), a checkpoint (committed.json) nor a diffusers pipeline ({INDEX})"
    )


def config_of_checkpoint(path: Path) -> Any:
    """The run's config, as a checkpoint keeps it, with paths as they are now."""
    return OmegaConf.create(_moved(read_record(path).config, path.parent.parent))


def average_of(path: Path, ema: str) -> str | None:
    """The average of a checkpoint that `load_model`'s argument names; None: the weights themselves."""
    lengths = list(read_record(path).ema.get("lengths", {}))
    return (lengths[0] if lengths else None) if ema == "auto" else None if ema == "none" else ema


def _load_checkpoint(path: Path, ema: str, exact: bool) -> Loaded:
    config, length = config_of_checkpoint(path), average_of(path, ema)
    for encoder in config.conditioner.get("encoders", []) if exact else []:
        if "dtype" in encoder:
            encoder.dtype = "float32"
    with torch.device("meta"):
        first_stage = build(config.first_stage)
    if conditioner_learns(config.conditioner):
        conditioner: Any = _trained(path, "conditioner", config.conditioner, length)
    else:
        conditioner = build(config.conditioner)
    for number, adapter in load_text_adapters(path, config, length).items():
        adapter.merge_into_text(conditioner.numbered()[number].model)
    buckets = build(config.buckets)
    first = next(iter(config.data.sources.values()))  # all sources have the same kinds of fields
    fields = {**(config.data.get("fields") or {}), **(first.get("fields") or {})}
    return Loaded(
        networks={
            "denoiser": _denoiser(path, config, length),
            "conditioner": conditioner,
            "first_stage": first_stage,
        },
        process=build(config.process),
        config=OmegaConf.to_container(config),  # type: ignore[arg-type]
        size=(buckets[0].height, buckets[0].width),
        source=f"{path}, {f'EMA {length}' if length else 'weights'}",
        seed=config.seed,
        fields={name: build(node) for name, node in fields.items()},
    )


def _denoiser(path: Path, config: Any, length: str | None) -> nn.Module:
    """A checkpoint's denoiser; of one that holds adapters, the weights that they are for with them."""
    if not config.get("adapter"):
        return _trained(path, "denoiser", config.model, length)
    with torch.device("meta"):
        network: Any = build(config.model)
    network.to_empty(device="cpu")
    ComponentFolder(adapter_base(config)).fill(network)
    load_adapter(path, config, length).merge_into(network)
    return network


def load_adapter(path: Path, config: Any, length: str | None) -> Adapter:
    """The adapters of a checkpoint.

    Raises:
        CheckpointError: the checkpoint is damaged, or has others than its config describes.
    """
    with torch.device("meta"):
        network = adapted(build(config.model), config)
    weights = load_weights(path, "denoiser", ema=length)
    _check_shapes(path, "denoiser", network, weights)
    return Adapter.of(network, weights)


def load_text_adapters(path: Path, config: Any, length: str | None) -> dict[int, Adapter]:
    """The adapters of text encoders in a checkpoint, by the number of the encoder; none where the run has none.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    if not adapts_text(config):
        return {}
    return text_adapters(load_weights(path, "conditioner", ema=length), build(config.adapter).alpha)


def merge_adapters(folder: str | Path, loaded: Loaded, scale: float = 1.0) -> None:
    """Add adapters of a folder or file to the weights of a denoiser, and of text encoders where it holds any of them.

    Raises:
        ValueError: they are for another model.
    """
    denoiser, conditioner = loaded.networks["denoiser"], loaded.networks["conditioner"]
    for component, adapter in load_adapters(folder).items():
        if component == DENOISER:
            adapter.merge_into(denoiser, scale)
            continue
        names = TEXT_ENCODERS.get(pipeline_of(denoiser, conditioner)[0] or "", ())
        if component not in names:
            raise ValueError(f"{folder} adapts {component}, which {loaded.source} has not")
        encoder: Any = conditioner.numbered()[names.index(component)]  # type: ignore[operator]
        adapter.merge_into_text(encoder.model, scale)


def _trained(path: Path, name: str, node: Any, length: str | None) -> nn.Module:
    """A network of a checkpoint, which its config describes, with its weights or their average.

    Raises:
        CheckpointError: the checkpoint is damaged, or has another network.
    """
    with torch.device("meta"):
        network: Any = build(node)
    network.to_empty(device="cpu")
    network.init_buffers()
    weights = load_weights(path, name, ema=length)
    _check_shapes(path, name, network, weights)
    network.load_state_dict(weights, strict=False)  # buffers are not saved
    return network


def _check_shapes(path: Path, name: str, network: nn.Module, weights: dict[str, Tensor]) -> None:
    wanted = {inner: tuple(parameter.shape) for inner, parameter in network.named_parameters()}
    found = {inner: tuple(tensor.shape) for inner, tensor in weights.items()}
    if wrong := sorted(inner for inner in wanted | found if wanted.get(inner) != found.get(inner)):
        raise CheckpointError(
            f"{path} does not fit the {name} of its own config: {len(wrong)} parameters differ, the first is"
            f" {wrong[0]}, of shape {found.get(wrong[0])} in the checkpoint and {wanted.get(wrong[0])} in the {name}"
        )


def _moved(config: dict[str, Any], run: Path) -> dict[str, Any]:
    """The config with paths inside the run's folder as they are now: a run may be moved, or used from elsewhere."""
    then = f"{config['runs']}/{config['name']}/"

    def move(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: move(item) for key, item in value.items()}
        if isinstance(value, list):
            return [move(item) for item in value]
        return str(run / value.removeprefix(then)) if isinstance(value, str) and value.startswith(then) else value

    return move(config)


def _load_pipeline(path: Path) -> Loaded:
    """A pipeline that Stable Diffusion 1, 2, XL, its refiner or 3, or latent diffusion is published as."""
    folder = PipelineFolder(path)
    config = config_of(folder)
    denoiser, autoencoder = denoiser_of(folder).load(), autoencoder_of(folder).load()
    first_stage = VQFirstStage(autoencoder) if isinstance(autoencoder, VQModel) else KLFirstStage(autoencoder)
    side = (denoiser.config.get("sample_size") or _SIDE) * first_stage.downsampling
    return Loaded(
        networks={
            "denoiser": denoiser,
            "conditioner": _from_folders(config["conditioner"]),
            "first_stage": first_stage,
        },
        process=build(config["process"]),
        config=config,
        size=(side, side),
        source=str(path),
        fields={name: build(node) for name, node in fields_of(folder).items()},
    )


def _from_folders(node: dict[str, Any]) -> Any:
    """A pipeline's conditioner. One that learns with the denoiser is filled here, from folders that it names."""
    if not conditioner_learns(node):
        return build(node)
    with torch.device("meta"):
        conditioner = build(node)
    conditioner.to_empty(device="cpu")
    for name, parameter in conditioner.named_parameters():
        conditioner.init_parameter(name, parameter, torch.Generator())
    conditioner.init_buffers()
    return conditioner
