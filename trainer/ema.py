"""Averages of the weights over training, sharded like the weights.

Two families: exponential averages of constant decay, and the power-function averages of Karras et al. 2024 (EDM2,
arXiv 2312.02696, section 3), from whose snapshots an average of any other length can be put together afterwards.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from trainer.checkpoint import CheckpointError, load_weights, read_record
from trainer.checkpoint.layout import saved_name
from trainer.engines.base import Engine, Shard


@runtime_checkable
class Length(Protocol):
    """How long an average remembers."""

    def retention(self, step: int, every: int, updates: int) -> float:
        """What the average so far counts for in an update, in [0, 1]; the present weights count for the rest.

        Args:
            step: steps taken, this one included; a multiple of `every`.
            every: steps between updates.
            updates: updates taken, this one included.
        """

    def describe(self) -> dict[str, Any]:
        """Its parameters, for the checkpoint's record."""


@dataclass(frozen=True)
class ConstantDecay:
    """Exponential average; early on it remembers less, min(decay, (1 + n) / (10 + n)) at the n-th update, so that the
    first weights do not linger (latent diffusion, arXiv 2112.10752).

    Args:
        decay: retention per update (not per step).
        warmup: False retains `decay` from the start.
    """

    decay: float
    warmup: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"an EMA's decay must be in [0, 1), not {self.decay}")

    def retention(self, step: int, every: int, updates: int) -> float:
        """`decay`, or less during the warm-up (see `Length.retention`)."""
        return min(self.decay, (1 + updates) / (10 + updates)) if self.warmup else self.decay

    def describe(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return asdict(self)


@dataclass(frozen=True)
class PowerFunction:
    """The weights at step tau count in proportion to tau**gamma, so the average's length grows with training
    (arXiv 2312.02696, eqs. 2 and 3).

    Args:
        sigma_rel: standard deviation of the profile as a share of training so far, in (0, 0.288]: 0.05 and 0.10 are the
            paper's tracked pair.
    """

    sigma_rel: float

    def __post_init__(self) -> None:
        if not 0 < self.sigma_rel <= 12**-0.5:
            raise ValueError(f"an EMA's sigma_rel must be in (0, {12**-0.5:.3f}], not {self.sigma_rel}")

    @property
    def gamma(self) -> float:
        """The exponent that has this width."""
        return gamma_of(self.sigma_rel)

    def retention(self, step: int, every: int, updates: int) -> float:
        """(1 - every / step)^(gamma + 1): eq. 3's factors of the steps since the last update, multiplied (see
        `Length.retention`)."""
        # Steps since the last update share the present weights, so the factors of the steps multiply to this.
        return (1 - every / step) ** (self.gamma + 1)

    def describe(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return asdict(self)


class Ema:
    """Several averages of all trainable networks, one float32 tensor per shard and length.

    Args:
        lengths: by name; the name is part of the checkpoint's tensor names, `ema.<name>/<network>.<parameter>`.
        every: steps between updates.
    """

    def __init__(self, lengths: dict[str, Length], every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"ema.every is {every}; it must be at least 1")
        for name in lengths:
            if not re.fullmatch(r"[\w+-]+", name):
                raise ValueError(
                    f"ema.lengths has {name!r}: a name takes letters, digits and any of _ + -, and no dot, which on the"
                    " command line parts keys"
                )
        self.lengths = dict(lengths)
        self.every = every
        self._updates = 0
        self._averages: dict[str, list[Tensor]] = {}
        self._engine: Engine | None = None
        self._swapped: str | None = None

    def attach(self, engine: Engine) -> None:
        """Begin with the engine's present weights as every average."""
        self._engine = engine
        self._averages = {
            name: [shard.tensor.detach().clone() for shard in engine.shards("weight")] for name in self.lengths
        }
        self._updates = 0

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` steps, where an update is due."""
        assert self._swapped is None, f"the weights are swapped for their average {self._swapped}"
        if step % self.every or not self.lengths:
            return
        self._updates += 1
        weights = [shard.tensor for shard in self._weights()]
        for name, length in self.lengths.items():
            torch._foreach_lerp_(self._averages[name], weights, 1 - length.retention(step, self.every, self._updates))

    def shards(self) -> Iterator[Shard]:
        """Every average under its checkpoint name."""
        assert self._swapped is None, f"the weights are swapped for their average {self._swapped}"
        for name, averages in self._averages.items():
            for shard, average in zip(self._weights(), averages, strict=True):
                yield replace(shard, name=saved_name(f"ema.{name}", shard.name), tensor=average)

    @contextmanager
    def swapped(self, length: str) -> Iterator[None]:
        """The engine holds the average within, and bit for bit its own weights afterwards. Takes no further memory than
        a copy of the largest shard."""
        if length not in self.lengths:
            raise ValueError(f"no EMA length {length!r}: this run keeps {', '.join(self.lengths) or 'none'}")
        assert self._swapped is None, f"the weights are already swapped for their average {self._swapped}"
        self._swap(length)
        self._swapped = length
        try:
            yield
        finally:
            self._swap(length)
            self._swapped = None

    def state(self) -> dict[str, Any]:
        """What is not a tensor, for the checkpoint's record."""
        lengths = {name: length.describe() for name, length in self.lengths.items()}
        return {"updates": self._updates, "every": self.every, "lengths": lengths}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` gave.

        Raises:
            ValueError: a length of that name had other parameters.
        """
        for name, length in self.lengths.items():
            saved = state.get("lengths", {}).get(name)
            if saved != length.describe():
                raise ValueError(f"ema.lengths.{name} is {length.describe()}, in the checkpoint {saved}; rename it")
        self._updates = int(state.get("updates", 0))

    def _weights(self) -> Iterator[Shard]:
        assert self._engine is not None, "attach the averages to an engine first"
        return self._engine.shards("weight")

    @torch.no_grad()
    def _swap(self, length: str) -> None:
        assert self._engine is not None
        for shard, average in zip(self._weights(), self._averages[length], strict=True):
            weights = shard.tensor.clone()
            shard.tensor.copy_(average)
            average.copy_(weights)
        self._engine.written()


def gamma_of(sigma_rel: float) -> float:
    """The exponent gamma >= 0 of the power function of relative width sigma_rel, which is
    sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3)) (arXiv 2312.02696, section 3.1)."""
    inverse = sigma_rel**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])  # (gamma + 2)^2 (gamma + 3) = (gamma + 1) / sigma_rel^2
    return max(0.0, float(max(root.real for root in roots if abs(root.imag) < 1e-6 * (1 + abs(root)))))


def reconstruction_weights(snapshots: Sequence[tuple[float, float]], target: tuple[float, float]) -> np.ndarray:
    """How to add up stored averages to come closest to another one (arXiv 2312.02696, section 3.2).

    Averages are profiles over training, p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1) on [0, t]; the weights minimise
    the square of the difference of the profiles, integrated over tau.

    Args:
        snapshots: (step t, gamma) of each stored average.
        target: (step t, gamma) of the one wanted.

    Returns:
        (len(snapshots),) float64.
    """
    steps, gammas = np.asarray(snapshots, np.float64).T
    gram = _profile_product(steps[:, None], gammas[:, None], steps[None, :], gammas[None, :])
    right = _profile_product(steps, gammas, *np.asarray(target, np.float64))
    # Profiles of late steps are nearly parallel: the smallest-norm solution stays bounded where an exact one does not.
    return np.linalg.lstsq(gram, right, rcond=1e-12)[0]


def _profile_product(t_a: np.ndarray, a: np.ndarray, t_b: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Integral of the product of two profiles of steps t_a, t_b and exponents a, b:
    (a + 1) (b + 1) / (a + b + 1) * min(t_a, t_b)^(a + b + 1) / (t_a^(a + 1) t_b^(b + 1)), by logarithms, as the powers
    overflow."""
    logarithm = (a + b + 1) * np.log(np.minimum(t_a, t_b)) - (a + 1) * np.log(t_a) - (b + 1) * np.log(t_b)
    return (a + 1) * (b + 1) / (a + b + 1) * np.exp(logarithm)


