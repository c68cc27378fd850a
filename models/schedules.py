"""Noising paths: how much of the image and how much of the noise x_t = alpha_t x_0 + sigma_t eps holds at time t.

Time runs from 0 (image) to 1 (noise). A path is fixed by alpha_t and sigma_t; its log signal-to-noise ratio
lambda_t = log(alpha_t^2 / sigma_t^2) falls strictly from +inf and can be inverted, which lets any two paths be compared
at equal noise. Every function takes tensors of any shape and any floating dtype.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor


class NoisePath(ABC):
    """x_t = alpha_t x_0 + sigma_t eps, t in [0, 1].

    Attributes:
        steps: of a discrete process, the number of its steps; None of a continuous one.
    """

    steps: int | None = None

    @abstractmethod
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The coefficients (alpha_t, sigma_t), each of t's shape."""

    @abstractmethod
    def log_snr(self, t: Tensor) -> Tensor:
        """lambda_t = log(alpha_t^2 / sigma_t^2)."""

    @abstractmethod
    def time(self, log_snr: Tensor) -> Tensor:
        """The t at which `log_snr(t)` is the given value; clamped to the path's ends where it is never reached."""

    def network_time(self, t: Tensor) -> Tensor:
        """What a network is told of t, in diffusers' units: 0 (image) to 1000 (noise)."""
        return 1000 * t

    def shift(self, t: Tensor, factor: float) -> Tensor:
        """The time at which `factor` times as much noise stands against the signal: lambda falls by 2 log(factor).

        With factor = sqrt(m/n) this carries a time from n to m pixels (SD3, arXiv 2403.03206, eq. 23).
        """
        return t if factor == 1 else self.time(self.log_snr(t) - 2 * math.log(factor))


class RectifiedFlow(NoisePath):
    """The straight line from image to noise: alpha = 1 - t, sigma = t (Liu et al., arXiv 2209.03003)."""

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    def log_snr(self, t: Tensor) -> Tensor:
        return 2 * (torch.log1p(-t) - torch.log(t))

    def time(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-log_snr / 2)

    def shift(self, t: Tensor, factor: float) -> Tensor:
        # The general definition in closed form, finite at both ends.
        return factor * t / (1 + (factor - 1) * t)


class Cosine(NoisePath):
    """A quarter of the unit circle: alpha = cos(pi t / 2), sigma = sin(pi t / 2) (arXiv 2102.09672, without offset)."""

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        angle = t * (math.pi / 2)
        return torch.cos(angle), torch.sin(angle)

    def log_snr(self, t: Tensor) -> Tensor:
        return -2 * torch.log(torch.tan(t * (math.pi / 2)))

    def time(self, log_snr: Tensor) -> Tensor:
        return torch.atan(torch.exp(-log_snr / 2)) * (2 / math.pi)


class Discrete(NoisePath):
    """A path of discrete steps, each of which replaces a share beta_i of the signal's power by noise.

    The discrete step i of `steps` stands at t = (i + 1) / steps, and the network is told i. Between steps
    log(alpha^2) is interpolated linearly; t = 0 is the clean image. The path ends before pure noise: alpha_1 > 0.

    Args:
        betas: (steps,) float64.
    """

    steps: int

    def __init__(self, betas: Tensor):
        self.steps = len(betas)
        # log(alpha^2) at t = 0, 1/steps, ..., 1: float64, as 1 - alpha^2 cancels near t = 0.
        self._log_alpha2 = torch.cat([torch.zeros(1, dtype=torch.float64), torch.log1p(-betas).cumsum(0)])

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha2 = self._interpolate(t)
        return torch.exp(log_alpha2 / 2).to(t.dtype), torch.sqrt(-torch.expm1(log_alpha2)).to(t.dtype)

    def log_snr(self, t: Tensor) -> Tensor:
        log_alpha2 = self._interpolate(t)
        return (log_alpha2 - torch.log(-torch.expm1(log_alpha2))).to(t.dtype)

    def time(self, log_snr: Tensor) -> Tensor:
        wanted = -torch.nn.functional.softplus(-log_snr.double())  # log(alpha^2) = log sigmoid(lambda)
        table = self._log_alpha2.to(wanted.device)
        right = torch.searchsorted(-table, -wanted).clamp(1, self.steps)
        low, high = table[right], table[right - 1]
        position = right - ((wanted - low) / (high - low)).clamp(0, 1)
        return (position / self.steps).to(log_snr.dtype)

    def network_time(self, t: Tensor) -> Tensor:
        return self.steps * t - 1

    def _interpolate(self, t: Tensor) -> Tensor:
        table = self._log_alpha2.to(t.device)
        position = t.double() * self.steps
        left = position.floor().clamp(0, self.steps - 1).long()
        return torch.lerp(table[left], table[left + 1], position - left)


class ScaledLinear(Discrete):
    """LDM's "linear" schedule: the diffusion rates are beta_i = linspace(sqrt(beta_start), sqrt(beta_end))^2.

    Args:
        beta_start, beta_end: first and last rate; 0.00085 and 0.012 in LDM's text-to-image model and Stable Diffusion.
        steps: number of discrete steps.
    """

    def __init__(self, beta_start: float = 0.00085, beta_end: float = 0.012, steps: int = 1000):
        _check_rates(beta_start, beta_end)
        super().__init__(torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64) ** 2)


class Linear(Discrete):
    """DDPM's linear schedule (arXiv 2006.11239): beta_i = linspace(beta_start, beta_end).

    Args:
        beta_start, beta_end: first and last rate.
        steps: number of discrete steps.
    """

    def __init__(self, beta_start: float = 0.0001, beta_end: float = 0.02, steps: int = 1000):
        _check_rates(beta_start, beta_end)
        super().__init__(torch.linspace(beta_start, beta_end, steps, dtype=torch.float64))


