"""One rank's step of the run at one shape, on fake tensors: what it keeps, gathers, computes and sends."""

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from conf.schema import build
from data.buckets import Bucket
from data.encoded import EncoderSettings, Encoding, LatentSettings
from data.fields import blank_fields
from models.conditioner import Conditioner
from models.first_stage import AutoencoderFirstStage
from tools.plan.encoders import planned_conditioner
from tools.plan.fakes import ACTIVATIONS, GATHERED, GRADIENTS, STATES, Account, Fakes, fake_world
from tools.plan.zero import Whole
from trainer.engines.deepspeed import DeepSpeed
from trainer.networks import networks_on_meta
from trainer.objectives.base import Objective
from trainer.passes import Passes
from trainer.phases import build_by_phase
from trainer.rehearsal import blank

# Ranks of the fake world, at most. Whole blocks are gathered whatever its size; what is sharded is not counted here.
_SHARDS, _REPLICAS = 8, 2


@dataclass(frozen=True)
class Rehearsal:
    """What one rank's step takes at one shape.

    Args:
        activations, gathered: bytes at the moment of most of both together (fakes.Account has the kinds).
        whole_gradients: bytes of gradients that wait whole for the last pass.
        batch: bytes of one pass's samples.
        flops: of one pass: frozen networks and what is computed again included.
        traffic: bytes of the step by collective, of the tensors that are gathered or reduced, whole.
    """

    activations: int
    gathered: int
    whole_gradients: int
    batch: int
    flops: int
    traffic: Mapping[str, int]


def planned_networks(config: Any, objective: Objective) -> dict[str, nn.Module]:
    """The objective's networks without anything in them, on the meta device, and a conditioner without weights on the
    default device."""
    networks = networks_on_meta(config, objective)
    # Files have values, which fakes have not: neither a first stage's weights are read, nor those beside adapters.
    if isinstance(first_stage := networks.get("first_stage"), AutoencoderFirstStage):
        first_stage.folder = None
    if config.get("adapter") and "denoiser" in networks:
        networks["denoiser"].init_buffers = lambda: None
    if "conditioner" in objective.networks:
        held = config.data.encoded is None or config.samples.every is not None
        networks["conditioner"] = planned_conditioner(config.conditioner, held)
    return {name: networks[name] for name in objective.networks}


def rehearse_on_fakes(
    config: Any, objective: Objective, bucket: Bucket, arrange: Passes, slices: int, ranks: int
) -> Rehearsal:
    """Two passes of every phase, of which the second is measured: gradients and buffers are then in place.

    Args:
        config: of the run, whose networks are read from no file.
        arrange: slices to passes.
        slices: that a rank serves in a step.
        ranks: of the run.

    Raises:
        ValueError: the objective's losses ask for values, which fake tensors do not have.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # of the run's own, and there to be read
            return _rehearse(config, objective, bucket, arrange, slices, ranks)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        kind = type(objective).__name__
        raise ValueError(f"the losses of {kind} depend on values ({error.func}), which a plan does not have") from error


def _rehearse(config: Any, objective: Objective, bucket: Bucket, arrange: Passes, slices: int, ranks: int) -> Rehearsal:
    passes = arrange.slice_size * slices // arrange.size
    engine_config = replace(build(config.engine), compile=False)
    zero = isinstance(engine_config, DeepSpeed)
    replicas = 1 if zero else min(engine_config.replicas, _REPLICAS)
    shards = min(ranks if zero else ranks // engine_config.replicas, _SHARDS)
    device = torch.device("cpu")
    with fake_world(replicas * shards), Fakes(), Account() as account:
        networks = planned_networks(config, objective)
        if zero:
            engine: Any = Whole(networks, objective.phases, engine_config, device)
        else:
            optimizers = build_by_phase(config.optimizer, objective.phases, "optimizer")
            sized = replace(engine_config, replicas=replicas, offload=False)
            engine = sized.build(networks, objective.phases, optimizers, config.seed, device)
        account.settle(STATES)
        encoding = _encoding(config, networks) if config.data.encoded is not None else None
        own = {name: build(node) for name, node in (config.data.get("fields") or {}).items()}

        def fields(size: int, bucket: Bucket) -> dict[str, Any]:
            return (encoding.fields(size, bucket) if encoding is not None else {}) | blank_fields(own, size, bucket)

        step = config.steps - 1
        batch = arrange([blank(bucket, arrange.slice_size, lane, fields, step) for lane in range(slices)])[0]
        batch_bytes = account.bytes(ACTIVATIONS)
        account.settle(STATES)

        peak: dict[str, int] = {ACTIVATIONS: 0, GATHERED: 0}
        flops, whole_gradients, traffic = 0, 0, Counter[str]()
        for phase in objective.phases:
            for measured in (False, True):
                account.start()
                with engine.accumulating(phase, last=measured or passes == 1):
                    losses = objective.losses(phase, engine.networks, batch)
                    engine.backward(phase, losses.per_sample.sum() / config.batch)
                del losses
                if not measured:
                    whole_gradients = max(whole_gradients, account.bytes(ACTIVATIONS))
                    account.settle(GRADIENTS)
                times = 1 if measured else passes - 1
                traffic.update({name: times * sent for name, sent in account.traffic.items()})
            engine.discard(phase)
            flops += account.flops
            if account.peak > sum(peak.values()):
                peak = account.at_peak
    traffic["all_reduce"] *= shards
    return Rehearsal(peak[ACTIVATIONS], peak[GATHERED], whole_gradients, batch_bytes, flops, dict(traffic))


def _encoding(config: Any, networks: Mapping[str, nn.Module]) -> Encoding:
    """What slices come with that were encoded before: all that can be."""
    first_stage, conditioner = networks.get("first_stage"), networks.get("conditioner")
    latents = encoders = None
    if isinstance(first_stage, AutoencoderFirstStage):
        latents = LatentSettings("", first_stage.moment_channels, first_stage.downsampling)
    if isinstance(conditioner, Conditioner):
        every = conditioner.numbered()
        encoders = [
            EncoderSettings(i, "", every[i].length, every[i].width, every[i].pooled_width) for i in conditioner.stored
        ]
    # Captions' encoders and pictures' go the same way.
    return Encoding("bfloat16", config.engine.precision, latents=latents, images=encoders)
