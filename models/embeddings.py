"""Vectors that condition a denoiser: sinusoids of scalars, and the two layers that take them to its width."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sinusoid(values: Tensor, channels: int = 256) -> Tensor:
    """Scalars (n,) to cosines and sines (n, channels), float32, as in DDPM (arXiv 2006.11239).

    Raises:
        ValueError: half-precision values.
    """
    if values.dtype in (torch.bfloat16, torch.float16):
        raise ValueError(f"timesteps came as {values.dtype}, too coarse for 1000 levels: keep them in float32")
    half = channels // 2
    # In the order in which diffusers rounds.
    exponents = -math.log(10000) * torch.arange(half, device=values.device, dtype=torch.float32) / half
    angles = values.float()[:, None] * torch.exp(exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class VectorEmbedding(nn.Module):
    """Two layers from a vector to the width, in float32 whatever type the parameters have."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.up = Float32Linear(channels, width)
        self.down = Float32Linear(width, width)

    def forward(self, vector: Tensor) -> Tensor:
        """(n, channels) to (n, D) float32."""
        return self.down(F.silu(self.up(vector)))


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32 from parameters of any type."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features) float32."""
        return F.linear(x.float(), self.weight.float(), self.bias.float())
