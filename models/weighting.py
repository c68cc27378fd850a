"""Weights on the squared error of a prediction, as functions of time."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from models.parameterizations import Parameterization
from models.schedules import NoisePath


class Weight(ABC):
    """A factor per sample on the mean squared error between prediction and target."""

    @abstractmethod
    def __call__(self, t: Tensor, path: NoisePath, parameterization: Parameterization) -> Tensor:
        """Weights of t's shape for a network of this parameterization trained along this path."""


class Unweighted(Weight):
    """1: the plain squared error of what the network predicts."""

    def __call__(self, t: Tensor, path: NoisePath, parameterization: Parameterization) -> Tensor:
        return torch.ones_like(t)


class MeasuredAs(Weight):
    """Measures the network's estimate as the squared error of another formulation's prediction at the same log-SNR.

    The noise level fixes how the errors of two parameterizations relate, so this is a factor of t alone. It carries,
    for instance, the loss of rectified flow over to a network with EDM's preconditioning ("edm/rf" in SD3's study).

    Args:
        path: the path on which the other formulation's prediction is defined.
        parameterization: what the other formulation predicts.
    """

    def __init__(self, path: NoisePath, parameterization: Parameterization):
        self.path = path
        self.parameterization = parameterization

    def __call__(self, t: Tensor, path: NoisePath, parameterization: Parameterization) -> Tensor:
        exact = t.double()  # 1 - t loses its digits near t = 1 on the way through the log-SNR
        same_noise = self.path.time(path.log_snr(exact))
        wanted = self.parameterization.error_ratio(*self.path.alpha_sigma(same_noise))
        return (wanted / parameterization.error_ratio(*path.alpha_sigma(exact))).to(t.dtype)


class MinSNR(Weight):
    """min(SNR, gamma) on the squared error of the image, whatever the network predicts (Hang et al., arXiv 2303.09556).

    For a network that predicts noise that is min(SNR, gamma) / SNR, for v-prediction min(SNR, gamma) / (SNR + 1): steps
    with little noise, whose tasks are easy and many, count less.

    Args:
        gamma: the paper's 5.
    """

    def __init__(self, gamma: float = 5.0):
        if gamma <= 0:
            raise ValueError(f"gamma must be positive, got {gamma}")
        self.gamma = gamma

    def __call__(self, t: Tensor, path: NoisePath, parameterization: Parameterization) -> Tensor:
        exact = t.double()
        alpha, sigma = path.alpha_sigma(exact)
        # Of x_0 = (b x_t - sigma F) / D: the image's squared error is (sigma / D)^2 times the prediction's.
        of_image = (sigma / parameterization.determinant(alpha, sigma)) ** 2
        return (torch.clamp((alpha / sigma) ** 2, max=self.gamma) * of_image).to(t.dtype)
