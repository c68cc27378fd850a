"""Clips for filters: each is decoded once, frame by frame, for all that watch it.

Frames are handed on as they are decoded and then forgotten, so that an hour of film takes no more memory than a second.
Where only some frames are wanted, decoding begins at the key frames before them.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from data.curation.base import Failure, Filter, Media, Place
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
        return _upright(self._frame)

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
        with OpenClips() as clips:
            return [watch_together([self], sample, clips)[0][0] for sample in samples]


class Scorer(Watcher, Protocol):
    """A watcher that has scores in the end."""

    def scores(self) -> Mapping[str, Any] | Failure:
        """As an entry of `Filter.score`; asked once, after the last frame."""


class OpenClips:
    """Clips to be decoded. The last one stays open, as parts of one video follow each other."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self._data: bytes | None = None
        self._clip: Clip | None = None

    def open(self, data: bytes) -> Clip:
        """The clip of these bytes.

        Raises:
            VideoError: it is none.
        """
        if self._clip is None or self._data is not data:
            self.close()
            self._clip, self._data = self._open.enter_context(open_clip(data)), data
        return self._clip

    def close(self) -> None:
        """Let go of the clip."""
        self._data = self._clip = None
        self._open.close()

    def __enter__(self) -> "OpenClips":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def watch_together(
    filters: Sequence[VideoFilter], sample: Media, clips: OpenClips, places: Sequence[Place] = ()
) -> tuple[list[Mapping[str, Any] | Failure], dict[Place, Media] | Failure]:
    """What each filter makes of a clip, and its frames at some places, as pictures whose shorter side is at most
    `Media.side`. The clip is decoded once: whole for filters, else where the frames are. They are the same in any
    company: only of a clip that cannot be decoded whole are they sought even if it was watched.
    """
    scores: list[Mapping[str, Any] | Failure] = []
    images: dict[Place, np.ndarray] = {}
    try:
        clip = clips.open(sample.data)
        span = sample.span or (0, len(clip.timeline))
    except VideoError as error:
        failure = Failure("undecodable clip", str(error))
        return [failure] * len(filters), failure
    if filters:
        stills = _Stills(places, sample.side)
        try:
            scorers = [one.watch(clip.timeline) for one in filters]
            count = _show(clip, span, [*scorers, stills])
            scores = [scorer.scores() for scorer in scorers]
            images = stills.images if count == span[1] - span[0] else {}
        except VideoError as error:
            scores = [Failure("undecodable clip", str(error))] * len(filters)
    try:
        if not images:
            images = {place: shrink(still(clip, span, place), sample.side) for place in places}
    except VideoError as error:
        return scores, Failure("undecodable clip", str(error))
    return scores, {
        place: Media(sample.key, sample.row, "image", b"", sample.side, picture=image)
        for place, image in images.items()
    }


def _show(clip: Clip, span: tuple[int, int], watchers: Sequence[Watcher]) -> int:
    """Decode frames of a clip once for all watchers. Returns how many there were.

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
    return index


def still(clip: Clip, span: tuple[int, int], place: Place) -> np.ndarray:
    """(H, W, 3) uint8 RGB, upright: what is shown of a clip's frames [start, end) at a place. Of a clip of few frames,
    several places may show the same.

    Raises:
        VideoError: it cannot be decoded.
    """
    start, end = span
    at = start + _index(place, end - start)
    for frame in clip.frames(at, at + 1):
        return _upright(frame)
    shown = None  # the frame is missing, and the one before stays
    for frame in clip.frames(start, at + 1):
        shown = frame
    if shown is None:
        raise VideoError("no frame could be decoded")
    return _upright(shown)


def _index(place: Place, count: int) -> int:
    return {"first": 0, "middle": count // 2, "last": count - 1}[place]


def _upright(frame: "av.VideoFrame") -> np.ndarray:
    """(H, W, 3) uint8 RGB; a copy."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90 % 4))


class _Stills:
    """Keeps the frames at some places of a clip that is watched."""

    def __init__(self, places: Sequence[Place], side: int) -> None:
        self._places, self._side = places, side
        self.images: dict[Place, np.ndarray] = {}

    def see(self, frame: Frame) -> None:
        for place in self._places:
            if frame.index == _index(place, frame.count):
                self.images[place] = shrink(frame.image, self._side)


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
