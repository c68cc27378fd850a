"""An objective whose loss is not finite at chosen steps."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from data.batch import Batch
from trainer.objectives.base import Losses, Phase
from trainer.objectives.diffusion import Diffusion


class NotFiniteAt(Diffusion):
    """Diffusion with a loss of nan at some steps, on lane 0 only: other ranks must learn of it."""

    def __init__(self, steps: list[int], **diffusion: Any):
        super().__init__(**diffusion)
        self.steps = steps

    def losses(self, phase: Phase, networks: Mapping[str, nn.Module], batch: Batch) -> Losses:
        losses = super().losses(phase, networks, batch)
        step, lane, _ = batch.draws.places[0]
        return (
            replace(losses, per_sample=losses.per_sample * float("nan")) if step in self.steps and lane == 0 else losses
        )
