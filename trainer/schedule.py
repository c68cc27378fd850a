"""Learning rate over a run."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then constant or a decay to `final` times the peak over the rest of the run.

    Args:
        lr: peak learning rate.
        warmup: steps of linear warm-up from 0; step 0 already takes lr / warmup.
        decay: shape after the warm-up.
        final: share of the peak that is left at the last step.
        decay_from: share of the run at which the decay starts (0.8: the last fifth, "warm-up, stable, decay").
    """

    lr: float = 1e-4
    warmup: int = 1000
    decay: Literal["constant", "linear", "cosine"] = "constant"
    final: float = 0.0
    decay_from: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.lr < math.inf:
            raise ValueError(f"lr={self.lr}: it must not be negative")
        if self.warmup < 0:
            raise ValueError(f"warmup={self.warmup}: it must not be negative")
        for name in ("final", "decay_from"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: a share, from 0 to 1")

    def at(self, step: int, steps: int) -> float:
        """Learning rate of step `step` (from 0) in a run of `steps`."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        start = max(self.warmup, int(self.decay_from * steps))
        if self.decay == "constant" or step < start:
            return self.lr * rise
        done = (step - start + 1) / max(1, steps - start)
        fall = 1 - done if self.decay == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return self.lr * (self.final + (1 - self.final) * fall)
