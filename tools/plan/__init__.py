"""`millrace plan`: what a run would need, before any GPU is asked for.

    estimate = tools.plan.estimate.estimate(config, ranks)      # of a composed `train` config
    estimate.bytes_per_rank, estimate.fits(80e9)

It takes the run's own step on fake tensors in a fake world (tools/plan/fakes.py): what it counts follows the code.
"""

import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

from omegaconf import DictConfig, OmegaConf
from pydantic import Field, PositiveFloat

from conf.compose import ROOT, compose, split_cluster
from conf.errors import ConfigError
from conf.schema import check
from slurm.resources import Resources
from tools.launch import ranks_of
from tools.plan.estimate import Estimate, estimate
from tools.plan.outlook import Outlook, table
from tools.plan.storage import mean_sample_bytes
from trainer.config import Config as TrainConfig
from trainer.config import preflight as train_preflight
from trainer.hardware import DEVICES, device_named

_DEVICE = "H100"
_EVERY = "experiment=all"
# So many processes, of 0.5 GiB each.
_AT_ONCE = 4
Share = Annotated[float, Field(gt=0, le=1)]


@dataclass
class PlanConfig:
    """`plan` of conf/plan.yaml, whose comments explain the keys."""

    device: str | None
    memory: PositiveFloat | None
    headroom: Annotated[float, Field(ge=0, lt=1)]
    mfu: Share
    price_per_gpu_hour: PositiveFloat | None
    sample_bytes: PositiveFloat
    json: str | None


@dataclass
class Config(TrainConfig):
    """conf/plan.yaml: that of the run, and `plan`."""

    plan: PlanConfig


def plan(overrides: Sequence[str]) -> None:
    """`millrace plan <overrides>`.

    Raises:
        ConfigError: a mistake in the command, or parts of the run that do not fit together.
    """
    every = _EVERY in overrides
    own = [override for override in overrides if override != _EVERY]
    settings = _compose(own).plan  # also refuses mistakes once, not for each experiment
    if every:
        rows = _every(own)
        text = table(rows)
        plain: Any = {name: row.plain() if isinstance(row, Outlook) else {"refused": row} for name, row in rows}
    else:
        outlook = outlook_of(own)
        text, plain = str(outlook), outlook.plain()
    if settings.json is not None and settings.json != "-":
        Path(settings.json).write_text(json.dumps(plain, indent=2) + "\n")
    print(json.dumps(plain, indent=2) if settings.json == "-" else text)


def outlook_of(overrides: Sequence[str]) -> Outlook:
    """The outlook of a run.

    Raises:
        ConfigError: see `plan`.
    """
    config = _compose(overrides)
    ranks, gpu = _place(overrides)
    settings = config.plan
    name = settings.device or gpu or _DEVICE
    device = device_named(name)
    if device is None:
        raise ConfigError(f"plan.device={name!r}: one of {', '.join(known.name for known in DEVICES)}.")
    memory = int(settings.memory * 2**30) if settings.memory is not None else device.memory
    _preflight(config, ranks)
    known = estimate(config, ranks)
    bytes_of_a_sample = mean_sample_bytes(config.data)
    return Outlook(
        estimate=known,
        device=device.name,
        memory=memory,
        headroom=settings.headroom,
        peak_flops=device.peak_flops,
        mfu=settings.mfu,
        sample_bytes=bytes_of_a_sample if bytes_of_a_sample is not None else settings.sample_bytes,
        assumed=bytes_of_a_sample is None,
        price=settings.price_per_gpu_hour,
        advice=[] if known.fits(memory, settings.headroom) else advice(config, known),
    )


def advice(config: Any, known: Estimate) -> list[str]:
    """What takes memory off the device, that which takes the most first."""
    engine = config.engine
    states = sum(known.bytes.get(kind, 0) for kind in ("weights", "masters", "gradients", "moments", "averages"))
    momentary = known.bytes["activations"] + known.bytes.get("gathered", 0)
    found: list[tuple[int, str]] = []
    if not engine.activation_checkpointing:
        found.append((momentary, "engine.activation_checkpointing=true keeps only blocks' inputs"))
    if known.pass_size > 1:
        half = f"pass_size={known.pass_size // 2} halves what activations take"
        found.append((momentary - 1 if not engine.activation_checkpointing else momentary, half))
    if known.bytes.get("frozen", 0):
        found.append((known.bytes["frozen"], "data.encoded=<name>, after millrace encode, lets text encoders go"))
        found.append((known.bytes["frozen"] - 1, "engine.shard_frozen='[conditioner]' shards text encoders"))
    if engine.get("replicas", 1) > 1:
        found.append((states, "a smaller engine.replicas shards over more ranks"))
    elif engine.get("stage", 3) < 3:
        found.append((states, "engine.stage=3, or engine=fsdp, shards weights and gradients too"))
    else:
        found.append((states, "more ranks share out weights, gradients and moments"))
    if not engine.offload:
        found.append((states - 1, "engine.offload=true keeps them on the host"))
    return [f"{what} ({size / 2**30:.1f} GiB)" for size, what in sorted(found, reverse=True) if size > 2**27]


def _compose(overrides: Sequence[str]) -> DictConfig:
    """The run's config; where its ranks would run is told apart."""
    own, _ = split_cluster(overrides)
    config = compose("plan", own, missing="null")
    check(config, Config)
    return config


def _place(overrides: Sequence[str]) -> tuple[int, str | None]:
    """How many ranks the run has, and on which GPUs if the cluster's config tells."""
    config = compose("plan", list(overrides), missing="null")
    if config.cluster.kind != "slurm":
        return ranks_of(config), None
    resources = Resources(**OmegaConf.to_container(config.cluster))  # type: ignore[arg-type]
    return resources.nodes * resources.ranks, resources.gpu


def _preflight(config: DictConfig, ranks: int) -> None:
    """The run's own, which need not have its data yet, nor run here."""
    placed = OmegaConf.create(OmegaConf.to_container(config))
    placed.device = "auto"
    placed.data.sources = placed.data.sources or {"later": {"shards": "later"}}
    train_preflight(placed, ranks)


def _every(overrides: Sequence[str]) -> list[tuple[str, Outlook | str]]:
    """Each experiment's outlook, or why it cannot be under these overrides."""
    folder = ROOT / "experiment"
    names = sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
    # Apart from each other: a plan takes a process's group of ranks for itself.
    with ProcessPoolExecutor(_AT_ONCE, mp_context=get_context("spawn")) as pool:
        return list(zip(names, pool.map(partial(_row, list(overrides)), names), strict=True))


def _row(overrides: list[str], name: str) -> Outlook | str:
    try:
        return outlook_of([*overrides, f"experiment={name}"])
    except ConfigError as error:
        return str(error)
