"""Pictures on which there is nothing to see."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import cv2
import numpy as np
import pyarrow as pa

from data.curation.base import Failure, Filter, Media


class Blank(Filter):
    """`contrast`: standard deviation of the brightness, in grey levels of 0 to 255; and `uniformity`: the largest share
    of the pixels whose brightness is alike. Blank, black and single-coloured pictures have a uniformity near 1.

    Args:
        tolerance: grey levels by which brightness may lie above or below a middle and still count as alike.
    """

    name = "blank"
    media: ClassVar = "image"
    columns = pa.schema({"contrast": pa.float32(), "uniformity": pa.float32()})

    def __init__(self, tolerance: int = 4) -> None:
        if not 0 <= tolerance <= 127:
            raise ValueError(f"tolerance must be 0 to 127 grey levels, got {tolerance}")
        self.tolerance = tolerance

    def settings(self) -> dict[str, Any]:
        return {"tolerance": self.tolerance}

    def score(self, samples: Sequence[Media]) -> Sequence[Mapping[str, Any] | Failure]:
        return [self._measure(sample.image) for sample in samples]

    def _measure(self, image: np.ndarray) -> dict[str, float]:
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        # In single precision, exact up to 2**24 pixels of one level; numpy's bincount takes several times as long.
        counts = cv2.calcHist([grey], [0], None, [256], [0, 256]).ravel().astype(np.float64)
        levels = np.arange(256)
        mean = counts @ levels / grey.size
        below = np.concatenate([[0], np.cumsum(counts)])
        width = 2 * self.tolerance + 1
        alike = (below[width:] - below[:-width]).max()
        return {"contrast": float(np.sqrt(counts @ (levels - mean) ** 2 / grey.size)), "uniformity": alike / grey.size}
