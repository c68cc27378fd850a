"""The networks of a run, from its config: those that the objective trains, and the frozen ones around them."""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import nn

from conf.errors import ConfigError, mistakes
from conf.schema import build, target
from data.buckets import Buckets
from data.tars import TarData, TarSplit
from models.conditioner import Conditioner, ConditionMap, LearnedEncoder
from models.conditions import NeighbourEncoder
from models.each import EachEncoder
from models.pipeline_folder import INDEX, PipelineFolder
from models.pretrained import OfTransformers
from models.text import ClipEncoder
from models.text_lora import adapt_text
from trainer.distributed import World, barrier
from trainer.objectives.base import DropsCaptions, Objective

# Networks that a key of their own describes; `networks.<name>` describes any other.
_KEYS = {"denoiser": "model", "conditioner": "conditioner", "first_stage": "first_stage"}
# Captions that a local text encoder or tokenizer is trained from, of each source.
_CAPTIONS = 20_000


def build_networks(config: Any, objective: Objective, split: TarSplit, world: World) -> dict[str, nn.Module]:
    """The networks that the objective names: a "conditioner" loaded, all others on the meta device for an engine to
    fill.

    Raises:
        ConfigError: the denoiser's sizes do not fit the text encoders'.
    """
    networks = networks_on_meta(config, objective)
    if "conditioner" in objective.networks:
        if "conditioner" not in networks:
            networks["conditioner"] = build_conditioner(config.conditioner, split, world)
        if adapts_text(config):
            with mistakes():
                adapt_text(networks["conditioner"], build(config.adapter), config.seed)
        if "denoiser" in networks:
            conditioner = networks["conditioner"]
            _check_conditions(networks["denoiser"], conditioner.context_dim, conditioner.pooled_dim)
        _check_neighbours(networks["conditioner"], split.data)
    for network in networks.values():
        if isinstance(network, OfTransformers):
            if world.is_main:
                network.learn_tokenizer(lambda: split.captions(_CAPTIONS))
            barrier()
            network.check_tokenizer()
    return {name: networks[name] for name in objective.networks}


def check_networks(config: Any, objective: Objective) -> None:
    """Whether the objective's networks are described, and fit each other and the buckets; the text encoders as far as
    can be told before they are loaded.

    Raises:
        ConfigError: a network is not described, or described but not used; sizes do not fit. Names the key at fault.
    """
    kind, names = type(objective).__name__, ", ".join(objective.networks)
    for name in config.networks:
        if name in _KEYS:
            raise ConfigError(f"networks.{name} is described twice: {_KEYS[name]!r} is the key of the {name}.")
        if name not in objective.networks:
            raise ConfigError(f"networks.{name} is not used: {kind} has {names}.")
    for name in objective.networks:
        if name not in _KEYS and name not in config.networks:
            raise ConfigError(f"networks.{name} is missing: {kind} has {names}.")
    if "conditioner" in objective.networks and isinstance(objective, DropsCaptions):
        local = _from_captions(config.conditioner)
        if local or "encoders" in config.conditioner:
            encoders = 1 if local else len(config.conditioner.encoders)
            sizes, maps = config.conditioner.get("sizes"), config.conditioner.get("maps")
            objective.check_encoders(encoders, (sizes is not None) + len(maps or []))
    if "conditioner" in objective.networks:
        _check_learning(config, objective)
        _check_fields(config)
    networks = networks_on_meta(config, objective)
    if "denoiser" not in networks:
        return
    denoiser = networks["denoiser"]
    if "first_stage" in networks:
        _check_latents(denoiser, networks["first_stage"], build(config.buckets))
    if "conditioner" in objective.networks:
        _check_maps(denoiser, config.conditioner)
        if _from_captions(config.conditioner):
            _check_conditions(denoiser, config.conditioner.width, config.conditioner.width)
        elif "conditioner" in networks:
            conditioner = networks["conditioner"]
            _check_conditions(denoiser, conditioner.context_dim, conditioner.pooled_dim)
            if conditioner.encoders and not denoiser.condition_keys(conditioner.context_dim, conditioner.pooled_dim):
                raise ConfigError("model: it reads no context, and the conditioner learns to give one.")


