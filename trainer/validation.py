"""Validation loss that can be compared: the same samples, noise and timesteps, whatever the step, run or world size."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from data.batch import Batch
from trainer.distributed import all_reduce_sum
from trainer.objectives.diffusion import Diffusion, latents

# The "step" of draws that belong to validation.
VALIDATION_STEP = -1


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
    def __call__(self, objective: Diffusion, networks: Mapping[str, nn.Module], device: torch.device) -> dict[str, float]:
        """`val/loss` (mean over samples and times) and `val/loss_by_t/<i>`; collective, the same on every rank."""
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
