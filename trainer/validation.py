"""Validation loss that can be compared: the same samples, noise and timesteps, whatever the step, run or world size."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from data.batch import Batch
from data.tars import TarSplit
from trainer.callbacks import averaged
from trainer.distributed import all_reduce_sum
from trainer.ema import Ema
from trainer.engines.base import Engine
from trainer.objectives.diffusion import Diffusion, latents


class Validation:
    """The loss of held-out samples at equidistant times (SD3, arXiv 2403.03206, section 5.3: eight of them).

    Args:
        batches: every rank's share of the held-out samples; all ranks must have the same number of batches. Samples
            whose key is "" only fill a batch up, and do not count.
        times: number of times t, the midpoints of as many equal parts of [0, 1].
    """

    def __init__(self, batches: Sequence[Batch], times: int = 8):
        self.batches = batches
        self.times = times

    @torch.no_grad()
    def __call__(self, objective: Diffusion, engine: Engine, ema: Ema, length: str | None) -> dict[str, float]:
        """`val/loss` (mean over samples and times) and `val/loss_by_t/<i>`; collective, the same on every rank.

        Args:
            length: the average whose weights to validate; None takes the weights themselves.
        """
        with averaged(ema, length):
            return self._losses(objective, engine.networks, engine.device)

    def _losses(
        self, objective: Diffusion, networks: Mapping[str, nn.Module], device: torch.device
    ) -> dict[str, float]:
        sums = {f"val/loss_by_t/{i}": 0.0 for i in range(self.times)} | {"count": 0.0}
        times = objective.process.validation_times(self.times).to(device)
        for batch in self.batches:
            batch = batch.to(device)
            counts = torch.tensor([key != "" for key in batch.keys], device=device)
            x0 = latents(networks["first_stage"], batch)
            conditions = objective.conditions(networks["conditioner"], batch, dropout=False)
            for i, t in enumerate(times):
                losses = objective.losses_at(networks["denoiser"], x0, conditions, batch, t.expand(len(batch)))
                sums[f"val/loss_by_t/{i}"] += losses.per_sample[counts].double().sum().item()
            sums["count"] += float(counts.sum())
        sums = all_reduce_sum(sums, device)
        count = sums.pop("count")
        by_time = {name: total / count for name, total in sums.items()}
        return {"val/loss": math.fsum(by_time.values()) / self.times} | by_time


# Validation is the same for every run on the same data: its plan has a seed of its own.
_SEED = 0


def validation_batches(split: TarSplit, samples: int, size: int, rank: int, world: int) -> list[Batch]:
    """This rank's share of the first `samples` validation samples, as batches of one bucket each.

    Which samples share a batch, and the noise of each, do not depend on the world size. A rank with less to do repeats
    a batch that does not count.

    Args:
        samples: how many at most; fewer where the split has fewer.
        size: samples in a batch.
    """
    totals = split.totals()
    size = min(size, int(max(totals)))
    # No more slices than one epoch has, so that no sample counts twice.
    slices = max(1, min(samples // size, int(sum(total // size for total in totals))))
    plan = split.plan(slices, size, _SEED)
    mine = [*range(rank, slices, world)]
    batches = []
    for lane in mine or [0]:
        loader = split.loader(plan, range(lane, lane + 1), crop="center", flip=False, workers=0)
        batches += loader.step(0)
    spare = [replace(batches[0], keys=[""] * len(batches[0]))]
    if not mine:
        batches = spare
    return batches + spare * (math.ceil(slices / world) - len(batches))
