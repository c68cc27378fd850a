"""What a run's frozen encoders make of its data, kept by `millrace encode` and read by `train`: whether it fits."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from conf.errors import ConfigError
from conf.schema import build
from data.buckets import Buckets
from data.encoded import (
    Encoding,
    LatentSettings,
    TextEncoderSettings,
    TextSettings,
    check_encoded,
    read_nulls,
    read_stored,
)
from data.selection import Selection
from data.tars import Source, TarData
from models.conditioner import Conditioner
from models.first_stage import KLFirstStage
from trainer.distributed import World


def use_encodings(config: Any, data: TarData, networks: dict[str, nn.Module], world: World) -> dict[str, nn.Module]:
    """Let the data read `data.encoded`, if it is what the run's own encoders would give. Collective.

    Args:
        networks: of the run, before an engine takes them.

    Returns:
        Networks to take instead: a conditioner without its encoders, where the run neither encodes nor draws prompts.

    Raises:
        ValueError: an encoding is missing, or differs; names what.
    """
    found: list[Any] = [None]
    if world.is_main:
        try:
            found = [_checked(config, data, networks, world.device)]
        except (ValueError, OSError) as error:  # for all ranks to raise: none is left waiting
            found = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    if isinstance(found[0], Exception):
        raise found[0]
    data.encodings = found[0]
    conditioner = networks.get("conditioner")
    if data.encoding is None or data.encoding.text is None or config.samples.every is not None:
        return {}
    assert isinstance(conditioner, Conditioner) and data.encoded is not None
    first = data.manifests(next(iter(data.sources)))[0]
    return {"conditioner": conditioner.without_weights(read_nulls(first.url, data.encoded, data.store))}


def _checked(config: Any, data: TarData, networks: dict[str, nn.Module], device: torch.device) -> dict[str, Encoding]:
    """The encoding of each source."""
    assert data.encoded is not None
    selections = {name: data.select(name, None) for name in data.sources}
    parts = _parts_there(data, selections)
    latents = latent_settings(config, data, networks["first_stage"], device) if "latents" in parts else None
    encoders = encoder_settings(networks["conditioner"]) if "text" in parts else None
    precision = config.engine.precision
    return {
        name: check_encoded(
            data.manifests(name),
            rows_of(selections[name]),
            data.encoded,
            encoding_of(source, "bfloat16", precision, latents, encoders),
            data.store,
        )
        for name, source in data.sources.items()
    }


def _parts_there(data: TarData, selections: dict[str, Selection]) -> set[str]:
    """Which of latents and texts the first shard that has any sample holds: others are held against these."""
    for name, selection in selections.items():
        for manifest, rows in zip(data.manifests(name), rows_of(selection), strict=True):
            stored = read_stored(manifest, data.encoded or "", data.store) if len(rows) else None
            if stored is not None:
                there = {"latents": stored.encoding.latents, "text": stored.encoding.text}
                return {part for part, settings in there.items() if settings is not None}
    return set()


def rows_of(selection: Selection) -> list[np.ndarray]:
    """The manifest rows that are selected of each shard."""
    offsets = selection.shard_offsets
    return [selection.row[offsets[i] : offsets[i + 1]] for i in range(len(selection.shards))]


def latent_settings(config: Any, data: TarData, first_stage: nn.Module, device: torch.device) -> LatentSettings:
    """What the run's latents are made of; its sources' backgrounds are to be filled in.

    Raises:
        ConfigError: the first stage has no latents to keep.
    """
    first_stage = with_moments(first_stage)
    buckets: Buckets = build(config.buckets)
    return LatentSettings(
        encoder=first_stage.fingerprint(config.seed, device),
        channels=2 * first_stage.channels,
        downsampling=first_stage.downsampling,
        buckets=[str(bucket) for bucket in buckets.shapes],
        crop=data.crop,
        flip=data.flip,
        background=[],
    )


def with_moments(first_stage: nn.Module) -> KLFirstStage:
    """The first stage, if it has latents that can be kept.

    Raises:
        ConfigError: it has none.
    """
    if not isinstance(first_stage, KLFirstStage):
        kind = type(first_stage).__name__
        raise ConfigError(f"first_stage: {kind} has no latents to keep; take another, or set encode.latents=false.")
    return first_stage


def encoder_settings(conditioner: nn.Module) -> list[TextEncoderSettings]:
    """The text encoders of which there is something to keep."""
    assert isinstance(conditioner, Conditioner)
    encoders: dict[int, Any] = dict(enumerate(conditioner.encoder_modules))
    return [
        TextEncoderSettings(
            number=i,
            fingerprint=encoders[i].fingerprint(),
            length=encoders[i].length,
            width=encoders[i].width,
            pooled_width=encoders[i].pooled_width,
        )
        for i in conditioner.stored
    ]


def encoding_of(
    source: Source,
    dtype: Any,
    precision: str,
    latents: LatentSettings | None,
    encoders: list[TextEncoderSettings] | None,
) -> Encoding:
    """The encoding of one source."""
    return Encoding(
        dtype=dtype,
        precision=precision,
        latents=replace(latents, background=list(source.background)) if latents is not None else None,
        text=TextSettings(encoders, list(source.captions)) if encoders is not None else None,
    )
