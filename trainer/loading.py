"""Networks ready to sample from: of one of our runs, or of a diffusers pipeline."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from conf.schema import build
from models.conditioner import AbsentEncoder, Conditioner, Encoder
from models.densities import Uniform
from models.first_stage import KLFirstStage
from models.parameterizations import Velocity
from models.pretrained import load
from models.process import Process
from models.schedules import RectifiedFlow
from models.text import ClipEncoder, T5Encoder
from models.weighting import Unweighted
from trainer.checkpoint import CheckpointError, CheckpointPolicy, load_weights, read_record
from trainer.checkpoint.format import is_committed
from trainer.networks import conditioner_learns


@dataclass(frozen=True)
class Loaded:
    """What to sample from.

    Args:
        networks: "denoiser", "conditioner" and "first_stage", on the CPU in float32. The first stage may still be on
            the meta device, for `prepare_frozen` to fill.
        process: that the denoiser was trained with.
        size: (height, width) in pixels that it was trained at (the first bucket).
        source: where it came from, for pictures' metadata.
        seed: of the run, from which a first stage without weights of its own is drawn again.
    """

    networks: dict[str, nn.Module]
    process: Process
    size: tuple[int, int]
    source: str
    seed: int = 0


def load_model(path: str | Path, ema: str = "auto") -> Loaded:
    """Load a run's folder (its newest whole checkpoint), one of its checkpoints, or a diffusers pipeline's folder.

    Args:
        ema: an average's name, "none" for the weights themselves, or "auto": the run's first average if it keeps one.

    Raises:
        ValueError: there is nothing of the kind at the path.
        CheckpointError: the checkpoint is damaged, or is not of the model that its config describes.
    """
    path = Path(path)
    if (path / "model_index.json").is_file():
        return _load_pipeline(path)
    if is_committed(path):
        return _load_checkpoint(path, ema)
    if (path / "checkpoints").is_dir():
        found = CheckpointPolicy().build(path / "checkpoints").latest()
        if found.path is None:
            raise ValueError(f"{path} has no whole checkpoint" + "".join(f"; {reason}" for reason in found.refused))
        return _load_checkpoint(found.path, ema)
    raise ValueError(
        f"{path} is neither a run (checkpoints/), a checkpoint (committed.json) nor a diffusers pipeline"
        " (model_index.json)"
    )


def _load_checkpoint(path: Path, ema: str) -> Loaded:
    record = read_record(path)
    run = path.parent.parent
    config: Any = OmegaConf.create(_moved(record.config, run))
    lengths = list(record.ema.get("lengths", {}))
    length = (lengths[0] if lengths else None) if ema == "auto" else None if ema == "none" else ema
    with torch.device("meta"):
        first_stage = build(config.first_stage)
    if conditioner_learns(config.conditioner):
        conditioner = _trained(path, "conditioner", config.conditioner, length)
    else:
        conditioner = build(config.conditioner)
    buckets = build(config.buckets)
    return Loaded(
        networks={
            "denoiser": _trained(path, "denoiser", config.model, length),
            "conditioner": conditioner,
            "first_stage": first_stage,
        },
        process=build(config.process),
        size=(buckets[0].height, buckets[0].width),
        source=f"{path}, {f'EMA {length}' if length else 'weights'}",
        seed=config.seed,
    )


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
    wanted = {inner: tuple(parameter.shape) for inner, parameter in network.named_parameters()}
    found = {inner: tuple(tensor.shape) for inner, tensor in weights.items()}
    if wrong := sorted(inner for inner in wanted | found if wanted.get(inner) != found.get(inner)):
        raise CheckpointError(
            f"{path} does not fit the {name} of its own config: {len(wrong)} parameters differ, the first is"
            f" {wrong[0]}, of shape {found.get(wrong[0])} in the checkpoint and {wanted.get(wrong[0])} in the {name}"
        )
    network.load_state_dict(weights, strict=False)  # buffers are not saved
    return network


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
    """A Stable Diffusion 3 or 3.5 pipeline: two CLIP encoders, T5 (which may be left out), MMDiT, autoencoder."""
    index = json.loads((path / "model_index.json").read_text())
    if index.get("_class_name") != "StableDiffusion3Pipeline":
        raise ValueError(f"{path} is a {index.get('_class_name')}; StableDiffusion3Pipeline can be sampled from")
    denoiser, autoencoder = load(path / "transformer"), load(path / "vae")
    encoders: list[Encoder] = []
    for number in ("", "_2"):
        tokenizer = json.loads((path / f"tokenizer{number}" / "tokenizer_config.json").read_text())
        length = tokenizer.get("model_max_length", 77)
        encoders.append(
            ClipEncoder(str(path), f"text_encoder{number}", tokenizer_subfolder=f"tokenizer{number}", length=length)
        )
    width: int = denoiser.config["joint_attention_dim"]
    if index.get("text_encoder_3", [None])[0] is None:
        encoders.append(AbsentEncoder(encoders[0].length, width))
    else:
        encoders.append(T5Encoder(str(path), "text_encoder_3", tokenizer_subfolder="tokenizer_3"))
    scheduler = json.loads((path / "scheduler" / "scheduler_config.json").read_text())
    process = Process(RectifiedFlow(), Velocity(), Uniform(), Unweighted(), shift=scheduler.get("shift", 1.0))
    first_stage = KLFirstStage(autoencoder)  # type: ignore[arg-type]
    side = denoiser.config["sample_size"] * first_stage.downsampling
    return Loaded(
        # These pipelines sample with the encoding of "" as the unconditional one.
        networks={
            "denoiser": denoiser,
            "conditioner": Conditioner(encoders, context_dim=width, dropped="empty"),
            "first_stage": first_stage,
        },
        process=process,
        size=(side, side),
        source=str(path),
    )
