"""Densities of the training time t: each turns uniform numbers into times (SD3, arXiv 2403.03206, section 3.1).

They hold no randomness: u comes from the caller, so that a sample's time depends on its place in the plan alone.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Density(ABC):
    """A distribution of t over [0, 1], given through a map of uniform numbers.

    Attributes:
        span: the least and the greatest t.
    """

    span: tuple[float, float] = (0.0, 1.0)

    @abstractmethod
    def sample(self, u: Tensor) -> Tensor:
        """Times t, of u's shape, for u uniform in [0, 1)."""


class Uniform(Density):
    """t = low + (high - low) u: all times of a part of the path, alike.

    Args:
        low, high: ends of the part. SDXL's refiner is of the 200 of 1,000 levels with the least noise, [0, 0.2] (arXiv
            2307.01952, section 2.5).
    """

    def __init__(self, low: float = 0.0, high: float = 1.0):
        if not 0 <= low < high <= 1:
            raise ValueError(f"low and high must be the ends of a part of [0, 1], got {low} and {high}")
        self.span = (low, high)

    def sample(self, u: Tensor) -> Tensor:
        low, high = self.span
        return low + (high - low) * u


class Steps(Density):
    """The discrete steps of DDPM, LDM and Stable Diffusion, all as often: t is a multiple of 1 / steps.

    A network is then told integers in training, as the originals' are. Drawn from all of [0, 1], which is the default
    everywhere, times between the steps are trained too, at the same noise on average.

    Args:
        steps: their number.
        low, high: ends of a part of the path, of which only the steps behind `low`, up to `high`, are drawn; see
            `Uniform`.
    """

    def __init__(self, steps: int = 1000, low: float = 0.0, high: float = 1.0):
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        first, last = round(low * steps), round(high * steps)
        if not 0 <= low <= high <= 1 or first == last:
            raise ValueError(f"low and high must be ends of a part with any of {steps} steps, got {low} and {high}")
        self.steps, self._first, self._last = steps, first, last
        self.span = (first / steps, last / steps)

    def sample(self, u: Tensor) -> Tensor:
        return (torch.floor(u * (self._last - self._first)) + 1 + self._first) / self.steps


class LogitNormal(Density):
    """logit(t) is normal: times between image and noise, which are the hardest, are drawn more often.

    Args:
        mean: of logit(t); positive favours noise.
        std: of logit(t).
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0):
        if std <= 0:
            raise ValueError(f"std must be positive, got {std}")
        self.mean = mean
        self.std = std

    def sample(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))


class Mode(Density):
    """Heavy-tailed: t = 1 - u - scale (cos^2(pi u / 2) - 1 + u), positive density at both ends.

    Args:
        scale: in [-1, 2 / (pi - 2)]; positive favours the middle, negative the ends, 0 is uniform.
    """

    def __init__(self, scale: float = 1.29):
        if not -1 <= scale <= 2 / (math.pi - 2):
            raise ValueError(f"scale must lie in [-1, 2 / (pi - 2) = 1.7519], where t falls with u; got {scale}")
        self.scale = scale

    def sample(self, u: Tensor) -> Tensor:
        return 1 - u - self.scale * (torch.cos(u * (math.pi / 2)) ** 2 - 1 + u)


class CosMap(Density):
    """Gives rectified flow the log-SNR distribution of the cosine path: t = 1 - 1 / (tan(pi u / 2) + 1)."""

    def sample(self, u: Tensor) -> Tensor:
        return 1 - 1 / (torch.tan(u * (math.pi / 2)) + 1)
