"""Random numbers that belong to a sample's place in the plan, not to the process that happens to serve it.

Noise, timesteps, dropout and crops are keyed by (seed, step, lane, slot, purpose). A slice may therefore be served by
any rank, fused with another or split, and sees the same numbers; no two lanes ever share noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.hashing import mix64, text64


@dataclass(frozen=True)
class Draws:
    """The source of randomness of n samples.

    Args:
        seed: the run's seed.
        places: one (step, lane, slot) per sample; slot counts the samples of a slice from 0.
    """

    seed: int
    places: tuple[tuple[int, int, int], ...]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, part: slice) -> "Draws":
        return Draws(self.seed, self.places[part])

    def __add__(self, other: "Draws") -> "Draws":
        assert self.seed == other.seed, "draws of two runs cannot be fused"
        return Draws(self.seed, self.places + other.places)

    @property
    def step(self) -> int:
        """Of the samples, which are all of one step."""
        return self.places[0][0]

    def seeds(self, purpose: str) -> list[int]:
        """One 63-bit generator seed per sample."""
        code = text64(purpose)
        return [mix64(self.seed, *place, code) >> 1 for place in self.places]

    def unit(self, purpose: str) -> list[float]:
        """One uniform number in [0, 1) per sample, straight from the hash: cheap where a scalar each is enough."""
        return [(seed >> 10) * 2.0**-53 for seed in self.seeds(purpose)]

    def normal(self, purpose: str, shape: Sequence[int] = (), device: torch.device | str = "cpu") -> Tensor:
        """Standard normal numbers, (n, *shape) float32, drawn on the device."""
        return self._fill(torch.randn, purpose, shape, device)

    def uniform(self, purpose: str, shape: Sequence[int] = (), device: torch.device | str = "cpu") -> Tensor:
        """Uniform numbers in [0, 1), (n, *shape) float32, drawn on the device."""
        return self._fill(torch.rand, purpose, shape, device)

    def _fill(self, draw, purpose: str, shape: Sequence[int], device: torch.device | str) -> Tensor:
        generator = torch.Generator(device)
        rows = []
        for seed in self.seeds(purpose):
            generator.manual_seed(seed)
            rows.append(draw(tuple(shape), generator=generator, device=device, dtype=torch.float32))
        return torch.stack(rows)


def slice_draws(seed: int, step: int, lane: int, size: int) -> Draws:
    """The draws of the whole slice (step, lane) of `size` samples."""
    return Draws(seed, tuple((step, lane, slot) for slot in range(size)))
