"""Random holes to train inpainting with: the large masks of LaMa (arXiv 2109.07161, section 2.3).

Half of them are thick polygonal chains, half are rectangles. Lengths are told for pictures of 256 pixels, and grow with
the picture's shorter side.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np

_SIDE = 256


@dataclass(frozen=True)
class LargeMasks:
    """How holes are drawn.

    Args:
        chains: share of the masks that are chains; the others are rectangles.
        most_chains, most_boxes: in a mask, at most; at least one.
        length: of a chain's link, at most.
        width: of a chain, at most.
        least_box, most_box: sides of a rectangle.
        margin: between rectangles and the picture's edges.
    """

    chains: float = 0.5
    most_chains: int = 5
    most_boxes: int = 4
    length: int = 200
    width: int = 100
    least_box: int = 30
    most_box: int = 150
    margin: int = 10

    def draw(self, height: int, width: int, seed: int) -> np.ndarray:
        """(height, width) bool, true in the hole; the same for the same seed."""
        rng = np.random.default_rng(seed)
        scale = min(height, width) / _SIDE
        mask = np.zeros((height, width), np.uint8)
        if rng.random() < self.chains:
            for _ in range(rng.integers(1, self.most_chains, endpoint=True)):
                self._chain(mask, rng, scale)
        else:
            for _ in range(rng.integers(1, self.most_boxes, endpoint=True)):
                self._box(mask, rng, scale)
        return mask.astype(bool)

    def _chain(self, mask: np.ndarray, rng: np.random.Generator, scale: float) -> None:
        """Up to five links, which turn back and forth by up to four radians."""
        height, width = mask.shape
        x, y = int(rng.integers(width)), int(rng.integers(height))
        for link in range(rng.integers(1, 5, endpoint=True)):
            angle = 0.01 + rng.integers(5)
            angle = 2 * math.pi - angle if link % 2 == 0 else angle
            length = scale * (10 + rng.integers(self.length))
            thickness = max(1, round(scale * (5 + rng.integers(self.width))))
            to_x = int(np.clip(x + length * math.sin(angle), 0, width))
            to_y = int(np.clip(y + length * math.cos(angle), 0, height))
            cv2.line(mask, (x, y), (to_x, to_y), 1, thickness)
            x, y = to_x, to_y

    def _box(self, mask: np.ndarray, rng: np.random.Generator, scale: float) -> None:
        margin = int(scale * self.margin)
        sides = []
        for side in mask.shape:
            most = max(1, min(round(scale * self.most_box), side - 2 * margin))
            least = min(max(1, round(scale * self.least_box)), most)
            length = int(rng.integers(least, most, endpoint=True))
            start = margin + int(rng.integers(max(0, side - 2 * margin - length), endpoint=True))
            sides.append(slice(start, start + length))
        mask[tuple(sides)] = 1
