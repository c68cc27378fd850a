"""The networks of a run, from its config: the denoiser to train, and the frozen ones around it."""

import inspect
from typing import Any

import torch
from torch import nn

from conf.errors import ConfigError
from conf.schema import build, target
from data.tars import TarSplit
from trainer.distributed import World, barrier

# Captions that a local text encoder is trained from, of each source.
_CAPTIONS = 20_000


def build_networks(config: Any, split: TarSplit, world: World) -> dict[str, nn.Module]:
    """ "denoiser" and "first_stage" on the meta device for an engine to fill, "conditioner" loaded.

    Raises:
        ConfigError: the denoiser's sizes do not fit the first stage's or the text encoders'.
    """
    conditioner = _build_conditioner(config.conditioner, split, world)
    with torch.device("meta"):
        first_stage = build(config.first_stage)
        denoiser = build(config.model)
    _check(denoiser, first_stage, conditioner)
    return {"denoiser": denoiser, "conditioner": conditioner, "first_stage": first_stage}


def _build_conditioner(config: Any, split: TarSplit, world: World) -> nn.Module:
    """The conditioner; one that is trained from the captions themselves (a stand-in where no pretrained encoder is at
    hand) is trained by the main rank, and loaded by the others afterwards."""
    learns = "captions" in inspect.signature(target(config["_target_"], "conditioner")).parameters
    extra = {"captions": lambda: split.captions(_CAPTIONS)} if learns else {}
    if world.is_main:
        conditioner = build(config, **extra)
    barrier()
    return conditioner if world.is_main else build(config)


def _check(denoiser: nn.Module, first_stage: nn.Module, conditioner: nn.Module) -> None:
    takes: dict[str, int] = denoiser.config  # type: ignore[assignment]
    for key, what, gives in (
        ("in_channels", "first stage", first_stage.channels),
        ("joint_attention_dim", "conditioner", conditioner.context_dim),
        ("pooled_projection_dim", "conditioner", conditioner.pooled_dim),
    ):
        if takes[key] != gives:
            raise ConfigError(f"model.{key} is {takes[key]}, but the {what} gives {gives}: set model.{key}={gives}.")
