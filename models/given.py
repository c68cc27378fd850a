"""What samples come with, as a conditioner takes it, and what encoders make of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from models.first_stage import FirstStage

Outputs = tuple[Tensor, Tensor]
"""A sequence (length, width) and a pooled vector (pooled_width,), or those of several samples, one a row."""


class Randomness(Protocol):
    """Random numbers of n samples, which are always the same for the same samples and purpose."""

    def normal(self, purpose: str, shape: Sequence[int] = (), device: torch.device | str = "cpu") -> Tensor:
        """Standard normal numbers, (n, *shape) float32."""

    def uniform(self, purpose: str, shape: Sequence[int] = (), device: torch.device | str = "cpu") -> Tensor:
        """Uniform numbers in [0, 1), (n, *shape) float32."""


@dataclass(frozen=True)
class Given:
    """What n samples come with, of which a conditioner makes their conditions.

    Args:
        captions: n captions; "" for none.
        size: height and width, in pixels, of the pictures that the denoiser makes.
        images: (n, 3, H, W) uint8, the samples' own pictures, (n, 0, H, W) where they were not read. Without any,
            encoders of pictures are as if dropped.
        encoded: by number of an encoder, its outputs of the samples where they are kept: (n, length, width) and
            (n, pooled_width). Such an encoder is not run on them.
        fields: further values of n samples by name, tensors of n rows or lists of n. An encoder whose field is not
            among them is as if dropped.
        original_size, crop, target_size: (n, 2), SDXL's size before resizing, top and left of the crop, and size after
            it, in pixels; by default `size`, 0 and `size`.
        first_stage: encodes pictures where maps are of latents, and tells their shape.
        draws: of what is random about conditions (noise on a low-resolution picture).
    """

    captions: Sequence[str]
    size: tuple[int, int] = (0, 0)
    images: Tensor | None = None
    encoded: Mapping[int, Outputs] = field(default_factory=dict)
    fields: Mapping[str, Tensor | list] = field(default_factory=dict)
    original_size: Tensor | None = None
    crop: Tensor | None = None
    target_size: Tensor | None = None
    first_stage: FirstStage | None = None
    draws: Randomness | None = None

    def __len__(self) -> int:
        return len(self.captions)

    def read(self, name: str) -> Any:
        """What an encoder `reads`: "captions", "images", or a field; None where there is nothing of the kind."""
        if name in ("captions", "images"):
            return getattr(self, name)
        return self.fields.get(name)
