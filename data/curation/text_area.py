"""How much of a picture is text."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import cv2
import numpy as np
import pyarrow as pa

from data.curation.base import Failure, Filter, Media
from data.curation.text_detectors import TextDetector


class TextArea(Filter):
    """`text_area`: the share of the picture that boxes around lines or words of text cover. SVD (arXiv 2311.15127,
    section 3.1 and appendix C) drops clips of more than 7 %, found by CRAFT.

    Args:
        detector: what finds the boxes.
    """

    name = "text_area"
    media: ClassVar = "image"
    columns = pa.schema({"text_area": pa.float32()})

    def __init__(self, detector: TextDetector) -> None:
        self.detector = detector

    def settings(self) -> dict[str, Any]:
        return {"detector": type(self.detector).__name__, **self.detector.settings()}

    def score(self, samples: Sequence[Media]) -> Sequence[Mapping[str, Any] | Failure]:
        return [{"text_area": covered(self.detector.find(s.image), s.image.shape[:2])} for s in samples]


def covered(quads: np.ndarray, size: tuple[int, int]) -> float:
    """The share of a picture of (height, width) that quadrilaterals cover, overlaps counted once.

    Args:
        quads: (N, 4, 2) corners (x, y) in pixels.
    """
    mask = np.zeros(size, np.uint8)
    for quad in np.rint(quads).astype(np.int32):
        cv2.fillConvexPoly(mask, quad, 1)
    return cv2.countNonZero(mask) / mask.size
