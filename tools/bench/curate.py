"""Filters on one core against the bare library calls that they rest on, one after the other on the same samples.

A filter's side goes through its `score`, as in the `curate` job; the other is the shortest loop over the libraries that
gives a like figure. Both decode.
"""

import io
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import cv2
import numpy as np
import simplejpeg

from data.curation.base import Filter, Media
from data.curation.cuts import Cuts
from data.curation.motion import Motion
from data.curation.probe import Probe
from data.curation.sharpness import Sharpness
from data.curation.static import Static
from data.tasks import one_thread

_FPS = 25


def run(
    pictures: int = 64,
    clips: int = 2,
    height: int = 360,
    frames: int = 100,
    repeats: int = 5,
    only: Sequence[str] = (),
) -> dict[str, Any]:
    """Samples per second and their ratio to the bare library's, by filter: medians of alternating measurements, in CPU
    seconds of one thread.

    Args:
        pictures: JPEGs, of `height` pixels and 16 : 9.
        clips: H.264, of the same size.
        height: pixels, even.
        frames: of each clip, at 25 fps.
        repeats: measurements behind each median.
        only: names of filters; all by default.
    """
    one_thread()
    images = [Media(str(i), {}, "image", _picture(height, i), 512) for i in range(pictures)]
    videos = [Media(str(i), {}, "video", _clip(height, frames, i), 512) for i in range(clips)]
    compared: list[tuple[Filter, Callable[[bytes], Any], list[Media]]] = [
        (Sharpness(), _bare_sharpness, images),
        (Probe(), _bare_probe, videos),
        (Motion(), _bare_motion, videos),
        (Static(), _bare_static, videos),
        (Cuts(), _bare_cuts, videos),
    ]
    names = [one.name for one, _, _ in compared]
    if unknown := sorted(set(only) - set(names)):
        raise ValueError(f"there is no measurement of the filter {unknown[0]!r}; there are {', '.join(names)}")
    chosen = [row for row in compared if not only or row[0].name in only]
    return {one.name: _compare(one, bare, samples, repeats) for one, bare, samples in chosen}


def _compare(one: Filter, bare: Callable[[bytes], Any], samples: Sequence[Media], repeats: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {"filter": [], "library": []}
    for repeat in range(repeats + 1):  # the first one warms caches
        fresh = [Media(s.key, s.row, s.kind, s.data, s.side) for s in samples]  # a pass decodes each sample once
        begin = time.process_time()
        one.score(fresh)
        middle = time.process_time()
        for sample in samples:
            bare(sample.data)
        end = time.process_time()
        if repeat:
            seconds["filter"].append(middle - begin)
            seconds["library"].append(end - middle)
    ours, theirs = (len(samples) / statistics.median(seconds[side]) for side in ("filter", "library"))
    ratios = [theirs / ours for ours, theirs in zip(seconds["filter"], seconds["library"], strict=True)]
    return {"samples_per_s": ours, "library_samples_per_s": theirs, "ratio": statistics.median(ratios)}


# The bare library calls


def _bare_sharpness(data: bytes) -> float:
    grey = cv2.cvtColor(simplejpeg.decode_jpeg(data, "RGB"), cv2.COLOR_RGB2GRAY)
    return cv2.meanStdDev(cv2.Laplacian(grey, cv2.CV_16S))[1][0, 0] ** 2


def _bare_probe(data: bytes) -> int:
    import av

    with av.open(io.BytesIO(data), mode="r") as container:
        stream = container.streams.video[0]
        next(container.decode(stream))
    with av.open(io.BytesIO(data), mode="r") as container:
        return sum(packet.is_keyframe for packet in container.demux(container.streams.video[0]))


def _bare_motion(data: bytes) -> float:
    before, speeds = None, []
    for i, luma in enumerate(_luma(data)):
        if i % (_FPS // 2):
            continue
        image = _shrunk(luma, 128)
        if before is not None:
            flow = cv2.calcOpticalFlowFarneback(before, image, None, 0.5, 4, 15, 3, 5, 1.2, 0)  # type: ignore[call-overload]
            speeds.append(np.linalg.norm(flow, axis=2).mean())
        before = image
    return float(np.mean(speeds))


def _bare_static(data: bytes) -> list[float]:
    before, changes = None, []
    for i, luma in enumerate(_luma(data)):
        if i % (_FPS // 4):
            continue
        image = _shrunk(luma, 64)
        if before is not None:
            changes.append(cv2.norm(before, image, cv2.NORM_L1))
        before = image
    return changes


def _bare_cuts(data: bytes) -> list[float]:
    """Content detection at its simplest: small frames in HSV and how much each differs from the one before."""
    import av

    before, changes = None, []
    with av.open(io.BytesIO(data), mode="r") as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        for frame in container.decode(stream):
            image = cv2.cvtColor(_shrunk(frame.to_ndarray(format="rgb24"), 64), cv2.COLOR_RGB2HSV)
            if before is not None:
                changes.append(cv2.norm(before, image, cv2.NORM_L1))
            before = image
    return changes


def _luma(data: bytes) -> Iterator[np.ndarray]:
    """The brightness of each frame, at full size."""
    import av

    with av.open(io.BytesIO(data), mode="r") as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        for frame in container.decode(stream):
            plane = frame.planes[0]
            yield np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, -1)[:, : plane.width]


def _shrunk(image: np.ndarray, side: int) -> np.ndarray:
    height, width = image.shape[:2]
    return cv2.resize(image, (width * side // height, side), interpolation=cv2.INTER_AREA)


# Samples


def _clouds(height: int, seed: int) -> np.ndarray:
    """(height, 16/9 height, 3) uint8: detail of all sizes, as in photographs."""
    random = np.random.default_rng(seed)
    width = height * 16 // 9 // 2 * 2
    picture = np.zeros((height, width, 3), np.float32)
    for grain in (1, 4, 16):
        noise = random.normal(size=(height // grain + 1, width // grain + 1, 3)).astype(np.float32)
        picture += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC) * grain**0.5
    return np.clip(picture * 15 + 128, 0, 255).astype(np.uint8)


def _picture(height: int, seed: int) -> bytes:
    return simplejpeg.encode_jpeg(_clouds(height, seed), quality=90)


def _clip(height: int, frames: int, seed: int) -> bytes:
    """A picture that moves, with a cut in the middle."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(_FPS), options={"preset": "veryfast", "crf": "23"})
        shots = _clouds(height, 2 * seed), _clouds(height, 2 * seed + 1)
        stream.height, stream.width = shots[0].shape[:2]
        for i in range(frames):
            picture = np.roll(shots[2 * i // frames], 2 * i, axis=1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())
    return file.getvalue()
