"""Filters on one core against the bare library calls that they rest on, one after the other on the same samples; and
passes of several filters, which decode once, against the filters one by one.

A filter's side goes through `score_batch`, as in the `curate` job; the other is the shortest loop over the libraries
that gives a like figure. Both decode.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from data.curation.base import Filter, Media
from data.curation.blank import Blank
from data.curation.cuts import Cuts
from data.curation.hashes import ContentHash, PerceptualHash
from data.curation.motion import Motion
from data.curation.passes import score_batch
from data.curation.probe import Probe
from data.curation.sharpness import Sharpness
from data.curation.static import Static
from data.curation.text_area import TextArea
from data.curation.text_detectors import Components, ProbabilityMap
from data.tasks import one_thread
from tools.bench import curate_bare as bare
from tools.bench.curate_samples import clip, picture

_SIDE = 512
_NETWORK_SIDE = 736
_LEAST_SECONDS = 0.05
"""That a measurement takes."""


def run(
    pictures: int = 64,
    clips: int = 2,
    height: int = 360,
    frames: int = 100,
    parts: int = 4,
    repeats: int = 5,
    text_model: str | None = None,
    only: Sequence[str] = (),
) -> dict[str, Any]:
    """Samples per second and their ratio to the alternative's, by measurement: medians of alternating measurements, in
    CPU seconds of one thread.

    sharpness ... cuts  a filter against bare library calls. `text_area` is held against OpenCV's calls for the shapes
                        that it chooses from; `text_area_mser` against OpenCV's own detector of like regions.
    pictures            a pass of all filters of pictures against one pass for each; likewise `videos`
    parts               a pass over clips within videos, by motion and sharpness, against the videos as a whole
    stills              a filter of pictures over videos against decoding them whole, in bare PyAV

    Args:
        pictures: JPEGs, of `height` pixels and 16 : 9.
        clips: H.264, of the same size.
        height: pixels, even.
        frames: of each clip, at 25 fps.
        parts: of a video, for `parts`.
        repeats: measurements behind each median.
        text_model: an ONNX file of a text detector with one map, for `text_area_network`, which else is left out.
        only: names of measurements; all by default.
    """
    one_thread()
    plain = [Media(str(i), {}, "image", picture(height, i), _SIDE) for i in range(pictures)]
    written = [Media(str(i), {}, "image", picture(height, i, text=True), _SIDE) for i in range(pictures)]
    videos = [Media(str(i), {}, "video", clip(height, frames, i), _SIDE) for i in range(clips)]
    edges = [frames * part // parts for part in range(parts + 1)]
    within = [
        Media(f"{video.key}-{n}", {}, "video", video.data, _SIDE, (edges[n], edges[n + 1]))
        for video in videos
        for n in range(parts)
    ]
    of_pictures = [Sharpness(), Blank(), PerceptualHash(), TextArea(Components())]
    of_videos = [Motion(), Static(), Cuts()]
    measured: dict[str, tuple[list[Media], Callable[[list[Media]], Any], Callable[[list[Media]], Any]]] = {
        "sharpness": (plain, _pass(Sharpness()), _pictures(bare.sharpness)),
        "blank": (plain, _pass(Blank()), _pictures(bare.blank)),
        "perceptual_hash": (plain, _pass(PerceptualHash()), _pictures(bare.perceptual_hash)),
        "content_hash": (plain, _pass(ContentHash()), _files(bare.content_hash)),
        "text_area": (written, _pass(TextArea(Components())), _pictures(bare.components)),
        "text_area_mser": (written, _pass(TextArea(Components())), _pictures(bare.extremal_regions)),
        "probe": (videos, _pass(Probe()), _files(bare.probe)),
        "motion": (videos, _pass(Motion()), _files(bare.motion)),
        "static": (videos, _pass(Static()), _files(bare.static)),
        "cuts": (videos, _pass(Cuts()), _files(bare.cuts)),
        "pictures": (written, _pass(*of_pictures), _one_by_one(of_pictures)),
        "videos": (videos, _pass(*of_videos), _one_by_one(of_videos)),
        "parts": (within, _pass(Motion(), Sharpness()), lambda _: score_batch([Motion(), Sharpness()], _fresh(videos))),
        "stills": (videos, _pass(Sharpness()), _files(bare.frames)),
    }
    if text_model is not None:
        detector = ProbabilityMap(text_model, _NETWORK_SIDE)
        measured["text_area_network"] = (
            written[: max(1, pictures // 16)],  # a picture takes a second or so
            _pass(TextArea(detector)),
            _pictures(bare.Network(text_model, _NETWORK_SIDE)),
        )
    if unknown := sorted(set(only) - set(measured)):
        raise ValueError(f"there is no measurement {unknown[0]!r}; there are {', '.join(measured)}")
    return {name: _compare(*measured[name], repeats) for name in only or measured}


def _compare(
    samples: list[Media], ours: Callable[[list[Media]], Any], alternative: Callable[[list[Media]], Any], repeats: int
) -> dict[str, float]:
    seconds: dict[str, list[float]] = {"ours": [], "alternative": []}
    rounds = 1
    for repeat in range(repeats + 1):  # the first one warms caches, and tells how often short ones are to be repeated
        taken = {"ours": 0.0, "alternative": 0.0}
        for _ in range(rounds):
            fresh = _fresh(samples)
            for side, measure in (("ours", ours), ("alternative", alternative)):
                begin = time.process_time()
                measure(fresh)
                taken[side] += time.process_time() - begin
        if repeat:
            for side in seconds:
                seconds[side].append(taken[side] / rounds)
        else:
            rounds = max(1, round(_LEAST_SECONDS / min(taken.values())))
    rates = {side: len(samples) / statistics.median(taken) for side, taken in seconds.items()}
    ratios = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds["alternative"], strict=True)]
    return {
        "samples_per_s": rates["ours"],
        "alternative_samples_per_s": rates["alternative"],
        "ratio": statistics.median(ratios),
    }


def _fresh(samples: Iterable[Media]) -> list[Media]:
    """The same samples, of which nothing is decoded yet."""
    return [Media(s.key, s.row, s.kind, s.data, s.side, s.span) for s in samples]


def _pass(*filters: Filter) -> Callable[[list[Media]], Any]:
    return lambda samples: score_batch(filters, samples)


def _one_by_one(filters: Sequence[Filter]) -> Callable[[list[Media]], Any]:
    return lambda samples: [score_batch([one], samples) for one in filters]


def _pictures(measure: Callable[[Any], Any]) -> Callable[[list[Media]], Any]:
    return lambda samples: [measure(bare.decode(sample.data)) for sample in samples]


def _files(measure: Callable[[bytes], Any]) -> Callable[[list[Media]], Any]:
    return lambda samples: [measure(sample.data) for sample in samples]
