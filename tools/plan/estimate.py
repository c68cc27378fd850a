"""What a run would hold, compute and send, told before it starts: from its config and a number of ranks alone."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from conf.schema import build
from data.buckets import Bucket, Buckets
from data.plan import lanes_of, split_batch
from tools.plan.fakes import fake_world
from tools.plan.rehearsal import planned_networks, rehearse_on_fakes
from tools.plan.zero import zero_buffers, zero_states, zero_traffic
from trainer.engines import networks as shared
from trainer.engines.deepspeed import DeepSpeed, live_elements
from trainer.engines.fsdp import FSDP
from trainer.networks import adapts_text
from trainer.passes import Passes

HEADROOM = 0.1
"""Share of a device's memory that stays free, unless told otherwise, for what cannot be known before: fragmentation,
buffers of NCCL, workspaces of cuDNN and cuBLAS, the CUDA context."""
_FP32 = 4
# Of what follows from the states' kinds, these go to host memory with engine.offload.
_OFFLOADED = ("masters", "gradients", "moments", "averages")


@dataclass(frozen=True)
class Estimate:
    """A run on so many ranks.

    Args:
        name: of the run.
        ranks: one per GPU.
        parameters: of each network: how many are trained, how many frozen.
        bytes: of each rank's device by kind, at the moment of the most: weights (kept in the compute type), masters,
            gradients, moments, averages, frozen, gathered (weights and buffers of collectives), activations, batch.
        host_bytes: of each rank's host memory by kind, with engine.offload.
        bucket: the shape that takes the most.
        pass_size: samples in a pass.
        passes: that a rank takes in a step.
        batch: samples in a step.
        steps: of the run.
        model_flops: of a step over all ranks, as MFU counts them, with all samples of that shape; 0 where the objective
            does not count.
        executed_flops: counted operator by operator: with frozen networks, and what checkpointing computes again.
        traffic: bytes that each rank receives in a step, by collective.
    """

    name: str
    ranks: int
    parameters: Mapping[str, tuple[int, int]]
    bytes: Mapping[str, int]
    host_bytes: Mapping[str, int]
    bucket: Bucket
    pass_size: int
    passes: int
    batch: int
    steps: int
    model_flops: float
    executed_flops: float
    traffic: Mapping[str, int]

    @property
    def bytes_per_rank(self) -> int:
        """All that is known of a device's memory."""
        return sum(self.bytes.values())

    def fits(self, device_bytes: float, headroom: float = HEADROOM) -> bool:
        """Whether it fits into a device, of which a share stays free."""
        return self.bytes_per_rank <= (1 - headroom) * device_bytes


