"""An objective turns networks and a batch into losses, in phases. The loop knows phases, and no paper's name."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from data.batch import Batch
from data.buckets import Bucket
from trainer.sampling import Picture

Scope = Literal["sample", "slice", "global"]


@dataclass(frozen=True)
class Phase:
    """A part of a training step with its own trainable networks and optimiser.

    Args:
        name: appears in logs and checkpoints.
        trainable: names of the networks that the phase updates; each belongs to at most one phase. Networks of no phase
            are frozen. While a phase runs, the other phases' networks are frozen too, but let gradients through.
        start: the first step, counted from 0, that the phase takes part in.
    """

    name: str
    trainable: tuple[str, ...]
    start: int = 0


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
    """Networks and a batch to losses. What else an objective may do: `Validates`, `Summarizes`, `Compares`,
    `DrawsPictures`, `DropsCaptions`, `Publishes`.

    Attributes:
        networks: names of all networks that it uses, trained and frozen; those of the configuration are built for it.
        phases: of a training step, in this order.
        scope: what the losses separate by. "sample": passes may be fused or split freely. "slice": a pass is a slice
            (batch statistics, adaptive GAN weights). "global": a rank's whole share of the batch is one pass, in which
            `losses` gathers from the other ranks what it compares (contrastive losses).
        reads_encodings: whether it takes from a batch's fields what was encoded before (data/encoded.py).
    """

    networks: tuple[str, ...]
    phases: tuple[Phase, ...]
    scope: Scope = "sample"
    reads_encodings: bool = False

    @abstractmethod
    def losses(self, phase: Phase, networks: Mapping[str, nn.Module], batch: Batch) -> Losses:
        """Losses of one pass of `phase`. Draws every random number from `batch.draws`."""

    def flops(self, networks: Mapping[str, nn.Module], shape: Bucket) -> float:
        """FLOPs that training takes for one sample of a shape, as MFU counts them: those of the formulas, not what is
        computed anew under activation checkpointing. 0 where they are not counted."""
        return 0.0


@runtime_checkable
class Validates(Protocol):
    """An objective with a loss of held-out samples by which runs, and steps of one run, can be compared."""

    def validation_losses(self, networks: Mapping[str, nn.Module], batch: Batch) -> Mapping[str, Tensor]:
        """Values of each sample, (n,) float32 by name, whatever the others of its batch: black pictures may fill it up.

        Their averages are logged as `val/<name>`; the one that stands for all is "loss". Called without gradients;
        random numbers come from `batch.draws`, and nothing else (dropout) is random.
        """


@runtime_checkable
class Summarizes(Protocol):
    """An objective that validates, and has numbers of all held-out samples together that are no averages of the
    samples' own: how much of a codebook they use."""

    def summary(self, averages: Mapping[str, Tensor]) -> Mapping[str, float]:
        """Numbers to be logged as `val/<name>`.

        Args:
            averages: over all samples, of those values of `validation_losses` that are vectors, (n, k) by name; they
                are not logged themselves.
        """


@runtime_checkable
class Compares(Protocol):
    """An objective that validates by comparing all held-out samples with each other."""

    def compare(self, rows: Mapping[str, Tensor]) -> Mapping[str, float]:
        """Numbers to be logged as `val/<name>`, "loss" among them; in any order of the samples the same.

        Args:
            rows: of all samples, those values of `validation_losses` that are vectors, (n, k) by name; they are not
                logged themselves.
        """


@runtime_checkable
class DrawsPictures(Protocol):
    """An objective whose networks make pictures for a run's sample grids: of prompts, or of pictures."""

    draws_prompts: bool
    """Whether it draws what prompts ask for, or else needs pictures to draw anew."""

    def draw(
        self, networks: Mapping[str, nn.Module], pictures: Sequence[Picture], device: torch.device
    ) -> Sequence[Tensor]:
        """One pass: pictures of one size, as uint8 (3, H, W) on the CPU. Called without gradients."""


@runtime_checkable
class DropsCaptions(Protocol):
    """An objective with settings for each of the conditioner's encoders, and other parts."""

    def check_encoders(self, encoders: int, others: int = 0) -> None:
        """Refuse a number of encoders and of other parts, before there are any.

        Raises:
            ValueError: a setting is for another number of them.
        """


@dataclass(frozen=True)
class Published:
    """A network that other runs use.

    Args:
        network: its name in the run.
        folder: in the run's folder, where it is written: as a diffusers component, or as it writes itself.
        config: what was measured of it, added to a component's configuration.
    """

    network: str
    folder: str
    config: dict[str, float] = field(default_factory=dict)


@runtime_checkable
class Publishes(Protocol):
    """An objective whose network other runs use, once it has been trained."""

    def publish(self, networks: Mapping[str, nn.Module], batches: Sequence[Batch]) -> Published:
        """What is to be known of the network. Collective; called without gradients.

        Args:
            batches: this rank's share of the run's first batch.
        """
