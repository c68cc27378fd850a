"""Aspect buckets: the few image shapes that a run trains at, and which of them an image goes to.

A slice of the plan has one bucket, so all its images have one shape. An image goes to the bucket whose aspect ratio is
nearest on a log scale, as in SDXL (arXiv 2307.01952, section 2.3 and appendix I).
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_BUCKETS = 255
"""Bucket indices are stored in a byte; the last value marks padding."""


@dataclass(frozen=True)
class Bucket:
    """An image shape, in pixels."""

    height: int
    width: int

    def __post_init__(self) -> None:
        if self.height <= 0 or self.width <= 0:
            raise ValueError(f"bucket {self}: height and width must be positive")

    @property
    def aspect(self) -> float:
        """Width over height."""
        return self.width / self.height

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


class Buckets:
    """An ordered collection of buckets with distinct aspect ratios; a slice names its bucket by the index in it."""

    def __init__(self, shapes: Sequence[Bucket]) -> None:
        if not shapes:
            raise ValueError("no buckets: give at least one (height, width)")
        if len(shapes) > MAX_BUCKETS:
            raise ValueError(f"{len(shapes)} buckets, but at most {MAX_BUCKETS} are supported: use a larger step")
        self.shapes = tuple(shapes)
        aspects = np.array([shape.aspect for shape in self.shapes])
        self._by_aspect = np.argsort(aspects, kind="stable").astype(np.uint8)
        aspects = aspects[self._by_aspect]
        for i in np.flatnonzero(aspects[1:] == aspects[:-1]):
            twins = self.shapes[self._by_aspect[i]], self.shapes[self._by_aspect[i + 1]]
            raise ValueError(f"buckets {twins[0]} and {twins[1]} have the same aspect ratio: keep one of them")
        # The nearest on a log scale changes at geometric means. Division and square root are exactly rounded in IEEE
        # 754, where a logarithm is not: every machine assigns an image to the same bucket.
        self._borders = np.sqrt(aspects[1:] * aspects[:-1])

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: int) -> Bucket:
        return self.shapes[index]

    def assign(self, width: np.ndarray, height: np.ndarray) -> np.ndarray:
        """Index of the bucket nearest in log aspect ratio.

        Args:
            width, height: (n,) sizes in pixels, all positive.

        Returns:
            (n,) uint8.
        """
        wrong = np.flatnonzero((width <= 0) | (height <= 0))
        if len(wrong):
            i = int(wrong[0])
            raise ValueError(f"row {i} of {len(width)} has size {height[i]}x{width[i]}: sizes must be positive")
        if len(self) == 1:
            return np.zeros(len(width), dtype=np.uint8)
        return self._by_aspect[np.searchsorted(self._borders, np.divide(width, height, dtype=np.float64))]

    @property
    def fingerprint(self) -> str:
        """Changes whenever a shape or the order of shapes does."""
        shapes = [[shape.height, shape.width] for shape in self.shapes]
        return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]


class Square(Buckets):
    """One square bucket: every image is cropped to it.

    Args:
        size: side in pixels.
    """

    def __init__(self, size: int) -> None:
        super().__init__([Bucket(size, size)])


class BucketList(Buckets):
    """Buckets given one by one.

    Args:
        sizes: [height, width] pairs in pixels.
    """

    def __init__(self, sizes: list[list[int]]) -> None:
        for size in sizes:
            if len(size) != 2:
                raise ValueError(f"bucket {size}: expected [height, width]")
        super().__init__([Bucket(int(height), int(width)) for height, width in sizes])


class ConstantArea(Buckets):
    """All buckets of about one area: for every side that is a multiple of `step`, the longest other side that keeps
    the area at or below `resolution`**2.

    Args:
        resolution: side of the square bucket, in pixels.
        step: both sides are multiples of it.
        max_aspect: largest ratio of the long side to the short one.
    """

    def __init__(self, resolution: int, step: int, max_aspect: float) -> None:
        if step <= 0 or resolution % step:
            raise ValueError(f"resolution {resolution} must be a multiple of step {step}")
        if max_aspect < 1:
            raise ValueError(f"max_aspect {max_aspect} must be at least 1: it is the long side over the short one")
        shapes = [Bucket(resolution, resolution)]
        for short in range(resolution - step, 0, -step):
            long = resolution**2 // short // step * step
            if long > max_aspect * short:
                break
            shapes += [Bucket(long, short), Bucket(short, long)]
        shapes.sort(key=lambda shape: shape.aspect)
        super().__init__(shapes)