def _check_learning(config: Any, objective: Objective) -> None:
    trained = any("conditioner" in phase.trainable for phase in objective.phases)
    learns, adapts = conditioner_learns(config.conditioner), adapts_text(config)
    if adapts and (learns or not _has_clip(config.conditioner)):
        raise ConfigError("adapter.text_targets: the conditioner has no CLIP text encoder that is frozen.")
    if (learns or adapts) and not trained:
        raise ConfigError("the conditioner learns with the denoiser: set objective.train_conditioner=true.")
    if trained and not (learns or adapts):
        raise ConfigError("objective.train_conditioner=true: the conditioner is frozen, and has nothing to learn.")


def _check_fields(config: Any) -> None:
    """Whether samples have the fields that the conditioner reads."""
    nodes = [*config.conditioner.get("encoders", []), *(config.conditioner.get("maps") or [])]
    kinds: list[Any] = [target(node["_target_"], "conditioner") for node in nodes]
    with torch.device("meta"):  # pretrained encoders read captions and pictures
        own = [issubclass(kind, LearnedEncoder | NeighbourEncoder | ConditionMap) for kind in kinds]
        parts = [build(node) for node, reads_fields in zip(nodes, own, strict=True) if reads_fields]
    asked = {name for part in parts for name in ([part.reads] if isinstance(part.reads, str) else part.reads)}
    asked |= {node.get("field", "neighbours") for node, kind in zip(nodes, kinds, strict=True) if kind is EachEncoder}
    asked |= {(config.conditioner.get("sizes") or {}).get("aesthetic")} - {None}
    have = set(config.data.fields or {}) | {"captions", "images"}
    for source in config.data.sources.values():
        have |= set(source.get("fields") or {})
    if missing := sorted(asked - have):
        raise ConfigError(
            f"data.fields.{missing[0]} is missing: the conditioner reads it. Say where samples have it, such as"
            f" data.fields.{missing[0]}._target_=data.fields.Label data.fields.{missing[0]}.member=cls."
        )
    for part in parts:
        if isinstance(part, NeighbourEncoder):
            _check_k(config.data, part)


def _check_k(data: Any, encoder: NeighbourEncoder) -> None:
    """Whether samples come with as many neighbours as the encoder takes."""
    places = {"data": data.fields} | {f"data.sources.{name}": one.get("fields") for name, one in data.sources.items()}
    for place, fields in places.items():
        k = getattr(build((fields or {}).get(encoder.reads)), "k", None)
        if k not in (None, encoder.length):
            raise ConfigError(
                f"{place}.fields.{encoder.reads}.k is {k}, and the conditioner is made for {encoder.length} neighbours:"
                f" set it to {encoder.length}, or k of conditioner.encoders."
            )


def _check_neighbours(conditioner: Any, data: TarData) -> None:
    """The same of what the opened database tells: numbers in an embedding."""
    encoders = conditioner.numbered() if isinstance(conditioner, Conditioner) else []
    for encoder in encoders:
        if not isinstance(encoder, NeighbourEncoder):
            continue
        for source in data.sources:
            shape = tuple(data.fields_of(source)[encoder.reads].blank((1, 1)).shape)
            if shape != (encoder.length, encoder.width):
                raise ConfigError(
                    f"data.fields.{encoder.reads} gives {shape} numbers a sample, and the model was made for"
                    f" {(encoder.length, encoder.width)}, neighbours and numbers in an embedding: take a database of"
                    " another CLIP, or set k and width of conditioner.encoders."
                )


def networks_on_meta(config: Any, objective: Objective) -> dict[str, Any]:
    """All networks on the meta device, but for a conditioner that is frozen."""
    nodes = {name: config[key] for name, key in _KEYS.items()} | dict(config.networks)
    meta = [name for name in objective.networks if name != "conditioner" or conditioner_learns(config.conditioner)]
    with torch.device("meta"):
        networks = {name: build(nodes[name]) for name in meta}
        if config.get("adapter") and "denoiser" in networks:
            networks["denoiser"] = adapted(networks["denoiser"], config)
    return networks


def adapted(denoiser: nn.Module, config: Any) -> nn.Module:
    """The denoiser with the run's adapters.

    Raises:
        ConfigError: the weights to adapt are nowhere to be had, or have no such modules.
    """
    with mistakes():
        lora = build(config.adapter)
        return lora.adapt(denoiser, adapter_base(config))


