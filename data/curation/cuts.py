"""Where a video is cut: hard cuts, dissolves, and fades through black or any other colour."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from data.clips import CLIP, CUTS
from data.curation.base import Failure
from data.curation.video import Frame, Scorer, VideoFilter
from data.video import Timeline

_THUMB = 32
_BINS = 32
_BLANK = 5.0
"""Standard deviation of brightness below which a frame is of one colour."""
_NEAREST = 4
"""Frames that two cuts lie apart at least."""
_CHUNK = 4096
_TELLING = 10.0
"""Grey levels by which colours must differ for a gradual change to be followed by them."""
_ALIKE = 0.7
"""Correlation from which two frames show the same scene."""
_PIXELS, _COLOURS, _TINTS = range(3)  # kinds of distances


@dataclass(frozen=True)
class Cut:
    """A change from one shot to the next.

    Args:
        frame: first frame of the next shot; of a gradual change, the middle.
        begin: first frame that is no longer the shot before alone.
        end: first frame that is the next shot alone; equal to `frame` and `begin` for a hard cut.
    """

    frame: int
    begin: int
    end: int


class Cuts(VideoFilter):
    """Cuts, and the shots between them as the clips of a clips manifest (data/clips.py).

    As in SVD (arXiv 2311.15127, section 3.1 and appendix C) a cascade of detectors at several frame rates, each for
    changes that take longer than those of the one before, with thresholds of its own. A detector holds the few frames
    before a place against the few after it. It compares pixels of small pictures and distributions of colour, each
    after its own measure of how much they change within either side: so the cuts between moving pictures are found, and
    motion is not taken for cuts. The least different pair counts: a flash, after which all is as before, is no cut.
    A run of frames of one colour, with different shots around it, is a fade; its cut is in the middle.

    shots      how many there are
    cuts       frame at which each shot but the first begins, in the middle of gradual changes
    clips      a list of `data.clips.CLIP`: the shots without the frames of gradual changes

    Args:
        spans: seconds that a change may take, for each detector, rising; 0: from one frame to the next.
        thresholds: grey levels (of 255) by which frames must differ, for each detector.
        contrast: how many times as much as within either side they must differ, for each detector.
    """

    name = CUTS
    columns = pa.schema({"shots": pa.uint32(), "cuts": pa.list_(pa.uint32()), "clips": pa.list_(CLIP)})

    def __init__(
        self,
        spans: list[float] = [0.0, 0.16, 0.8],  # noqa: B006
        thresholds: list[float] = [8.0, 16.0, 20.0],  # noqa: B006
        contrast: list[float] = [2.5, 2.0, 1.7],  # noqa: B006
    ) -> None:
        if not len(spans) == len(thresholds) == len(contrast) > 0:
            raise ValueError("cuts: spans, thresholds and contrast need an entry for each detector")
        if sorted(spans) != spans or spans[0] < 0:
            raise ValueError(f"cuts: spans {spans} must rise from 0 on")
        if min(thresholds) <= 0 or min(contrast) < 0:
            raise ValueError(f"cuts: thresholds {thresholds} and contrast {contrast} must be positive")
        self.spans, self.thresholds, self.contrast = spans, thresholds, contrast

    def settings(self) -> dict[str, Any]:
        return {"spans": self.spans, "thresholds": self.thresholds, "contrast": self.contrast}

    def watch(self, timeline: Timeline) -> Scorer:
        return _Shots(self, timeline)

    def find(self, frames: "Thumbnails", fps: float) -> list[Cut]:
        """The cuts between frames, in order."""
        places: list[tuple[int, Cut]] = []  # with the last frame that was held to be before it
        for span, threshold, contrast in zip(self.spans, self.thresholds, self.contrast, strict=True):
            gap = max(round(span * fps), 1)
            # Slower detectors see again what faster ones have found.
            places += [
                (place, cut)
                for place, cut in _detect(frames, gap, threshold, contrast)
                if not any(place <= other.end and earlier <= place + gap for earlier, other in places)
            ]
        fades = [f for f in frames.fades() if not any(_edge(frames, cut, f) for _, cut in places)]
        kept = [cut for place, cut in places if not any(place <= f.end and f.begin <= cut.end for f in fades)]
        return sorted([*kept, *fades], key=lambda cut: cut.frame)


def _detect(frames: "Thumbnails", gap: int, threshold: float, contrast: float) -> list[tuple[int, Cut]]:
    """Changes from a frame to the `gap`-th after it (1: hard cuts), and that frame."""
    # The light of a scene may change within a second, but not from one frame to the next.
    step, width = (1, 5) if gap == 1 else (max(gap // 4, 1), 3)
    scores = np.maximum(
        _score(frames, _PIXELS, gap, step, width, threshold, contrast),
        _score(frames, _COLOURS if gap == 1 else _TINTS, gap, step, width, threshold / 2, 2 * contrast),
    )
    cuts = []
    # Non-maximum suppression: the best place first, then the best that is not too near to any before.
    radius = max(gap, _NEAREST - 1)
    open_places = scores > 1
    while open_places.any():
        best = int(np.argmax(np.where(open_places, scores, 0)))
        open_places[max(best - radius, 0) : best + radius + 1] = False
        if frames.correlation(best, best + gap) < _ALIKE:
            hard = Cut(best + 1, best + 1, best + 1)
            cuts.append((best, hard if gap == 1 else frames.transition(best, best + gap)))
    return cuts


def _edge(frames: "Thumbnails", cut: Cut, fade: Cut) -> bool:
    """Whether a hard cut, not a gradual change, is how the blank frames of a fade begin or end."""
    if cut.begin != cut.end or not fade.begin <= cut.frame <= fade.end:
        return False
    least, most = sorted([float(frames.deviation[cut.frame - 1]), float(frames.deviation[cut.frame])])
    side = frames.deviation[fade.begin - 1] if cut.frame <= fade.frame else frames.deviation[fade.end]
    return least < _BLANK and most > 0.6 * side


def _score(
    frames: "Thumbnails", kind: int, gap: int, step: int, width: int, threshold: float, contrast: float
) -> np.ndarray:
    """(N,): how far the change from frame t to frame t + gap exceeds what it needs to be a cut; above 1 it is one."""
    count = len(frames)
    across = np.full(count, np.inf)
    for before in range(width):
        for after in range(width):
            distance = frames.distances(kind, gap + (before + after) * step)
            first = before * step
            part = across[first : first + len(distance)]
            np.minimum(part, distance[: len(part)], out=part)
    across[~np.isfinite(across)] = 0
    across[max(count - gap, 0) :] = 0
    own = frames.distances(kind, gap)
    sides = np.full((2, width, count), np.nan)
    for i in range(width):
        first = gap + i * step
        if first < count:  # from t - i step - gap to t - i step
            part = own[: count - first]
            sides[0, i, first : first + len(part)] = part
        part = own[gap + i * step :]  # from t + gap + i step to t + 2 gap + i step
        sides[1, i, : len(part)] = part
    ordered = np.sort(sides, axis=1)  # NaN last
    known = np.isfinite(sides).sum(1)
    middle = np.take_along_axis(ordered, np.maximum((known - 1) // 2, 0)[:, None], axis=1)[:, 0]
    within = np.nan_to_num(middle).max(0)
    if gap > 1:  # gradual changes are told from other events only by what stays as it is before and after
        known = (width - 1) * step
        across[:known] = across[max(count - gap - known, 0) :] = 0
    need = threshold + contrast * within
    if gap == 1:  # what comes into view or flashes takes more than a frame
        beside = np.pad(own, (1, 2))[: count + 2]
        need = np.maximum(need, 1.5 * np.maximum(beside[:count], beside[2 : count + 2]))
    return across / need


class Thumbnails:
    """N frames, each as small as cut detection needs it.

    Args:
        luma: (N, P) uint8.
        shape: height and width of `luma`'s pictures.
        chroma: (N, Q) uint8, both colour differences.
        colours: (N, 3 bins) float32: cumulative distributions of brightness and both colour differences.
        deviation: (N,) float32: standard deviation of brightness.
    """

    def __init__(
        self,
        luma: np.ndarray,
        shape: tuple[int, int],
        chroma: np.ndarray,
        colours: np.ndarray,
        deviation: np.ndarray,
    ) -> None:
        self.luma, self.shape, self.chroma, self.colours, self.deviation = luma, shape, chroma, colours, deviation
        self._distances: dict[tuple[int, int], np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.luma)

    def distances(self, kind: int, lag: int) -> np.ndarray:
        """(N - lag,) float: how different each frame is from the one `lag` later, in grey levels.

        Args:
            kind: the mean difference of pixels; how far brightness and colours have to be shifted (earth mover's
                distance); or the same apart from the shift of the mean brightness. Sums over the three planes.
            lag: frames, at least 1.
        """
        if (kind, lag) not in self._distances:
            count = max(len(self) - lag, 0)
            parts = [slice(i, min(i + _CHUNK, count)) for i in range(0, count, _CHUNK)]
            found = [self._between(kind, part, slice(part.start + lag, part.stop + lag)) for part in parts]
            self._distances[kind, lag] = np.concatenate([np.empty(0, np.float32), *found])
        return self._distances[kind, lag]

    def _between(self, kind: int, a: slice, b: slice) -> np.ndarray:
        if kind != _PIXELS:
            moved = (self.colours[a] - self.colours[b]) * (256 / _BINS)
            distance = np.abs(moved).sum(1)
            return distance if kind == _COLOURS else distance - np.abs(moved[:, :_BINS].sum(1))
        return _difference(self.luma[a], self.luma[b]) + 2 * _difference(self.chroma[a], self.chroma[b])

    def between(self, kind: int, a: int, b: int) -> float:
        """Distance of two frames; see `distances`."""
        return float(self._between(kind, slice(a, a + 1), slice(b, b + 1))[0])

    def transition(self, before: int, after: int) -> Cut:
        """The gradual change between a frame of one shot and one of the next."""
        inside = range(before + 1, after)
        # Colours mix as evenly as pixels do, and motion does not change them.
        kind = _COLOURS if self.between(_COLOURS, before, after) > _TELLING else _PIXELS
        whole = self.between(kind, before, after)
        past = [self.between(kind, before, i) for i in inside]
        ahead = [self.between(kind, i, after) for i in inside]
        frame = next((i for i, a, b in zip(inside, past, ahead, strict=True) if b < a), after)
        begin = next((i for i, a in zip(inside, past, strict=True) if a > whole / 6), after)
        end = next((i + 1 for i, b in zip(reversed(inside), reversed(ahead), strict=True) if b > whole / 6), before + 1)
        return Cut(frame, min(begin, frame), max(end, frame))

    def correlation(self, a: int, b: int) -> float:
        """Of the brightness of two frames' coarse pixels, from -1 to 1: near 1 for one scene, also in another light and
        a little moved."""
        first, second = (self._coarse(i) for i in (a, b))
        length = float(np.linalg.norm(first) * np.linalg.norm(second))
        return float(first @ second) / length if length > 0 else 0.0

    def _coarse(self, i: int) -> np.ndarray:
        small = cv2.resize(self.luma[i].reshape(self.shape), None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)
        return small.ravel().astype(np.float32) - small.mean()

    def fades(self) -> list[Cut]:
        """Changes through frames of one colour."""
        blank = np.concatenate([[False], self.deviation < _BLANK, [False]])
        edges = np.flatnonzero(blank[1:] != blank[:-1])
        cuts = []
        for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            if start == 0 or stop == len(self):
                continue  # the video begins or ends with it
            # Contrast falls all the way down to the blank frames, and rises again after them.
            begin, end = start, stop
            while begin > 1 and self.deviation[begin - 2] > self.deviation[begin - 1]:
                begin -= 1
            while end < len(self) - 1 and self.deviation[end + 1] > self.deviation[end]:
                end += 1
            # Beside a flash of white or black, the second frame is as rich in contrast as all others.
            falls = self.deviation[max(start - 2, 0)] < 0.8 * self.deviation[begin - 1]
            rises = self.deviation[min(stop + 1, len(self) - 1)] < 0.8 * self.deviation[end]
            if (falls or rises or stop - start >= _NEAREST) and self.correlation(begin - 1, end) < _ALIKE:
                cuts.append(Cut((start + stop) // 2, begin, end))
        return cuts


def _difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N,): mean absolute difference of the rows of two (N, P) uint8 arrays."""
    total = cv2.reduce(cv2.absdiff(a, b), 1, cv2.REDUCE_SUM, dtype=cv2.CV_32S)
    return total[:, 0].astype(np.float32) / a.shape[1]