def estimate(config: Any, ranks: int) -> Estimate:
    """What a `train` config takes on so many ranks. Reads no data and no weights; in a process without a process group.

    Blocks count as they run without `engine.compile`, which keeps less. Text encoders count as if no caption were
    dropped. Validation and sample grids are not counted, nor adapters of text encoders and what passes back to them.

    Raises:
        ConfigError: a text encoder whose size nothing here tells.
        ValueError: batch, lanes, ranks and passes do not divide each other.
    """
    if adapts_text(config):
        without = {"adapter": {"text_targets": []}, "objective": {"train_conditioner": False}}
        config = OmegaConf.merge(config, without)
    objective = build(config.objective)
    engine = build(config.engine)
    engine.check(ranks)
    lanes, slice_size = split_batch(config.batch, config.lanes)
    slices = len(lanes_of(0, ranks, lanes))
    buckets: Buckets = build(config.buckets)
    arrange = Passes(config.pass_size, slice_size, slices, len(buckets), objective.scope)
    passes = slice_size * slices // arrange.size
    largest = max(buckets.shapes, key=lambda shape: shape.height * shape.width)

    with torch.device("meta"):
        networks = planned_networks(config, objective)
    trainable = [name for phase in objective.phases for name in phase.trainable]
    rehearsal = rehearse_on_fakes(config, objective, largest, arrange, slices, ranks)
    traffic: Counter[str] = Counter(rehearsal.traffic)
    replicas = engine.replicas if isinstance(engine, FSDP) else 1
    held: Counter[str] = Counter(activations=rehearsal.activations, gathered=rehearsal.gathered)
    held["batch"] = rehearsal.batch * passes
    with fake_world(ranks):
        everyone = {"shard": ranks}
        mesh = shared.device_mesh(torch.device("cpu"), everyone)["shard"]
        width = shared.compute_dtype(config.engine.precision).itemsize
        for name in objective.networks:
            if name not in trainable:
                numels = _local_numels(networks[name], mesh if name in engine.shard_frozen else None)
                held["frozen"] += width * sum(numels)
        gradients = []
        for phase in objective.phases:
            states: Counter[str] = Counter()
            for name in phase.trainable:
                if isinstance(engine, DeepSpeed):
                    numel = _count(networks[name].parameters())
                    states.update(zero_states(engine, numel, ranks, passes))
                    held["gathered"] += zero_buffers(engine, numel, live_elements(networks[name]))
                    traffic.update(zero_traffic(engine, numel, passes))
                else:
                    states.update(_fsdp_states(networks[name], ranks, replicas))
            gradients.append(max(states.pop("gradients"), rehearsal.whole_gradients))
            held.update(states)
        held["gradients"] = max(gradients)
    held["averages"] = len(build(config.ema).lengths) * held["masters"]

    offloaded = _OFFLOADED if engine.offload else ()
    return Estimate(
        name=config.name,
        ranks=ranks,
        parameters={
            name: (_count(networks[name].parameters()), 0)
            if name in trainable
            else (0, _count(networks[name].parameters()))
            for name in objective.networks
        },
        bytes={kind: size for kind, size in held.items() if size and kind not in offloaded},
        host_bytes={kind: held[kind] for kind in offloaded if held[kind]},
        bucket=largest,
        pass_size=arrange.size,
        passes=passes,
        batch=config.batch,
        steps=config.steps,
        model_flops=config.batch * objective.flops(networks, largest),
        executed_flops=float(rehearsal.flops) * passes * ranks,
        traffic=_received(traffic, ranks // replicas, replicas),
    )


def _fsdp_states(network: nn.Module, ranks: int, replicas: int) -> dict[str, int]:
    """Bytes of a trained network that rank 0 holds under FSDP2: its shards are the largest."""
    sides = {"replicate": replicas, "shard": ranks // replicas}
    mesh = shared.device_mesh(torch.device("cpu"), sides)["shard"]
    held = _FP32 * sum(_local_numels(network, mesh))
    return {"masters": held, "gradients": held, "moments": 2 * held}


def _local_numels(network: nn.Module, mesh: DeviceMesh | None) -> list[int]:
    """Elements of each parameter that this rank holds: all, or what FSDP2 leaves it of a meta tensor of that shape."""
    shapes = [tuple(parameter.shape) for parameter in network.parameters()]
    if mesh is None:
        return [torch.Size(shape).numel() for shape in shapes]
    local = {}
    for shape in set(shapes):
        module = nn.Module()
        module.parameter = nn.Parameter(torch.empty(shape, device="meta"))
        fully_shard(module, mesh=mesh)
        local[shape] = shared.local_part(module.parameter).numel()
    return [local[shape] for shape in shapes]


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _received(whole: Mapping[str, int], shards: int, replicas: int) -> dict[str, int]:
    """What a rank receives by ring algorithms (Patarasuk & Yuan 2009) of tensors that its group of shards gathers or
    reduces: all but its own part. Replicas all-reduce their shards: twice all but their own part."""
    received = {name: whole.get(name, 0) * (shards - 1) // shards for name in ("all_gather", "reduce_scatter")}
    received["all_reduce"] = 2 * whole.get("all_reduce", 0) // shards * (replicas - 1) // replicas
    return {name: size for name, size in received.items() if size}
