"""The diffusion process: noising, what the network predicts of it, and how its loss is weighed.

A formulation is composed of four small parts: a noising path (`models/schedules.py`), a parameterization
(`models/parameterizations.py`), a density of training times (`models/densities.py`) and a weight
(`models/weighting.py`). Rectified flow, DDPM, v-prediction, EDM and every mixture in the 61 formulations of SD3's study
(arXiv 2403.03206, section 5.1) are choices of these. Objectives and samplers share this class.

Times are (n,) or 0-dimensional, 1 = noise, 0 = image; images are (n, ...). Nothing here draws random numbers.
"""

import math

import torch
from torch import Tensor

from models.densities import Density
from models.parameterizations import Parameterization
from models.schedules import NoisePath
from models.weighting import Weight

# Times whose float32 distance to 0 or 1 is not zero, so that every path's log-SNR is finite in training.
_FIRST_TIME, _LAST_TIME = 2.0**-24, 1 - 2.0**-24
# Where sampling starts if the path has no end at pure noise, or its end does not determine the image: EDM's sigma_max.
_START_LOG_SNR = -2 * math.log(80)


class Process:
    """A formulation of diffusion.

    Args:
        path: the noising path.
        parameterization: what the network predicts.
        density: how training times are distributed.
        weight: factor on the squared error.
        shift: resolution shift of times, sqrt(m/n) for m pixels where n have shift 1; applies to training times and is
            the default of samplers' times.
    """

    def __init__(
        self,
        path: NoisePath,
        parameterization: Parameterization,
        density: Density,
        weight: Weight,
        shift: float = 1.0,
    ):
        if shift <= 0:
            raise ValueError(f"shift must be positive, got {shift}")
        self.path = path
        self.parameterization = parameterization
        self.density = density
        self.weight = weight
        self.shift = shift

    # Training

    def sample_t(self, u: Tensor) -> Tensor:
        """Training times (n,) for u (n,) uniform in [0, 1): density, then resolution shift."""
        return self.path.shift(self.density.sample(u), self.shift).clamp(_FIRST_TIME, _LAST_TIME)

    @property
    def span(self) -> tuple[float, float]:
        """The least and the greatest time that is trained: 0 and 1, unless the density is of a part."""
        low, high = self.path.shift(torch.tensor(self.density.span), self.shift).tolist()
        return low, high

    def validation_times(self, count: int) -> Tensor:
        """(count,) float32, the midpoints of `count` equal parts of the times that are trained: both ends of [0, 1] are
        singular for some paths."""
        low, high = self.span
        return low + (high - low) * (torch.arange(count, dtype=torch.float32) + 0.5) / count

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients of image and noise in x_t, of t's shape."""
        return self.path.alpha_sigma(t)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha_t x_0 + sigma_t noise."""
        alpha, sigma = self._levels(t, x0)
        return alpha * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should predict."""
        a, b = self.parameterization.coefficients(*self._levels(t, x0))
        return a * x0 + b * noise

    def loss_weight(self, t: Tensor) -> Tensor:
        """Factor on each sample's mean squared error of the prediction, of t's shape."""
        return self.weight(t, self.path, self.parameterization)

    def bound(self, x0: Tensor, estimate: Tensor, t: Tensor, steps: int) -> Tensor:
        """A step's term of the variational bound on -log p(x_0), in nats per element, (n,).

        It is the divergence KL(q(x_s | x_t, x_0) || q(x_s | x_t, estimate)) for s = t - 1 / steps. Both are Gaussians
        of one variance, which leaves (SNR_s - SNR_t) / 2 times the estimate's squared error (VDM, arXiv 2107.00630,
        eq. 13). Times `steps`, it estimates the bound's sum from a time drawn uniformly; LDM logs it as `loss_vlb`.

        Args:
            x0, estimate: the image and what a network takes it for, (n, ...).
            t: (n,), at least 1 / steps; at that first step s is the clean image, and the term is that of the second, as
                in DDPM's clipped variances.
            steps: of the discrete process.
        """
        t = t.double().clamp(min=2 / steps)
        snr_s, snr_t = (torch.exp(self.path.log_snr(time)) for time in (t - 1 / steps, t))
        error = (x0 - estimate).square().flatten(1).mean(1)
        return ((snr_s - snr_t) / 2 * error).float()

    # The network's side

    def network_input(self, x_t: Tensor, t: Tensor) -> Tensor:
        """x_t scaled for the network (c_in)."""
        return self.parameterization.input_scale(*self._levels(t, x_t)) * x_t

    def network_time(self, t: Tensor) -> Tensor:
        """The timestep that the network is told, of t's shape, in its diffusers class's units."""
        return self.path.network_time(t)

    def to_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The image that a prediction implies."""
        alpha, sigma = self._levels(t, x_t)
        _, b = self.parameterization.coefficients(alpha, sigma)
        determinant = self.parameterization.determinant(alpha, sigma)
        return (b / determinant) * x_t - (sigma / determinant) * prediction

    def to_noise(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise that a prediction implies."""
        alpha, sigma = self._levels(t, x_t)
        a, _ = self.parameterization.coefficients(alpha, sigma)
        determinant = self.parameterization.determinant(alpha, sigma)
        return (alpha / determinant) * prediction - (a / determinant) * x_t

    # Sampling

    def start_time(self) -> Tensor:
        """The time from which sampling starts, float64 scalar.

        It is 1 where noise and prediction there give an image. Where they do not (infinite noise under EDM;
        eps-prediction on a path that ends at alpha = 0) it is the time at which the noise is 80 times the signal, EDM's
        sigma_max.
        """
        end = torch.ones((), dtype=torch.float64)
        alpha, sigma = self.alpha_sigma(end)
        # 0 and infinity up to the rounding of trigonometric functions
        solvable = sigma < 1e6 and self.parameterization.determinant(alpha, sigma).abs() > 1e-6
        return end if solvable else self.path.time(torch.tensor(_START_LOG_SNR, dtype=torch.float64))

    def _levels(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t, shaped to multiply x."""
        if t.ndim:
            t = t.reshape(-1, *(1,) * (x.ndim - 1))
        return self.path.alpha_sigma(t)
