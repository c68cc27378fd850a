"""Objectives that go wrong at chosen steps, on one lane only: other ranks must learn of it."""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from data.batch import Batch
from trainer.objectives.base import Losses, Phase
from trainer.objectives.diffusion import Diffusion


class Faulty(Diffusion):
    """Diffusion with a fault at some steps.

    Args:
        steps: the faulty ones.
        lane: the faulty one.
    """

    def __init__(self, steps: list[int], lane: int = 0, **diffusion: Any):
        super().__init__(**diffusion)
        self.steps, self.lane = steps, lane

    def losses(self, phase: Phase, networks: Mapping[str, nn.Module], batch: Batch) -> Losses:
        losses = super().losses(phase, networks, batch)
        step, lane, _ = batch.draws.places[0]
        return self.fault(losses) if step in self.steps and lane == self.lane else losses

    def fault(self, losses: Losses) -> Losses:
        raise NotImplementedError


class NotFiniteAt(Faulty):
    """A loss of nan."""

    def fault(self, losses: Losses) -> Losses:
        return replace(losses, per_sample=losses.per_sample * float("nan"))


class StuckAt(Faulty):
    """A pass that hardly ends."""

    def fault(self, losses: Losses) -> Losses:
        time.sleep(300)
        return losses


class HangsOnceAt(Faulty):
    """A rank that goes no further while others wait for it, the first time only: the file `marker` remembers."""

    def __init__(self, steps: list[int], marker: str, **faulty: Any):
        super().__init__(steps, **faulty)
        self.marker = Path(marker)

    def losses(self, phase: Phase, networks: Mapping[str, nn.Module], batch: Batch) -> Losses:
        step, lane, _ = batch.draws.places[0]
        if step in self.steps and lane == self.lane and not self.marker.exists():
            self.marker.touch()
            time.sleep(1e6)
        return Diffusion.losses(self, phase, networks, batch)


class FailsAt(Faulty):
    """An error."""

    def fault(self, losses: Losses) -> Losses:
        raise RuntimeError("failed on purpose")


class FailsOnceAt(Faulty):
    """An error, the first time only: the file `marker` remembers."""

    def __init__(self, steps: list[int], marker: str, **diffusion: Any):
        super().__init__(steps, **diffusion)
        self.marker = Path(marker)

    def fault(self, losses: Losses) -> Losses:
        if not self.marker.exists():
            self.marker.touch()
            raise RuntimeError("failed on purpose")
        return losses


class Slow(Diffusion):
    """A pass that takes a while, so that there is time to disturb the run.

    Args:
        seconds: of a pass.
        lane: whose passes alone take them; None: all do.
    """

    def __init__(self, seconds: float, lane: int | None = None, **diffusion: Any):
        super().__init__(**diffusion)
        self.seconds, self.lane = seconds, lane

    def losses(self, phase: Phase, networks: Mapping[str, nn.Module], batch: Batch) -> Losses:
        if self.lane is None or batch.draws.places[0][1] == self.lane:
            time.sleep(self.seconds)
        return super().losses(phase, networks, batch)


class HeldAt(Diffusion):
    """Takes no further step than the file `limit` says, so that a run is disturbed where the test wants it.

    Args:
        limit: the file, with a number of steps.
    """

    def __init__(self, limit: str, **diffusion: Any):
        super().__init__(**diffusion)
        self.limit = Path(limit)

    def losses(self, phase: Phase, networks: Mapping[str, nn.Module], batch: Batch) -> Losses:
        while batch.draws.places[0][0] >= int(self.limit.read_text()):
            time.sleep(0.01)
        return super().losses(phase, networks, batch)
