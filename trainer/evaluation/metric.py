"""What a metric is: something that sees pictures pass by, and at the end gives numbers."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from models.features import Features
from trainer.distributed import World

Needs = Literal["reference", "captions", "originals"]


@dataclass
class Seen:
    """Pictures of one size that pass by together; whatever the number of ranks, always the same ones.

    Args:
        numbers: of each among all of its set.
        images: (n, 3, H, W) uint8, on this rank's device.
        captions: of each, "" where there is none.
        originals: what they are reconstructions of, likewise; None where they are none.
    """

    numbers: Sequence[int]
    images: Tensor
    captions: Sequence[str]
    originals: Tensor | None = None
    _features: dict[int, Tensor] = field(default_factory=dict)

    def features(self, network: Features) -> Tensor:
        """(n, d) float32; computed once, however many metrics ask."""
        if id(network) not in self._features:
            with torch.no_grad():
                self._features[id(network)] = network(self.images).float()
        return self._features[id(network)]


class Metric(ABC):
    """A number, or a few, of a set of pictures, or of the model.

    Attributes:
        name: of what it gives.
        label: which network it looks through, with which weights; None where there is none.
        stand_in: whether that only stands in for a trained one. Then the label is part of every name.
    """

    name: str
    label: str | None = None
    stand_in: bool = False

    def named(self, values: Mapping[str, float]) -> dict[str, float]:
        """Values under names that tell of stand-ins: nobody takes them for the real thing."""
        return {f"{name}_{self.label}" if self.stand_in else name: value for name, value in values.items()}


class PictureMetric(Metric):
    """Of pictures. Ranks see different ones, and give the result together."""

    needs: frozenset[Needs] = frozenset()

    @abstractmethod
    def place(self, world: World) -> None:
        """Get ready on a rank's device."""

    def check(self, generated: int, reference: int | None) -> str | None:
        """Whether so many pictures can be measured; a warning where that means little.

        Args:
            reference: None where there are only statistics of them.

        Raises:
            ValueError: they cannot.
        """
        return None

    def see_reference(self, seen: Seen) -> None:
        """Pictures of the reference pass by, each once, before all others."""

    def end_reference(self) -> None:
        """All ranks have seen their share of the reference. Collective."""

    @abstractmethod
    def see(self, seen: Seen) -> None:
        """Pictures to be measured pass by."""

    @abstractmethod
    def result(self) -> dict[str, float]:
        """The numbers of what has passed by since the last result, on the main rank; {} on the others. Collective."""


class FeatureMetric(PictureMetric):
    """Of pictures' features, held against those of the reference.

    Args:
        name: of what it gives.
        features: the network.
    """

    needs = frozenset({"reference"})

    def __init__(self, name: str, features: Features) -> None:
        self.name, self.features = name, features
        self.label, self.stand_in = features.label, features.stand_in

    def place(self, world: World) -> None:
        self.features.to(world.device)
        self.world = world


class ModelMetric(Metric):
    """Of a model itself, whatever is drawn."""

    @abstractmethod
    def measure(self, loaded: Any, world: World) -> dict[str, float]:
        """The numbers of a loaded model, whose networks are in place; on every rank. Collective."""


class Gathered:
    """Rows of numbers (n, d) that ranks collect, each with its place among all of them."""

    def __init__(self) -> None:
        self._numbers: list[int] = []
        self._rows: list[Tensor] = []

    def add(self, numbers: Sequence[int], rows: Tensor) -> None:
        self._numbers.extend(numbers)
        self._rows.append(rows.cpu())

    def all(self, world: World) -> Tensor | None:
        """All ranks' rows in order, on the main rank, on the CPU; forgets them. Collective."""
        own = (self._numbers, torch.cat(self._rows) if self._rows else torch.empty(0))
        self._numbers, self._rows = [], []
        parts: list[Any] = [own]
        if dist.is_initialized() and world.size > 1:
            parts = [None] * world.size
            dist.gather_object(own, parts if world.is_main else None)
        if not world.is_main:
            return None
        parts = [part for part in parts if part[0]]
        if not parts:
            return torch.empty(0, 0)
        order = torch.tensor([number for numbers, _ in parts for number in numbers]).argsort()
        return torch.cat([rows for _, rows in parts])[order]


def sum_of_ranks(tensor: Tensor) -> None:
    """Sum a tensor over all ranks, in place. Collective."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
