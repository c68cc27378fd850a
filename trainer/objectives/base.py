"""An objective turns networks and a batch into losses, in phases. The loop knows phases, and no paper's name."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from data.batch import Batch
from data.buckets import Bucket

Scope = Literal["sample", "slice", "global"]


@dataclass(frozen=True)
class Phase:
    """A part of a training step with its own trainable networks and optimiser.

    Args:
        name: appears in logs and checkpoints.
        trainable: names of the networks that the phase updates; each belongs to at most one phase. Networks of no phase
            are frozen. While a phase runs, the other phases' networks are frozen too, but let gradients through.
    """

    name: str
    trainable: tuple[str, ...]


@dataclass(frozen=True)
class Losses:
    """What an objective gives for one pass.

    Args:
        per_sample: (n,) float32, to be averaged over all samples of the global batch and minimised.
        t: (n,) float32 in [0, 1], the noise level of each sample where there is one: loss by timestep bin.
        logs: (n,) float32 each, averaged in the same way and logged under `<phase>/<name>`.
    """

    per_sample: Tensor
    t: Tensor | None = None
    logs: dict[str, Tensor] = field(default_factory=dict)


class Objective(ABC):
    """Networks and a batch to losses.

    `scope` says what the losses separate by: "sample" passes may be fused or split freely; "slice" passes are served
    one slice at a time (batch statistics, adaptive GAN weights); "global" needs the whole batch gathered.
    """

    phases: tuple[Phase, ...]
    scope: Scope = "sample"

    @abstractmethod
    def losses(self, phase: Phase, networks: Mapping[str, nn.Module], batch: Batch) -> Losses:
        """Losses of one pass of `phase`. Draws every random number from `batch.draws`."""

    def flops(self, networks: Mapping[str, nn.Module], shape: Bucket) -> float:
        """FLOPs that training takes for one sample of a shape, as MFU counts them: those of the formulas, not what is
        computed anew under activation checkpointing. 0 where they are not counted."""
        return 0.0
