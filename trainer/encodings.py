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
    CropSettings,
    Dtype,
    EncoderSettings,
    Encoding,
    LatentSettings,
    TextSettings,
    check_encoded,
    read_nulls,
    read_stored,
)
from data.selection import Selection
from data.tars import Source, TarData
from models.conditioner import Conditioner
from models.first_stage import AutoencoderFirstStage
from trainer.distributed import World
from trainer.networks import adapts_text


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
    if data.encoding is None or not data.encoding.encoders or config.samples.every is not None:
        return {}
    assert isinstance(conditioner, Conditioner) and data.encoded is not None
    first = data.manifests(next(iter(data.sources)))[0]
    return {"conditioner": conditioner.without_weights(read_nulls(first.url, data.encoded, data.store))}


def _checked(config: Any, data: TarData, networks: dict[str, nn.Module], device: torch.device) -> dict[str, Encoding]:
    """The encoding of each source."""
    assert data.encoded is not None
    selections = {name: data.select(name, None) for name in data.sources}
    latents, conditions = _parts_there(data, selections)
    conditioner = networks["conditioner"]
    if latents and not conditions and isinstance(conditioner, Conditioner) and conditioner.reads_images:
        raise ValueError(
            f"data.encoded={data.encoded} holds latents alone, in the place of pictures, which this run's conditioner"
            " embeds: encode again, with encode.conditions=true"
        )
    if conditions and adapts_text(config):
        raise ValueError(
            f"data.encoded={data.encoded} holds embeddings of text encoders, and this run trains adapters of them"
            " (adapter.text_targets): encode again by this run's own command, which leaves embeddings out"
        )
    wanted = wanted_encoding(
        config, data, networks["first_stage"] if latents else None, conditioner if conditions else None, device
    )
    return {
        name: check_encoded(
            data.manifests(name), rows_of(selections[name]), data.encoded, of_source(wanted, source), data.store
        )
        for name, source in data.sources.items()
    }


def _parts_there(data: TarData, selections: dict[str, Selection]) -> tuple[bool, bool]:
    """Whether the first shard that has any sample holds latents, and embeddings: others are held against these."""
    for name, selection in selections.items():
        for manifest, rows in zip(data.manifests(name), rows_of(selection), strict=True):
            stored = read_stored(manifest, data.encoded or "", data.store) if len(rows) else None
            if stored is not None:
                return stored.encoding.latents is not None, bool(stored.encoding.encoders)
    return False, False


def rows_of(selection: Selection) -> list[np.ndarray]:
    """The manifest rows that are selected of each shard."""
    offsets = selection.shard_offsets
    return [selection.row[offsets[i] : offsets[i + 1]] for i in range(len(selection.shards))]


def wanted_encoding(
    config: Any,
    data: TarData,
    first_stage: nn.Module | None,
    conditioner: nn.Module | None,
    device: torch.device,
    dtype: Dtype = "bfloat16",
) -> Encoding:
    """What the run's encoders make of its data, but for what differs between sources; see `of_source`.

    Args:
        first_stage: None leaves latents out.
        conditioner: None leaves its encoders out.

    Raises:
        ConfigError: the first stage has no latents to keep.
    """
    latents, captions, images = None, [], []
    if first_stage is not None:
        stage = with_moments(first_stage)
        latents = LatentSettings(stage.fingerprint(config.seed, device), stage.moment_channels, stage.downsampling)
    if conditioner is not None:
        assert isinstance(conditioner, Conditioner)
        captions = _encoder_settings(conditioner, "captions")
        images = _encoder_settings(conditioner, "images")
    crops = None
    if latents is not None or images:
        buckets: Buckets = build(config.buckets)
        crops = CropSettings([str(bucket) for bucket in buckets.shapes], data.crop, data.flip, background=[])
    return Encoding(
        dtype=dtype,
        precision=config.engine.precision,
        crops=crops,
        latents=latents,
        text=TextSettings(captions, columns=[]) if captions else None,
        images=images or None,
    )


def of_source(encoding: Encoding, source: Source) -> Encoding:
    """The encoding of one source."""
    crops, text = encoding.crops, encoding.text
    return replace(
        encoding,
        crops=replace(crops, background=list(source.background)) if crops is not None else None,
        text=replace(text, columns=list(source.captions)) if text is not None else None,
    )


def _encoder_settings(conditioner: Conditioner, reads: str) -> list[EncoderSettings]:
    """The encoders that read captions, or images, and of which there is something to keep."""
    encoders = conditioner.numbered()
    return [
        EncoderSettings(
            number=i,
            fingerprint=encoders[i].fingerprint(),
            length=encoders[i].length,
            width=encoders[i].width,
            pooled_width=encoders[i].pooled_width,
        )
        for i in conditioner.stored
        if encoders[i].reads == reads
    ]


def with_moments(first_stage: nn.Module) -> AutoencoderFirstStage:
    """The first stage, if it has latents that can be kept.

    Raises:
        ConfigError: it has none.
    """
    if not isinstance(first_stage, AutoencoderFirstStage):
        kind = type(first_stage).__name__
        raise ConfigError(
            f"first_stage: {kind} has no latents to keep; take another (first_stage=kl_tiny for a trial), or set"
            " encode.latents=false."
        )
    return first_stage
