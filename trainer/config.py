"""The `train` job's config: its keys with their types, and what can be told of it before anything starts."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import nn

from conf.errors import ConfigError, mistakes
from conf.schema import build
from data.buckets import Buckets
from data.plan import lanes_of, split_batch
from data.run_directory import check_name
from data.tars import TarData
from data.tracking import WandbConfig
from models.code_sampler import CodeSampler
from models.conditioner import Conditioner
from models.first_stage import FirstStage
from models.guidance import Guidance
from models.lora import LoRA
from models.process import Process
from models.samplers import Sampler
from trainer.checkpoint import CheckpointPolicy
from trainer.distributed import Cluster
from trainer.ema import Ema
from trainer.engines.base import EngineConfig
from trainer.engines.networks import check_frozen
from trainer.engines.optimizer import AdamW
from trainer.init_from import InitFrom
from trainer.networks import check_networks
from trainer.objectives.base import DrawsPictures, Objective, Validates
from trainer.passes import Passes
from trainer.phases import build_by_phase
from trainer.schedule import Schedule


@dataclass
class LogConfig:
    """`log` of conf/train.yaml."""

    every: PositiveInt
    wandb: WandbConfig | None
    peak_flops: PositiveFloat | None


@dataclass
class ValidationConfig:
    """`validation` of conf/train.yaml."""

    every: PositiveInt | None
    samples: PositiveInt
    ema: str | None


@dataclass
class SamplesConfig:
    """`samples` of conf/train.yaml."""

    every: PositiveInt | None
    prompts: list[str]
    count: PositiveInt
    ema: str | None


@dataclass
class Config:
    """conf/train.yaml, whose comments explain the keys. A class stands for a `_target_` that builds such an object."""

    model: nn.Module
    first_stage: FirstStage
    conditioner: Conditioner
    networks: dict[str, nn.Module]
    adapter: LoRA | None
    process: Process
    objective: Objective
    data: TarData
    buckets: Buckets
    optimizer: AdamW | dict[str, AdamW]
    schedule: Schedule | dict[str, Schedule]
    engine: EngineConfig
    ema: Ema
    checkpoint: CheckpointPolicy
    sampler: Sampler | CodeSampler
    guidance: Guidance
    cluster: Cluster
    name: str
    runs: str
    seed: int
    steps: PositiveInt
    batch: PositiveInt
    lanes: PositiveInt | None
    pass_size: PositiveInt | None
    device: Literal["auto", "cpu", "cuda"]
    deterministic: bool
    threads: PositiveInt | None
    init_from: str | InitFrom | None
    dry_run: bool
    rehearse: bool
    patience: PositiveInt
    hang_timeout: PositiveFloat | None
    log: LogConfig
    validation: ValidationConfig
    samples: SamplesConfig


def preflight(config: Any, ranks: int) -> None:
    """Refuse a config whose parts cannot run together. Reads no data, loads no weights and writes nothing.

    Args:
        config: of the right types (conf.schema.check).
        ranks: that the run is to have.

    Raises:
        ConfigError: a value out of range, a name that leads out of `runs`, or parts that do not fit each other.
    """
    check_name(config.name)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch sees no CUDA device here: take device=auto or device=cpu.")
    with mistakes():
        for part in ("process", "sampler", "guidance", "data", "checkpoint"):
            build(config[part])
        objective = build(config.objective)
        for part in ("optimizer", "schedule"):
            build_by_phase(config[part], objective.phases, part)
        _check_division(config, objective, ranks)
        check_networks(config, objective)
        trainable = [name for phase in objective.phases for name in phase.trainable]
        check_frozen(config.engine.shard_frozen, objective.networks, trainable)
        if config.data.encoded is not None and not objective.reads_encodings:
            raise ConfigError(f"{type(objective).__name__} reads no encodings: leave out data.encoded.")
        lengths = build(config.ema).lengths
    _check_callbacks(config, objective, lengths)


def _check_callbacks(config: Any, objective: Objective, lengths: Collection[str]) -> None:
    """Validation and sample grids that the objective and the averages must give."""
    kind = type(objective).__name__
    if config.validation.every is not None and config.data.holdout and not isinstance(objective, Validates):
        raise ConfigError(f"{kind} has no validation loss: set validation.every=null.")
    if config.samples.every is not None and not isinstance(objective, DrawsPictures):
        raise ConfigError(f"{kind} draws no pictures of prompts: set samples.every=null.")
    if config.samples.every is not None and config.samples.prompts and not objective.draws_prompts:  # type: ignore[attr-defined]
        raise ConfigError(f"{kind} draws no prompts, but held-out pictures anew: leave out samples.prompts.")
    for part in ("validation", "samples"):
        name = config[part].ema
        if name is not None and name not in lengths:
            raise ConfigError(
                f"{part}.ema={name!r} names no average: this run keeps {', '.join(lengths) or 'none'} (ema.lengths)."
            )


def _check_division(config: Any, objective: Objective, ranks: int) -> None:
    """Batch, lanes, ranks and passes must divide each other."""
    lanes, slice_size = split_batch(config.batch, config.lanes)
    mine = lanes_of(0, ranks, lanes)
    # Whether fused slices share a bucket shows only in the data.
    Passes(config.pass_size, slice_size, len(mine), 1, objective.scope)
    build(config.engine).check(ranks)