def reconstruct(
    checkpoints: Sequence[Path], network: str, sigma_rel: float, step: int | None = None
) -> dict[str, Tensor]:
    """The power-function average of any length, from those that checkpoints hold, on one process.

    Args:
        checkpoints: directories with averages of `PowerFunction` lengths; all their lengths are used.
        network: the network's name in the run.
        sigma_rel: the length wanted.
        step: the average as of this step; by default the last of the checkpoints.

    Returns:
        The network's parameters by name, float32.

    Raises:
        CheckpointError: a checkpoint is damaged, or none holds such an average up to `step`.
    """
    stored: list[tuple[Path, str]] = []
    profiles: list[tuple[float, float]] = []
    for path in checkpoints:
        record = read_record(path)
        every = record.ema.get("every", 1)
        at = record.step - record.step % every  # the last update
        if at == 0 or (step is not None and at > step):
            continue
        for name, parameters in record.ema.get("lengths", {}).items():
            if "sigma_rel" in parameters:
                stored.append((path, name))
                profiles.append((at, gamma_of(parameters["sigma_rel"])))
    if not stored:
        raise CheckpointError(f"none of the {len(checkpoints)} checkpoints holds a power-function average to use")
    until = step if step is not None else max(at for at, _ in profiles)
    weights = reconstruction_weights(profiles, (until, gamma_of(sigma_rel)))
    total: dict[str, Tensor] = {}
    for (path, name), weight in zip(stored, weights, strict=True):
        for parameter, average in load_weights(path, network, ema=name).items():
            share = average.double().mul_(float(weight))
            total[parameter] = total[parameter].add_(share) if parameter in total else share
    return {parameter: value.float() for parameter, value in total.items()}
