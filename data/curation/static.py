"""Clips in which nothing moves, and slideshows."""

from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from data.curation.base import Failure
from data.curation.video import Frame, Scorer, VideoFilter
from data.video import Timeline

_SIDE = 64
_MOVED = 6
"""Grey levels by which a pixel (of the shrunk frame) has to change; codecs' own flicker is below."""
_MOVED_SHARE = 0.002
"""Share of pixels that have to change: about the size of a person's head in a long shot."""
_OTHER = 10.0
"""Mean grey levels between what counts as two pictures."""
_SHOWN = 3
"""Frames for which a picture has to stand to count as shown."""


class Static(VideoFilter):
    """How much of a clip stands still.

    still       share of the time in which nothing changes, from 0 to 1; frozen clips have 1
    pictures    how many different still pictures are shown, each for at least three frames in a row
    slideshow   whether there are at least two such pictures and `still` is above `share`: pictures one after the other,
                by cuts or dissolves. Slideshows that zoom or pan over their pictures are not found.

    Args:
        fps: frames per second that are compared.
        share: see `slideshow`.
    """

    name = "static"
    columns = pa.schema({"still": pa.float32(), "pictures": pa.uint16(), "slideshow": pa.bool_()})

    def __init__(self, fps: float = 4.0, share: float = 0.5) -> None:
        if fps <= 0 or not 0 <= share <= 1:
            raise ValueError(f"static: fps={fps} must be positive and share={share} in [0, 1]")
        self.fps, self.share = fps, share

    def settings(self) -> dict[str, Any]:
        return {"fps": self.fps, "share": self.share}

    def watch(self, timeline: Timeline) -> Scorer:
        return _Stillness(self.fps, self.share)


class _Stillness:
    def __init__(self, fps: float, share: float) -> None:
        self._fps, self._share = fps, share
        self._before: np.ndarray | None = None
        self._picture: np.ndarray | None = None  # the last one that was shown
        self._seen = self._pairs = self._still = self._standing = self._pictures = 0

    def see(self, frame: Frame) -> None:
        if frame.time * self._fps < self._seen - 1e-3:
            return
        self._seen += 1
        image = frame.luma(_SIDE).copy()
        if self._before is not None:
            self._pairs += 1
            if _moves(self._before, image):
                self._standing = 0
            else:
                self._still += 1
                self._standing += 1
                if self._standing == _SHOWN - 1:
                    self._show(image)
        self._before = image

    def _show(self, image: np.ndarray) -> None:
        if self._picture is None or cv2.norm(self._picture, image, cv2.NORM_L1) > _OTHER * image.size:
            self._pictures += 1
        self._picture = image

    def scores(self) -> Mapping[str, Any] | Failure:
        if not self._pairs:
            return Failure("shorter than two frames at the filter's fps")
        still = self._still / self._pairs
        return {"still": still, "pictures": self._pictures, "slideshow": self._pictures > 1 and still > self._share}


def _moves(before: np.ndarray, after: np.ndarray) -> bool:
    return int(np.count_nonzero(cv2.absdiff(before, after) > _MOVED)) > _MOVED_SHARE * before.size
