"""Several filters over the same samples in one pass: each picture and each clip is decoded once for all of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from data.curation.base import PLACES, Failure, Filter, Media, Place
from data.curation.video import OpenClips, VideoFilter, combine, watch_together

Outcome = Mapping[str, Any] | Failure | None
_Frames = dict[Place, Media] | Failure


def score_batch(filters: Sequence[Filter], samples: Sequence[Media]) -> list[Sequence[Outcome]]:
    """What each filter makes of each sample; None for those with other media than it looks at.

    Args:
        filters: of the pass.
        samples: pixels are decoded here and released.
    """
    of_pixels = [one for one in filters if one.media in ("image", "video")]
    outcomes = _score_pixels(of_pixels, samples) if of_pixels else {}
    return [outcomes[one.name] if one.name in outcomes else _score_encoded(one, samples) for one in filters]


def _score_encoded(one: Filter, samples: Sequence[Media]) -> Sequence[Outcome]:
    """What a filter makes of samples of which nothing is decoded. It may need no more than microseconds for each."""
    shown = samples if one.media == "none" else [sample for sample in samples if sample.kind is not None]
    scored = _score(one, shown)
    if len(shown) == len(samples):
        return scored
    following = iter(scored)
    return [_no_media(sample) or next(following) for sample in samples]


def _score_pixels(filters: Sequence[Filter], samples: Sequence[Media]) -> dict[str, list[Outcome]]:
    """What filters of pictures and clips make of each sample, by name.

    Sample by sample, so that filters find pixels in the processor's cache and memory serves again for the next. Only
    what batched filters look at is held until the end.
    """
    watching = [one for one in filters if isinstance(one, VideoFilter)]
    single = [one for one in filters if not isinstance(one, VideoFilter) and not one.batched]
    batched = [one for one in filters if one.batched]
    places = [place for place in PLACES if any(one.media == "image" and place in one.frames for one in filters)]
    hold = any(one.media == "image" for one in batched)
    outcomes: dict[str, list[Outcome]] = {one.name: [] for one in filters}
    frames: list[_Frames] = []
    with OpenClips() as clips:
        for sample in samples:
            watched: list[Any] = [_no_media(sample)] * len(watching)
            pictures: _Frames = {}
            if sample.kind == "video" and (watching or places):
                watched, pictures = watch_together(watching, sample, clips, places)
            for video, outcome in zip(watching, watched, strict=True):
                outcomes[video.name].append(outcome)
            for one in single:
                outcomes[one.name] += _score_at_once(one, [sample], [pictures])
            if hold:
                frames.append(pictures)
            else:
                sample.release()
    for one in batched:
        outcomes[one.name] = _score_at_once(one, samples, frames or [{}] * len(samples))
    for sample in samples:
        sample.release()
    return outcomes


def _no_media(sample: Media) -> Failure | None:
    return sample.failure() if sample.kind is None else None


def _score_at_once(one: Filter, samples: Sequence[Media], frames: Sequence[_Frames]) -> list[Outcome]:
    """What a filter makes of each sample, all handed to it in one go; of clips it may be shown `frames` instead."""
    outcomes: list[Outcome] = [None] * len(samples)
    shown: list[Media] = []
    parts: dict[int, slice] = {}
    for i, (sample, pictures) in enumerate(zip(samples, frames, strict=True)):
        seen = _seen(one, sample, pictures)
        if seen is None or isinstance(seen, Failure):
            outcomes[i] = seen
        else:
            parts[i] = slice(len(shown), len(shown) + len(seen))
            shown += seen
    scored = _score(one, shown)
    for i, part in parts.items():
        outcomes[i] = combine(scored[part], one.columns.names)
    return outcomes


def _score(one: Filter, shown: Sequence[Media]) -> Sequence[Mapping[str, Any] | Failure]:
    scored = one.score(shown) if shown else []
    assert len(scored) == len(shown), f"the filter {one.name!r} scored {len(scored)} of {len(shown)} samples"
    return scored


def _seen(one: Filter, sample: Media, frames: _Frames) -> list[Media] | Failure | None:
    """What a filter is shown of a sample; None for media that it does not look at."""
    if one.media == "image" and sample.kind == "video":
        return frames if isinstance(frames, Failure) else [frames[place] for place in one.frames]
    if one.media == "video" and sample.kind == "image":
        return None
    return sample.failure() or [sample]
