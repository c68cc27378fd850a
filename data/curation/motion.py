"""How much moves in a clip."""

from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from data.curation.base import Failure
from data.curation.sharpness import shrink
from data.curation.video import Frame, Scorer, VideoFilter
from data.video import Timeline

_CELLS = 16


class Motion(VideoFilter):
    """`motion`: the mean length of the optical flow, in hundredths of the shorter side per second.

    As in SVD (arXiv 2311.15127, appendix C): dense flow (Farneback 2003, "Two-frame motion estimation based on
    polynomial expansion") between frames at 2 fps, its maps averaged down to a shorter side of 16, then over cells and
    time. Of a clip too short for two such frames, between its first and its last. What moves by more than about a
    quarter of the shorter side from one such frame to the next is found too slow.

    Args:
        fps: frames per second between which flow is computed.
        side: pixels of the shorter side to which frames are shrunk for it.
    """

    name = "motion"
    columns = pa.schema({"motion": pa.float32()})

    def __init__(self, fps: float = 2.0, side: int = 128) -> None:
        if fps <= 0 or side < _CELLS:
            raise ValueError(f"motion: fps={fps} must be positive and side={side} at least {_CELLS}")
        self.fps, self.side = fps, side

    def settings(self) -> dict[str, Any]:
        return {"fps": self.fps, "side": self.side}

    def watch(self, timeline: Timeline) -> Scorer:
        return _Flow(self.fps, self.side)


class _Flow:
    def __init__(self, fps: float, side: int) -> None:
        self._fps, self._side = fps, side
        self._before: np.ndarray | None = None
        self._time = 0.0
        self._speeds: list[float] = []

    def see(self, frame: Frame) -> None:
        due = frame.time * self._fps >= len(self._speeds) + 1 - 1e-3 if self._before is not None else True
        if self._before is not None and not due and (self._speeds or frame.index < frame.count - 1):
            return
        image = frame.luma(self._side).copy()
        if self._before is not None:
            self._speeds.append(speed(self._before, image, frame.time - self._time))
        self._before, self._time = image, frame.time

    def scores(self) -> Mapping[str, Any] | Failure:
        return {"motion": float(np.mean(self._speeds))} if self._speeds else Failure("a clip of one frame")


def speed(before: np.ndarray, after: np.ndarray, seconds: float) -> float:
    """Mean length of the flow between two grey frames of one size: hundredths of the shorter side per second."""
    flow = flow_map(before, after)
    lengths = np.linalg.norm(shrink(flow, _CELLS), axis=2)
    return float(lengths.mean()) * 100 / min(before.shape) / seconds


def flow_map(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """(H, W, 2) float32: Farneback's flow in pixels between two (H, W) uint8 frames, from coarse to fine.

    OpenCV's own pyramid ends at 32 pixels, too early for what moves within half a second. Ours goes down to 8.
    """
    flow: np.ndarray = np.zeros((1, 1, 2), np.float32)
    for level in reversed(range(int(np.log2(min(before.shape) / 8)) + 1)):
        first, second = (_halved(image, level) for image in (before, after))
        height, width = first.shape
        flow = cv2.resize(flow, (width, height)) * np.array([width / flow.shape[1], height / flow.shape[0]], np.float32)
        flow = cv2.calcOpticalFlowFarneback(first, second, flow, 0.5, 0, 15, 3, 5, 1.2, cv2.OPTFLOW_USE_INITIAL_FLOW)
    return flow


def _halved(image: np.ndarray, times: int) -> np.ndarray:
    if times == 0:
        return image
    height, width = image.shape
    return cv2.resize(image, (width >> times, height >> times), interpolation=cv2.INTER_AREA)
