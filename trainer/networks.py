"""The networks of a run, from its config: those that the objective trains, and the frozen ones around them."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from conf.errors import ConfigError
from conf.schema import build, target
from data.tars import TarSplit
from trainer.distributed import World, barrier
from trainer.objectives.base import Objective

# Networks that a key of their own describes; `networks.<name>` describes any other.
_KEYS = {"denoiser": "model", "conditioner": "conditioner", "first_stage": "first_stage"}
# Captions that a local text encoder is trained from, of each source.
_CAPTIONS = 20_000


def build_networks(config: Any, objective: Objective, split: TarSplit, world: World) -> dict[str, nn.Module]:
    """The networks that the objective names: a "conditioner" loaded, all others on the meta device for an engine to
    fill.

    Raises:
        ConfigError: a network is not described, or described but not used; the denoiser's sizes do not fit the first
            stage's or the text encoders'.
    """
    nodes = {name: config[key] for name, key in _KEYS.items()} | dict(config.networks)
    kind = type(objective).__name__
    for name in config.networks:
        if name in _KEYS:
            raise ConfigError(f"networks.{name} is described twice: {_KEYS[name]!r} is the key of the {name}.")
        if name not in objective.networks:
            raise ConfigError(f"networks.{name} is not used: {kind} has {', '.join(objective.networks)}.")
    for name in objective.networks:
        if name not in nodes:
            raise ConfigError(f"networks.{name} is missing: {kind} has {', '.join(objective.networks)}.")
    networks: dict[str, nn.Module] = {}
    for name in objective.networks:
        if name == "conditioner":
            networks[name] = _build_conditioner(nodes[name], split, world)
        else:
            with torch.device("meta"):
                networks[name] = build(nodes[name])
    _check(networks)
    return networks


def _build_conditioner(config: Any, split: TarSplit, world: World) -> nn.Module:
    """The conditioner; one that is trained from the captions themselves (a stand-in where no pretrained encoder is at
    hand) is trained by the main rank, and loaded by the others afterwards."""
    learns = "captions" in inspect.signature(target(config["_target_"], "conditioner")).parameters
    extra = {"captions": lambda: split.captions(_CAPTIONS)} if learns else {}
    if world.is_main:
        conditioner = build(config, **extra)
    barrier()
    return conditioner if world.is_main else build(config)


def _check(networks: Mapping[str, nn.Module]) -> None:
    if "denoiser" not in networks:
        return
    takes: dict[str, int] = networks["denoiser"].config  # type: ignore[assignment]
    for key, source, what in (
        ("in_channels", "first_stage", "channels"),
        ("joint_attention_dim", "conditioner", "context_dim"),
        ("pooled_projection_dim", "conditioner", "pooled_dim"),
    ):
        if source in networks and takes[key] != (gives := getattr(networks[source], what)):
            name = source.replace("_", " ")
            raise ConfigError(f"model.{key} is {takes[key]}, but the {name} gives {gives}: set model.{key}={gives}.")
