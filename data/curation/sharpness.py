"""Sharpness of a picture."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import cv2
import numpy as np
import pyarrow as pa

from data.curation.base import Failure, Filter, Media


class Sharpness(Filter):
    """`sharpness`: the variance of the Laplacian of the brightness (Pech-Pacheco et al. 2000, "Diatom autofocusing in
    brightfield microscopy"), in squared grey levels of 0 to 255. Blurred pictures score low, noisy ones high.

    Args:
        size: pictures whose shorter side is longer than this many pixels are scaled down to it: blur is judged at the
            size at which training would see it.
    """

    name = "sharpness"
    media: ClassVar = "image"
    columns = pa.schema({"sharpness": pa.float32()})

    def __init__(self, size: int = 512) -> None:
        if size < 8:
            raise ValueError(f"the size at which sharpness is measured must be at least 8, got {size}")
        self.size = size

    def settings(self) -> dict[str, Any]:
        return {"size": self.size}

    def score(self, samples: Sequence[Media]) -> Sequence[Mapping[str, Any] | Failure]:
        return [{"sharpness": self._measure(sample.image)} for sample in samples]

    def _measure(self, image: np.ndarray) -> float:
        grey = cv2.cvtColor(shrink(image, self.size), cv2.COLOR_RGB2GRAY)
        _, deviation = cv2.meanStdDev(cv2.Laplacian(grey, cv2.CV_16S))
        return float(deviation[0, 0] ** 2)


def shrink(image: np.ndarray, size: int) -> np.ndarray:
    """The picture with its shorter side scaled down to `size` pixels by area averages; smaller ones as they are."""
    height, width = image.shape[:2]
    if min(height, width) <= size:
        return image
    scale = size / min(height, width)
    return cv2.resize(image, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_AREA)
