"""Parameterizations: which mixture of image and noise a network predicts, and how its input is scaled.

Every prediction target in use is linear, F = a x_0 + b eps, with coefficients that depend on the noise level alone.
Together with x_t = alpha x_0 + sigma eps this is a 2 x 2 system, so image, noise and error weights of any
parameterization on any path follow from (a, b):

    D   = alpha b - sigma a
    x_0 = (b x_t - sigma F) / D
    eps = (alpha F - a x_t) / D
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Parameterization(ABC):
    """A linear prediction target F = a x_0 + b eps."""

    @abstractmethod
    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) at the noise level (alpha, sigma), of the same shape."""

    def input_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """c_in: the factor on x_t at the network's input."""
        return torch.ones_like(sigma)

    def determinant(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """D = alpha b - sigma a; where it is 0, x_t and the prediction together do not determine the image."""
        a, b = self.coefficients(alpha, sigma)
        return alpha * b - sigma * a

    def error_ratio(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """k with |F error|^2 = k |eps error|^2 for the same estimate of the image: (D / alpha)^2."""
        return (self.determinant(alpha, sigma) / alpha) ** 2


class Noise(Parameterization):
    """F = eps (DDPM, arXiv 2006.11239)."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(alpha), torch.ones_like(sigma)


class V(Parameterization):
    """F = alpha eps - sigma x_0 (Salimans & Ho, arXiv 2202.00512)."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return -sigma, alpha


class Velocity(Parameterization):
    """F = eps - x_0, the constant velocity along a straight path (rectified flow)."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(alpha), torch.ones_like(sigma)


class Image(Parameterization):
    """F = x_0: images lie near a surface of few dimensions, which a narrow network on large patches can follow, while
    noise fills all of them ("x-prediction": JiT, arXiv 2511.13720)."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(alpha), torch.zeros_like(sigma)


class EDMPreconditioning(Parameterization):
    """F of D(x) = c_skip x + c_out F(c_in x), on paths with alpha = 1 (EDM, arXiv 2206.00364, table 1).

    With s = sqrt(sigma^2 + sigma_data^2): c_skip = sigma_data^2 / s^2, c_out = sigma sigma_data / s, c_in = 1 / s, so
    that F = (x_0 - c_skip x_t) / c_out = (sigma / sigma_data x_0 - sigma_data eps) / s. A mean squared error of F with
    weight 1 is EDM's loss, whose weight on the image's error is 1 / c_out^2.

    Args:
        sigma_data: standard deviation of the data: 0.5 in EDM and SD3's study, 1 in Stable Video Diffusion.
    """

    def __init__(self, sigma_data: float = 0.5):
        if sigma_data <= 0:
            raise ValueError(f"sigma_data must be positive, got {sigma_data}")
        self.sigma_data = sigma_data

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.input_scale(alpha, sigma)
        return sigma / self.sigma_data * scale, -self.sigma_data * scale

    def input_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return 1 / torch.hypot(sigma, torch.full_like(sigma, self.sigma_data))
