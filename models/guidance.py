"""Classifier-free guidance: a network and its conditions as the denoiser that samplers call."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from models.process import Process
from models.samplers import Denoise


class Guidance:
    """How strongly predictions are pushed from the unconditional to the conditional one (arXiv 2207.12598).

    prediction = unconditional + scale (conditional - unconditional); 1 is no guidance.

    Args:
        scale: the guidance scale.
        low, high: guidance acts at times low <= t <= high only (guidance interval, arXiv 2404.07724); elsewhere the
            conditional prediction is used, at half the cost.
    """

    def __init__(self, scale: float = 1.0, low: float = 0.0, high: float = 1.0):
        if not 0 <= scale < math.inf:
            raise ValueError(f"scale={scale}: guidance takes a number from 0; 1 is none")
        if not 0 <= low <= high <= 1:
            raise ValueError(f"the guidance interval must satisfy 0 <= low <= high <= 1, got {low} and {high}")
        self.scale = scale
        self.low = low
        self.high = high

    def active(self, t: Tensor) -> bool:
        """Whether guidance changes the prediction at the scalar time t."""
        return self.scale != 1 and self.low <= float(t) <= self.high


def denoiser(
    network: nn.Module,
    process: Process,
    conditions: Mapping[str, Tensor],
    null_conditions: Mapping[str, Tensor] | None = None,
    guidance: Guidance | None = None,
) -> Denoise:
    """The denoiser (x_t, t) -> x_0 of a conditional network.

    With guidance, both predictions come from one call on the doubled batch, unconditional first.

    Args:
        network: called as network(x, timestep (n,), **conditions).
        process: what the network was trained with.
        conditions: tensors of n rows, by name.
        null_conditions: the same for the unconditional prediction; needed only where guidance acts.
        guidance: none by default.
    """
    guidance = guidance or Guidance()
    if guidance.scale != 1 and null_conditions is None:
        raise ValueError(f"guidance scale {guidance.scale} needs null conditions, and there are none")
    both = (
        {name: torch.cat([null_conditions[name], value]) for name, value in conditions.items()}
        if null_conditions
        else {}
    )

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        guided = guidance.active(t)
        x = process.network_input(x_t, t)
        x = torch.cat([x, x]) if guided else x
        timestep = process.network_time(t).to(x.device, torch.float32).expand(len(x))
        prediction = network(x, timestep, **(both if guided else conditions)).float()
        if guided:
            unconditional, conditional = prediction.chunk(2)
            prediction = unconditional + guidance.scale * (conditional - unconditional)
        return process.to_x0(prediction, x_t, t)

    return denoise
