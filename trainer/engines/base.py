"""What the loop, checkpoints and EMA ask of an engine: where parameters live and how a step is taken."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import prod
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from trainer.engines.optimizer import AdamW
from trainer.objectives.base import Phase


@dataclass(frozen=True)
class Box:
    """A rectangular part of a whole tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def boxes_of_range(shape: Sequence[int], start: int, stop: int) -> tuple[Box, ...]:
    """The elements start..stop of a row-major tensor as the fewest boxes, in order: at most 2 * ndim - 1."""
    if start >= stop:
        return ()
    if not shape:
        return (Box((), ()),)
    row = prod(shape[1:])
    first, last = start // row, stop // row
    if start % row and first == (stop - 1) // row:  # within one row, from its middle on
        return _in_row(first, boxes_of_range(shape[1:], start - first * row, stop - first * row))
    boxes: tuple[Box, ...] = ()
    if start % row:
        boxes += _in_row(first, boxes_of_range(shape[1:], start % row, row))
        first += 1
    if first < last:
        boxes += (Box((first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:])),)
    if stop % row:
        boxes += _in_row(last, boxes_of_range(shape[1:], 0, stop % row))
    return boxes


def _in_row(row: int, boxes: Iterable[Box]) -> tuple[Box, ...]:
    return tuple(Box((row, *box.offsets), (1, *box.sizes)) for box in boxes)


@dataclass(frozen=True)
class Shard:
    """What this rank holds of one tensor.

    Args:
        name: `<network>.<fully qualified parameter name>`.
        shape: the whole tensor's shape.
        boxes: the parts of it held here; none where this rank holds nothing of it. With replicas (HSDP, or small
            tensors under ZeRO) the same box is held by several ranks.
        tensor: float32, 1-D view of the live state: the boxes one after the other, each row-major. Writing to it
            changes the run, once `Engine.written` has been called.
    """

    name: str
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    tensor: Tensor


@dataclass(frozen=True)
class StepResult:
    """What a phase's optimiser step did.

    Args:
        grad_norm: global 2-norm of the phase's gradient before clipping.
        skipped: a non-finite gradient: no parameter or moment has changed.
    """

    grad_norm: float
    skipped: bool


@runtime_checkable
class EngineConfig(Protocol):
    """What `conf/engine/*.yaml` describe."""

    def check(self, ranks: int) -> None:
        """Whether the engine can run on so many ranks.

        Raises:
            ValueError: it cannot; names the key at fault.
        """

    def build(
        self,
        networks: Mapping[str, nn.Module],
        phases: Sequence[Phase],
        optimizers: Mapping[str, AdamW],
        seed: int,
        device: torch.device,
    ) -> "Engine":
        """Take over the networks: shard, fill and place them. Every rank calls it, with the same arguments.

        Args:
            networks: by name. Networks of phases are best on the meta device: each is filled one whole parameter at a
                time (models/initialization.py), so that no rank ever holds a whole network that the engine shards. A
                network with weights already (a loaded encoder) keeps them. Frozen ones go to the compute type.
            phases: own the trainable networks.
            optimizers: one per phase, by the phase's name.
            seed: the run's seed.
            device: where this rank computes.
        """


class Engine(Protocol):
    """Owns the networks of a run. `networks` are called like plain modules by the objective: trainable ones only by
    `network(...)`, since that is where their weights are gathered. They take and give float32."""

    device: torch.device

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """All networks of the run, by name."""

    def backward(self, phase: Phase, loss: Tensor) -> None:
        """Accumulate a pass's gradient for the phase's networks. Gradients of all ranks and passes are *summed*: the
        loop divides by the global batch, so a step follows the mean over all samples whatever the layout."""

    def accumulating(self, phase: Phase, last: bool) -> AbstractContextManager[None]:
        """Around the forward and backward of one pass; communication may wait for the last pass of the step. Inside,
        the other phases' networks are frozen."""

    def step(self, phase: Phase, lr: float) -> StepResult:
        """Clip, update the phase's networks unless the gradient is not finite, and clear gradients."""

    def discard(self, phase: Phase) -> None:
        """Drop the phase's accumulated gradients (rehearsal passes, non-finite losses), after a `last` pass."""

    def shards(self, kind: str) -> Iterator[Shard]:
        """This rank's part of the trainable networks' state, in a fixed order: `kind` is "weight" (fp32 masters) or an
        optimiser moment ("exp_avg", "exp_avg_sq")."""

    def kinds(self) -> Sequence[str]:
        """All kinds of `shards`, "weight" first."""

    def written(self) -> None:
        """Tell the engine that shards were written, so that compute-precision copies are refreshed."""

    def steps_taken(self) -> dict[str, int]:
        """Optimiser updates so far, by phase name (Adam's bias correction)."""

    def set_steps_taken(self, steps: Mapping[str, int]) -> None:
        """Set what `steps_taken` gives, on resume."""

    def memory(self) -> dict[str, int]:
        """Bytes this rank holds, by kind: parameters, gradients, optimizer, frozen."""


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages under the tensors, shared ones counted once."""
    storages = {(t.device, s.data_ptr()): s.nbytes() for t in tensors if (s := t.untyped_storage()).nbytes()}
    return sum(storages.values())