class _Shots:
    """Gathers thumbnails and finds the cuts in the end."""

    def __init__(self, filter: Cuts, timeline: Timeline) -> None:
        self._filter, self._timeline = filter, timeline
        self._luma: list[np.ndarray] = []
        self._chroma: list[np.ndarray] = []
        self._colours: list[np.ndarray] = []
        self._deviation: list[float] = []

    def see(self, frame: Frame) -> None:
        luma, (blue, red) = frame.luma(2 * _THUMB), frame.chroma(_THUMB)
        height, width = luma.shape
        small = cv2.resize(luma, (max(width // 2, 1), max(height // 2, 1)), interpolation=cv2.INTER_AREA)
        self._luma.append(small)
        self._chroma.append(np.concatenate([blue, red], axis=None))
        counts = [
            cv2.calcHist([plane], [0], None, [_BINS], [0, 256]).ravel() / plane.size for plane in (luma, blue, red)
        ]
        self._colours.append(np.concatenate(counts))
        self._deviation.append(float(cv2.meanStdDev(luma)[1][0, 0]))

    def scores(self) -> Mapping[str, Any] | Failure:
        shapes = {(a.shape, len(b)) for a, b in zip(self._luma, self._chroma, strict=True)}
        if len(shapes) > 1:
            return Failure("frames of several sizes")
        if len(self._luma) != len(self._timeline):
            return Failure("frames missing", f"{len(self._luma)} of {len(self._timeline)} could be decoded")
        seconds = self._timeline.seconds
        colours = np.cumsum(np.stack(self._colours).reshape(-1, 3, _BINS), axis=2).reshape(-1, 3 * _BINS)
        luma = np.stack(self._luma).reshape(len(self._luma), -1)
        deviation = np.array(self._deviation, np.float32)
        frames = Thumbnails(luma, self._luma[0].shape, np.stack(self._chroma), colours, deviation)
        cuts = self._filter.find(frames, len(frames) / seconds[-1])
        return {
            "shots": len(cuts) + 1,
            "cuts": [cut.frame for cut in cuts],
            "clips": _clips(cuts, self._timeline),
        }


def _clips(cuts: Sequence[Cut], timeline: Timeline) -> list[dict[str, Any]]:
    seconds = timeline.seconds.tolist()
    clips = []
    starts, ends = [0, *(cut.end for cut in cuts)], [*(cut.begin for cut in cuts), len(timeline)]
    for start, end in zip(starts, ends, strict=True):
        if start >= end:
            continue  # nothing but gradual changes
        copied = timeline.copyable(start, end)
        clip: dict[str, Any] = {"start": seconds[start], "end": seconds[end], "start_frame": start, "end_frame": end}
        if copied is not None:
            begin, stop = copied
            clip |= {"copy_start": seconds[begin], "copy_end": seconds[stop]}
            clip |= {"copy_start_frame": begin, "copy_end_frame": stop}
        clips.append(clip)
    return clips
