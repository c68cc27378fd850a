"""Hashes of samples, by which `duplicates` finds those that are the same, or nearly so."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import cv2
import numpy as np
import pyarrow as pa
import xxhash

from data.curation.base import Failure, Filter, Media

_GRID = 32
_FIELDS = 4
COLORS = _FIELDS * _FIELDS * 3
"""Bytes that tell the colours of a picture."""
_ANCHORS = ((0.5, 0.5), (0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0))


class ContentHash(Filter):
    """`content_hash`: XXH3 (128 bits) of the encoded picture or clip: equal for equal files; for a part of a clip, of
    the file and where in it the part lies."""

    name = "content_hash"
    media: ClassVar = "any"
    columns = pa.schema({"content_hash": pa.binary(16)})

    def settings(self) -> dict[str, Any]:
        return {}

    def score(self, samples: Sequence[Media]) -> Sequence[Mapping[str, Any] | Failure]:
        return [
            {"content_hash": _part_hash(s.data, s.span) if s.span else xxhash.xxh3_128_digest(s.data)} for s in samples
        ]


def _part_hash(data: bytes, span: tuple[int, int]) -> bytes:
    digest = xxhash.xxh3_128(data)
    digest.update(repr(span).encode())
    return digest.digest()


class PerceptualHash(Filter):
    """64-bit hashes of what a picture looks like, of which few bits change under re-encoding, resizing and mild
    changes of colour and brightness.

    A hash tells which of the 8 x 8 lowest cosine coefficients of a 32 x 32 grey picture lie above their median (pHash;
    Zauner 2010, "Implementation and benchmarking of perceptual image hash functions"). `phash` is that of the whole
    picture. Cropping changes it: taking off a twentieth flips some 4 to 10 bits. So `phash_windows` holds those of
    windows into the picture, one of which is close to any crop of about that share: five for each of `crops`, in the
    middle and in the corners. `phash_colors` and `phash_window_colors` are what these look like from afar: the mean
    colours of 4 x 4 fields. By these `duplicates` tells apart what has the same outlines: icons, signs, flags.

    Out of its reach are crops of more than a sixth, rotated and mirrored pictures, and borders or text over much of a
    picture. A picture without structure has no hash: all columns are None.

    Args:
        crops: shares of the sides that crops may take off.
        contrast: standard deviation of brightness, in grey levels, below which a picture counts as without structure.
    """

    name = "perceptual_hash"
    version = 2
    media: ClassVar = "image"
    frames: ClassVar = ("middle",)
    columns = pa.schema(
        {
            "phash": pa.uint64(),
            "phash_windows": pa.list_(pa.uint64()),
            "phash_colors": pa.binary(COLORS),
            "phash_window_colors": pa.list_(pa.binary(COLORS)),
        }
    )

    def __init__(self, crops: list[float] = [0.05, 0.1], contrast: float = 2.0) -> None:  # noqa: B006
        if not all(0 < share < 0.5 for share in crops):
            raise ValueError(f"crops {crops} must be shares of the sides, between 0 and 0.5")
        self.crops, self.contrast = crops, contrast

    def settings(self) -> dict[str, Any]:
        return {"crops": self.crops, "contrast": self.contrast}

    def score(self, samples: Sequence[Media]) -> Sequence[Mapping[str, Any] | Failure]:
        return [self._hash(sample.image) for sample in samples]

    def _hash(self, image: np.ndarray) -> dict[str, Any]:
        # First a size from which windows are cheap: 4 x the grid, so that their edges fall near enough.
        if min(image.shape[:2]) > 4 * _GRID:
            image = cv2.resize(image, (4 * _GRID, 4 * _GRID), interpolation=cv2.INTER_AREA)
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        if grey.std() < self.contrast:
            return {}
        small = cv2.resize(image, (10 * _FIELDS, 10 * _FIELDS), interpolation=cv2.INTER_AREA)
        windows = [(share, *anchor) for share in self.crops for anchor in _ANCHORS]
        return {
            "phash": _dct_hash(grey),
            "phash_windows": [_dct_hash(_part(grey, *window)) for window in windows],
            "phash_colors": _fields(small),
            "phash_window_colors": [_fields(_part(small, *window)) for window in windows],
        }


def _part(pixels: np.ndarray, share: float, down: float, right: float) -> np.ndarray:
    """The window that leaves off a share of the sides, of which so much lies above it and to its left."""
    height, width = pixels.shape[:2]
    rows, columns = max(1, round(height * (1 - share))), max(1, round(width * (1 - share)))
    top, left = round((height - rows) * down), round((width - columns) * right)
    return pixels[top : top + rows, left : left + columns]


def _dct_hash(grey: np.ndarray) -> int:
    small = cv2.resize(grey, (_GRID, _GRID), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = cv2.dct(small)[:8, :8].ravel()
    # The first coefficient is the mean brightness, far from all others. The median of these is the 32nd of 63, which
    # numpy's own takes ten times as long to say.
    return int(np.packbits(low > np.partition(low[1:], 31)[31]).view(np.uint64)[0])


def _fields(pixels: np.ndarray) -> bytes:
    """The mean colours of 4 x 4 fields, row by row, uint8 RGB."""
    return cv2.resize(pixels, (_FIELDS, _FIELDS), interpolation=cv2.INTER_AREA).tobytes()
