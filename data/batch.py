"""The nouns that pass between the plan, the loader and the objectives."""

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from data.draws import Draws


@dataclass(frozen=True)
class PlannedSlice:
    """Which samples make up the slice (step, lane). Everything random about the slice follows from step and lane.

    Args:
        source: index of the data source that the slice comes from.
        bucket: index into the plan's list of buckets.
        rows: (m,) int64, positions in the source's selection.
    """

    step: int
    lane: int
    source: int
    bucket: int
    rows: np.ndarray


@dataclass(frozen=True)
class Batch:
    """Samples of one slice (or of several fused, or a part of one), all of one shape.

    Args:
        draws: the samples' source of randomness; its length is the batch's, n.
        keys: n sample keys.
        captions: n captions, "" where there is none.
        images: (n, 3, H, W), uint8 as the loader delivers it; (n, 0, H, W) where the batch comes with latents instead.
        original_size: (n, 2) int64, height and width before resizing, after EXIF orientation.
        crop: (n, 2) int64, top and left of the crop in the resized image (SDXL, arXiv 2307.01952, section 2.2).
        fields: further per-sample values, by name: a tensor with n rows or a list of n. Encodings that were computed
            before (data/encoded.py): "moments", "encoder/<i>/sequence" and "encoder/<i>/pooled" of the
            conditioner's i-th encoder.
    """

    draws: Draws
    keys: list[str]
    captions: list[str]
    images: Tensor
    original_size: Tensor
    crop: Tensor
    fields: dict[str, Tensor | list] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def target_size(self) -> tuple[int, int]:
        """Height and width of the bucket, in pixels."""
        return self.images.shape[-2], self.images.shape[-1]

    def to(self, device: torch.device | str) -> "Batch":
        """The batch with its tensors on the device."""
        moved = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in self.fields.items()}
        return replace(
            self,
            images=self.images.to(device, non_blocking=True),
            original_size=self.original_size.to(device, non_blocking=True),
            crop=self.crop.to(device, non_blocking=True),
            fields=moved,
        )

    def pin_memory(self) -> "Batch":
        """The batch with its tensors in page-locked memory, from which `to` copies without waiting."""
        pinned = {k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in self.fields.items()}
        return replace(
            self,
            images=self.images.pin_memory(),
            original_size=self.original_size.pin_memory(),
            crop=self.crop.pin_memory(),
            fields=pinned,
        )

    def split(self, size: int) -> list["Batch"]:
        """Parts of at most `size` samples, in order."""
        return [self._part(slice(start, start + size)) for start in range(0, len(self), size)]

    def _part(self, part: slice) -> "Batch":
        return Batch(
            draws=self.draws[part],
            keys=self.keys[part],
            captions=self.captions[part],
            images=self.images[part],
            original_size=self.original_size[part],
            crop=self.crop[part],
            fields={k: v[part] for k, v in self.fields.items()},
        )


def fuse(batches: list[Batch]) -> Batch:
    """One batch of several of equal shape, in order."""
    first = batches[0]
    draws = first.draws
    for batch in batches[1:]:
        draws = draws + batch.draws

    def join(values: list):
        return torch.cat(values) if isinstance(values[0], Tensor) else [x for v in values for x in v]

    return Batch(
        draws=draws,
        keys=join([b.keys for b in batches]),
        captions=join([b.captions for b in batches]),
        images=join([b.images for b in batches]),
        original_size=join([b.original_size for b in batches]),
        crop=join([b.crop for b in batches]),
        fields={k: join([b.fields[k] for b in batches]) for k in first.fields},
    )
