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

    The unconditional prediction still knows what lies beside the latent. Editing models are also pushed away from one
    that does not (InstructPix2Pix, arXiv 2211.09800, eq. 3):

    prediction = bare + picture_scale (unconditional - bare) + scale (conditional - unconditional).

    Args:
        scale: the guidance scale.
        picture_scale: the same for maps beside the latent, such as the picture to edit; 1 is none.
        rescale: how far the guided prediction's standard deviation, of each sample, is brought back to that of the
            conditional one (arXiv 2305.08891, section 3.4: 0.7 under zero terminal SNR); 0 leaves it.
        low, high: guidance acts at times low <= t <= high only (guidance interval, arXiv 2404.07724); elsewhere the
            conditional prediction is used, at half the cost.
    """

    def __init__(
        self,
        scale: float = 1.0,
        picture_scale: float = 1.0,
        rescale: float = 0.0,
        low: float = 0.0,
        high: float = 1.0,
    ):
        for name, value in (("scale", scale), ("picture_scale", picture_scale)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}={value}: guidance takes a number from 0; 1 is none")
        if not 0 <= low <= high <= 1:
            raise ValueError(f"the guidance interval must satisfy 0 <= low <= high <= 1, got {low} and {high}")
        if not 0 <= rescale <= 1:
            raise ValueError(f"rescale={rescale}: it takes a share from 0 to 1")
        self.scale = scale
        self.picture_scale = picture_scale
        self.rescale = rescale
        self.low = low
        self.high = high

    @property
    def acts(self) -> bool:
        """Whether it changes a prediction at any time."""
        return self.scale != 1 or self.picture_scale != 1

    def active(self, t: Tensor) -> bool:
        """Whether guidance changes the prediction at the scalar time t."""
        return self.acts and self.low <= float(t) <= self.high


def denoiser(
    network: nn.Module,
    process: Process,
    conditions: Mapping[str, Tensor],
    null_conditions: Mapping[str, Tensor] | None = None,
    guidance: Guidance | None = None,
    bare_conditions: Mapping[str, Tensor] | None = None,
) -> Denoise:
    """The denoiser (x_t, t) -> x_0 of a conditional network.

    With guidance, all predictions come from one call on the doubled or trebled batch, the least conditional first.

    Args:
        network: called as network(x, timestep (n,), **conditions).
        process: what the network was trained with.
        conditions: tensors of n rows, by name.
        null_conditions: the same for the unconditional prediction; needed only where guidance acts.
        guidance: none by default.
        bare_conditions: the same without maps; needed only under a `picture_scale`.
    """
    guidance = guidance or Guidance()
    if guidance.acts and null_conditions is None:
        raise ValueError(f"guidance scale {guidance.scale} needs null conditions, and there are none")
    if guidance.picture_scale != 1 and bare_conditions is None:
        raise ValueError(
            f"picture_scale={guidance.picture_scale} needs conditions without pictures, and there are none"
        )
    parts = [bare_conditions] if guidance.picture_scale != 1 else []
    parts += [null_conditions, conditions] if guidance.acts else []
    together = {name: torch.cat([part[name] for part in parts if part]) for name in conditions} if parts else {}

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        guided = guidance.active(t)
        x = process.network_input(x_t, t)
        x = torch.cat([x] * len(parts)) if guided else x
        timestep = process.network_time(t).to(x.device, torch.float32).expand(len(x))
        prediction = network(x, timestep, **(together if guided else conditions)).float()
        if guided:
            *bare, unconditional, conditional = prediction.chunk(len(parts))
            prediction = unconditional + guidance.scale * (conditional - unconditional)
            if bare:
                prediction = prediction + (guidance.picture_scale - 1) * (unconditional - bare[0])
            if guidance.rescale:
                ratio = _deviation(conditional) / _deviation(prediction)
                prediction = prediction * (1 + guidance.rescale * (ratio - 1))
        return process.to_x0(prediction, x_t, t)

    return denoise


def _deviation(x: Tensor) -> Tensor:
    """The standard deviation of each sample, shaped to multiply them."""
    return x.std(dim=tuple(range(1, x.ndim)), keepdim=True)
