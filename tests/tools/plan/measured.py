"""What a run really holds: bytes of its states on two gloo ranks, and of what passes allocate by torch's profiler."""

from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from conf.compose import compose
from conf.schema import build
from data.plan import lanes_of, split_batch
from tests.trainer.ranks import ranks
from trainer.distributed import joined
from trainer.engines.base import storage_bytes
from trainer.networks import networks_on_meta
from trainer.passes import Passes
from trainer.phases import build_by_phase
from trainer.rehearsal import blank

# An MMDiT of 8 M parameters on latents, four slices of two samples.
SMALL = [
    *("conditioner=none", "first_stage=kl_tiny", "buckets.size=64", "batch=8", "lanes=4", "ema=power"),
    *("model.sample_size=16", "model.patch_size=1", "model.in_channels=4", "model.num_layers=4"),
    *("model.attention_head_dim=64", "model.num_attention_heads=4", "model.pos_embed_max_size=16"),
    *("model.joint_attention_dim=64", "model.pooled_projection_dim=64"),
]


def measure(*overrides: str) -> dict[str, int]:
    """What rank 0 of two holds of the run, in bytes: "parameters", "gradients", "optimizer", "frozen" and "averages";
    and "momentary", the most that a pass allocates at once beyond what was there."""
    return ranks(2).run(_measure, [*SMALL, *overrides])[0]


class _Run:
    """The parts of a run that hold and take memory, without its data."""

    def __init__(self, config: Any, device: torch.device):
        self.config = config
        self.objective = objective = build(config.objective)
        lanes, slice_size = split_batch(config.batch, config.lanes)
        slices = len(lanes_of(0, dist.get_world_size(), lanes))
        arrange = Passes(config.pass_size, slice_size, slices, 1, objective.scope)
        networks: dict[str, Any] = networks_on_meta(config, objective) | {"conditioner": build(config.conditioner)}
        optimizers = build_by_phase(config.optimizer, objective.phases, "optimizer")
        self.engine = build(config.engine).build(networks, objective.phases, optimizers, 0, device)
        self.ema = build(config.ema)
        self.ema.attach(self.engine)
        (bucket,) = build(config.buckets).shapes
        self.passes = arrange([blank(bucket, slice_size, lane).to(device) for lane in range(slices)])
        (self.phase,) = objective.phases

    def take_pass(self, number: int) -> None:
        with self.engine.accumulating(self.phase, last=number == len(self.passes) - 1):
            losses = self.objective.losses(self.phase, self.engine.networks, self.passes[number])
            self.engine.backward(self.phase, losses.per_sample.sum() / self.config.batch)

    def take_step(self) -> int:
        """Returns the most bytes of gradients that there were."""
        gradients = 0
        for number in range(len(self.passes)):
            self.take_pass(number)
            gradients = max(gradients, self.engine.memory()["gradients"])
        self.engine.step(self.phase, 1e-4)
        return gradients


def _measure(overrides: list[str]) -> dict[str, int]:
    run = _Run(compose("train", overrides), torch.device("cpu"))
    gradients = run.take_step()
    held = run.engine.memory() | {"gradients": gradients}
    held["averages"] = storage_bytes(shard.tensor for shard in run.ema.shards())
    # Gradients and buffers are in place after the first pass.
    run.take_pass(0)
    momentary = []
    for _ in range(3):  # gloo's threads now and then hold on to a buffer for longer
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            run.take_pass(1)
        momentary.append(_most_allocated(profiler))
    return held | {"momentary": min(momentary)}


def _most_allocated(profiler: profile) -> int:
    """The highest sum of what the CPU's allocator was asked for, less what it was given back."""
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    changes = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = most = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        total += change.nbytes()
        most = max(most, total)
    return most


def peak_on_gpu(*overrides: str) -> int:
    """Most bytes that torch has allocated of this GPU in two steps of the run, on one rank; in this process."""
    config = compose("train", [*SMALL, *overrides])
    with joined("cuda") as world:
        torch.cuda.reset_peak_memory_stats()
        run = _Run(config, world.device)
        for _ in range(2):
            run.take_step()
        return torch.cuda.max_memory_allocated()