class SquaredCosine(Discrete):
    """The cosine schedule in steps, with its offset and its cap (Nichol & Dhariwal, arXiv 2102.09672, eq. 17): alpha^2
    is cos(pi / 2 (t + 0.008) / 1.008)^2, and no rate is above 0.999.

    Args:
        steps: number of discrete steps.
    """

    def __init__(self, steps: int = 1000):
        t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        kept = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        super().__init__((1 - kept[1:] / kept[:-1]).clamp(max=0.999))


def _check_rates(beta_start: float, beta_end: float) -> None:
    if not 0 < beta_start <= beta_end < 1:
        raise ValueError(f"betas must satisfy 0 < beta_start <= beta_end < 1, got {beta_start} and {beta_end}")


class ZeroTerminalSNR(NoisePath):
    """Another path, rescaled to end in pure noise (Lin et al., arXiv 2305.08891, algorithm 1).

    alpha is moved so that it ends at 0 and stretched so that the first discrete step keeps its own; below that step the
    path stays as it is. A network that predicts noise cannot start at its end: take v-prediction.

    Args:
        of: a path with alpha^2 + sigma^2 = 1, such as `ScaledLinear`.
        steps: its number of discrete steps; the first stands at t = 1 / steps.
    """

    steps: int

    def __init__(self, of: NoisePath, steps: int = 1000):
        self.of = of
        self.steps = steps
        ends = torch.tensor([1 / steps, 1.0], dtype=torch.float64)
        first, last = (float(alpha) for alpha in of.alpha_sigma(ends)[0])
        self._first, self._last, self._stretch = first, last, first / (first - last)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha = self._alpha(t)
        return alpha.to(t.dtype), torch.sqrt((1 - alpha) * (1 + alpha)).to(t.dtype)

    def log_snr(self, t: Tensor) -> Tensor:
        alpha = self._alpha(t)
        return (2 * torch.log(alpha) - torch.log((1 - alpha) * (1 + alpha))).to(t.dtype)

    def time(self, log_snr: Tensor) -> Tensor:
        alpha = torch.exp(torch.nn.functional.logsigmoid(log_snr.double()) / 2)
        before = alpha / self._stretch + self._last
        rescaled = self.of.time(2 * torch.log(before) - torch.log((1 - before) * (1 + before)))
        return torch.where(alpha >= self._first, self.of.time(log_snr.double()), rescaled).to(log_snr.dtype)

    def network_time(self, t: Tensor) -> Tensor:
        return self.of.network_time(t)

    def _alpha(self, t: Tensor) -> Tensor:
        """alpha_t in float64: it is a small difference near the end."""
        t = t.double()
        alpha, _ = self.of.alpha_sigma(t)
        rescaled = (alpha - self._last) * self._stretch
        return torch.where(t <= 1 / self.steps, alpha, rescaled.clamp(min=0))


class UnscaledPath(NoisePath):
    """A path that leaves the image as it is: alpha = 1, sigma = exp(-lambda_t / 2). The network is told log(sigma).

    Args:
        time_scale: factor on log(sigma); EDM's c_noise = log(sigma) / 4 by default. Networks whose timestep embedding
            expects 0..1000 resolve noise levels better with 250.
    """

    def __init__(self, time_scale: float = 0.25):
        self.time_scale = time_scale

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), torch.exp(-self.log_snr(t) / 2)

    def network_time(self, t: Tensor) -> Tensor:
        return self.time_scale * (-self.log_snr(t) / 2)


class VarianceExploding(UnscaledPath):
    """The log-SNR of another path at every t, without scaling the image down.

    Args:
        of: the path whose log-SNR is taken over.
        time_scale: as in `UnscaledPath`.
    """

    def __init__(self, of: NoisePath, time_scale: float = 0.25):
        super().__init__(time_scale)
        self.of = of

    def log_snr(self, t: Tensor) -> Tensor:
        return self.of.log_snr(t)

    def time(self, log_snr: Tensor) -> Tensor:
        return self.of.time(log_snr)


class EDM(UnscaledPath):
    """Noise levels of Karras et al. (arXiv 2206.00364): log(sigma) is normal when t is uniform.

    t is thus the quantile of the training noise, sigma_t = exp(F^-1(t)) with F the normal distribution function of mean
    `p_mean` and standard deviation `p_std` (SD3, arXiv 2403.03206, section 2), and lambda_t is
    N(-2 p_mean, (2 p_std)^2). Levels beyond about 5.3 standard deviations (float32; 8.2 in float64, which samplers use)
    are out of reach and fall on the last level that is not.

    Args:
        p_mean, p_std: mean and standard deviation of log(sigma).
        time_scale: as in `UnscaledPath`.
    """

    def __init__(self, p_mean: float = -1.2, p_std: float = 1.2, time_scale: float = 0.25):
        super().__init__(time_scale)
        if p_std <= 0:
            raise ValueError(f"p_std must be positive, got {p_std}")
        self.p_mean = p_mean
        self.p_std = p_std

    def log_snr(self, t: Tensor) -> Tensor:
        return -2 * (self.p_mean + self.p_std * torch.special.ndtri(t))

    def time(self, log_snr: Tensor) -> Tensor:
        quantile = torch.special.ndtr((-log_snr / 2 - self.p_mean) / self.p_std)
        return quantile.clamp(max=1 - torch.finfo(quantile.dtype).eps / 2)  # 1 itself would be infinite noise
