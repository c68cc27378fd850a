"""Clips for filters: each is decoded once, frame by frame, for all that watch it.

Frames are handed on as they are decoded and then forgotten, so that an hour of film takes no more memory than a second.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from data.curation.base import Failure, Filter, Media
from data.curation.sharpness import shrink
from data.video import Clip, Timeline, VideoError, open_clip

if TYPE_CHECKING:
    import av

_PLANAR = ("yuv420p", "yuvj420p")


class Frame:
    """A frame of a clip. Its pixels last until the next one comes, unless they are copied.

    Args:
        frame: as decoded.
        index: from the clip's first frame on.
        count: frames in the clip, as its container announces them.
        time: seconds from the clip's first frame on.
    """

    def __init__(self, frame: "av.VideoFrame", index: int, count: int, time: float) -> None:
        self._frame, self.index, self.count, self.time = frame, index, count, time
        self._small: dict[tuple[int, int], np.ndarray] = {}

    def luma(self, side: int) -> np.ndarray:
        """(h, w) uint8: the brightness, shrunk to a shorter side of so many pixels; smaller frames as they are."""
        return self._plane(0, side)

    def chroma(self, side: int) -> tuple[np.ndarray, np.ndarray]:
        """Twice (h, w) uint8: the colour differences Cb and Cr, shrunk as `luma`; at full size they have half of it."""
        return self._plane(1, side), self._plane(2, side)

    @property
    def image(self) -> np.ndarray:
        """(H, W, 3) uint8 RGB, upright, at full size; a copy."""
        pixels = self._frame.to_ndarray(format="rgb24")
        return np.ascontiguousarray(np.rot90(pixels, self._frame.rotation // 90 % 4))

    def _plane(self, plane: int, side: int) -> np.ndarray:
        if (plane, side) not in self._small:
            self._small[plane, side] = shrink(self._planes[plane], side)
        return self._small[plane, side]

    @cached_property
    def _planes(self) -> list[np.ndarray]:
        frame = self._frame if self._frame.format.name in _PLANAR else self._frame.reformat(format="yuv420p")
        return [
            np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]
            for plane in frame.planes
        ]


class Watcher(Protocol):
    """Something that sees a clip's frames, one after the other."""

    def see(self, frame: Frame) -> None:
        """The next frame."""


class VideoFilter(Filter):
    """Scores clips from their frames. A pass decodes each clip once and shows it to all its video filters."""

    media: ClassVar = "video"

    @abstractmethod
    def watch(self, timeline: Timeline) -> "Scorer":
        """What is to see the frames of a clip, whose times are given (all of the file, if the clip is a part of it)."""

    def score(self, samples: Sequence[Media]) -> Sequence[Mapping[str, Any] | Failure]:
        return [score_together([self], sample)[0] for sample in samples]


class Scorer(Watcher, Protocol):
    """A watcher that has scores in the end."""

    def scores(self) -> Mapping[str, Any] | Failure:
        """As an entry of `Filter.score`; asked once, after the last frame."""


def score_together(
    filters: Sequence[VideoFilter], sample: Media, others: Sequence[Watcher] = ()
) -> list[Mapping[str, Any] | Failure]:
    """What each filter makes of a clip, which is decoded once. `others` see its frames too."""
    try:
        with open_clip(sample.data) as clip:
            scorers = [one.watch(clip.timeline) for one in filters]
            _show(clip, sample.span or (0, len(clip.timeline)), [*scorers, *others])
    except VideoError as error:
        return [Failure("undecodable clip", str(error))] * len(filters)
    return [scorer.scores() for scorer in scorers]


def _show(clip: Clip, span: tuple[int, int], watchers: Sequence[Watcher]) -> None:
    """Decode frames of a clip once for all watchers.

    Raises:
        VideoError: that cannot be done to its end.
    """
    unit = float(clip.timeline.time_base)  # frames that decoders still held at the end do not know it
    index, begin = 0, 0
    for frame in clip.frames(*span):
        assert frame.pts is not None, "frames are found by their times"
        begin = frame.pts if index == 0 else begin
        seen = Frame(frame, index, span[1] - span[0], (frame.pts - begin) * unit)
        for watcher in watchers:
            watcher.see(seen)
        index += 1
    if index == 0:
        raise VideoError("no frame could be decoded")


class Stills:
    """Keeps the first, the middle and the last frame of a clip, for filters that look at pictures (SVD, arXiv
    2311.15127, appendix C, judges text, aesthetics and captions by these three).

    Args:
        side: frames are shrunk to a shorter side of so many pixels.
    """

    def __init__(self, side: int) -> None:
        self._side = side
        self._images: list[np.ndarray] = []
        self._middle = 0
        self._last: Frame | None = None

    def see(self, frame: Frame) -> None:
        if frame.index == 0:
            self._middle = frame.count // 2
            self._images = [self._image(frame)]
        if frame.index == self._middle:
            self._images.append(self._image(frame))
        self._last = frame  # holds on to the decoded frame: it is made a picture of only if no other follows

    def media(self, sample: Media) -> list[Media] | Failure:
        """The three pictures, or why the clip has none; those of a very short clip may be the same."""
        if self._last is None:
            return Failure("undecodable clip", "no frames")
        images = [*self._images, self._image(self._last)]
        return [
            Media(sample.key, sample.row, "image", b"", self._side, picture=image)
            for image in (images[0], images[-2], images[-1])
        ]

    def _image(self, frame: Frame) -> np.ndarray:
        return shrink(frame.image, self._side)


def combine(frames: Sequence[Mapping[str, Any] | Failure], names: Sequence[str]) -> Mapping[str, Any] | Failure:
    """A clip's scores from those of its frames: the means of numbers; lists of numbers, which are embeddings, averaged
    and brought to the mean of their lengths again; what else there is (hashes, flags, texts) from the middle frame."""
    if len(frames) == 1:
        return frames[0]
    for outcome in frames:
        if isinstance(outcome, Failure):
            return outcome
    scores = [outcome for outcome in frames if not isinstance(outcome, Failure)]
    return {name: _combine([values.get(name) for values in scores]) for name in names}


def _combine(values: Sequence[Any]) -> Any:
    told = [value for value in values if value is not None]
    if not told:
        return None
    if all(isinstance(value, float | np.floating) for value in told):
        return float(np.mean(told))
    if all(
        isinstance(value, list | np.ndarray) and np.issubdtype(np.asarray(value).dtype, np.floating) for value in told
    ):
        vectors = np.asarray(told, dtype=np.float64)
        mean = vectors.mean(0)
        length = np.linalg.norm(mean)
        scale = np.linalg.norm(vectors, axis=1).mean() / length if length > 0 else 1.0
        return (mean * scale).astype(np.asarray(told).dtype)
    return values[len(values) // 2]