def adapter_base(config: Any) -> str:
    """The component's folder whose weights a run's adapters are for.

    Raises:
        ValueError: there is none.
    """
    source = config.init_from
    path, networks = (source, {}) if isinstance(source, str | None) else (source.path, source.get("networks", {}))
    path = config.adapter.base or path
    if path is None:
        raise ValueError("adapter.base names no weights to adapt: give adapter.base=<a diffusers folder>, or init_from")
    if (Path(path) / INDEX).is_file():
        path = str(Path(path) / networks.get("denoiser", PipelineFolder(path).denoiser))
    if not (Path(path) / "config.json").is_file():
        raise ValueError(f"adapter.base: {path} is no diffusers folder; `millrace export` makes one of a run")
    return path


def adapts_text(config: Any) -> bool:
    """Whether a run trains adapters of its text encoders."""
    return bool((config.get("adapter") or {}).get("text_targets"))


def _has_clip(config: Any) -> bool:
    return any(target(node["_target_"], "conditioner.encoders") is ClipEncoder for node in config.get("encoders", []))


def conditioner_learns(config: Any) -> bool:
    """Whether the conditioner is trained with the denoiser, from nothing."""
    nodes = [*config.get("encoders", []), *(config.get("maps") or [])]
    return any(getattr(target(node["_target_"], "conditioner"), "learned", False) for node in nodes)


def _from_captions(config: Any) -> bool:
    """Whether the conditioner is trained from the captions themselves (a stand-in where no pretrained encoder is at
    hand); its context and pooled vectors then have `width` features."""
    return "captions" in inspect.signature(target(config["_target_"], "conditioner")).parameters


def embeds_images(config: Any) -> bool:
    """Whether the conditioner has an encoder that reads pictures."""
    classes = [target(node["_target_"], "conditioner.encoders") for node in config.get("encoders", [])]
    return any(getattr(kind, "reads", None) == "images" for kind in classes)


def build_conditioner(config: Any, split: TarSplit, world: World) -> Any:
    """The conditioner; one that learns does so on the main rank, and is loaded by the others afterwards."""
    extra = {"captions": lambda: split.captions(_CAPTIONS)} if _from_captions(config) else {}
    if world.is_main:
        conditioner = build(config, **extra)
    barrier()
    return conditioner if world.is_main else build(config)


def _check_latents(denoiser: Any, first_stage: Any, buckets: Buckets) -> None:
    codes = getattr(first_stage, "codes", None)
    if ("codes" in denoiser.config) != (codes is not None):
        kinds = ("codes: take such a first stage, vq_f16_codes", "latents: take first_stage=vq_f16, or another")
        raise ConfigError(f"first_stage: {type(denoiser).__name__} is of {kinds[codes is not None]}.")
    for key in ("in_channels", "out_channels") if codes is None else ("codes",):
        _check(denoiser, key, "first stage", first_stage.channels if codes is None else codes)
    f = first_stage.downsampling
    for bucket in buckets.shapes:
        if bucket.height % f or bucket.width % f:
            raise ConfigError(f"buckets: {bucket} is no multiple of {f}, by which the first stage divides sides.")
        try:
            denoiser.grid(*first_stage.latent_shape(bucket.height, bucket.width)[1:])
        except ValueError as error:
            raise ConfigError(f"buckets: {bucket} does not fit the model: {error}.") from error


def _check_conditions(denoiser: Any, context_dim: int, pooled_dim: int) -> None:
    for key, gives in denoiser.condition_keys(context_dim, pooled_dim).items():
        _check(denoiser, key, "conditioner", gives)


def _check_maps(denoiser: Any, config: Any) -> None:
    with torch.device("meta"):
        gives = sum(build(node).channels for node in config.get("maps") or [])
    takes = denoiser.config.get("concat_channels", 0)
    if takes != gives:
        raise ConfigError(
            f"model.concat_channels is {takes}, but the conditioner's maps have {gives} channels: set"
            f" model.concat_channels={gives}."
            if "concat_channels" in denoiser.config
            else f"conditioner.maps: {type(denoiser).__name__} takes nothing beside the latent; take a UNet."
        )


def _check(denoiser: Any, key: str, giver: str, gives: int) -> None:
    takes = denoiser.config[key]
    if takes != gives:
        raise ConfigError(f"model.{key} is {takes}, but the {giver} gives {gives}: set model.{key}={gives}.")
