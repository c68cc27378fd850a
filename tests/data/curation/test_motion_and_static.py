"""Motion, stillness and slideshows, on clips drawn with known motion."""

from itertools import pairwise

import cv2
import numpy as np
import pytest
from drawn_clips import FPS, decode, encode, faded, moving, texture

from data.curation.base import Failure, Media
from data.curation.motion import Motion
from data.curation.static import Static


def clip(data: bytes, span: tuple[int, int] | None = None) -> Media:
    return Media("key", {}, "video", data, 512, span)


def motion_of(data: bytes, span: tuple[int, int] | None = None, **settings) -> float:
    return Motion(**settings).score([clip(data, span)])[0]["motion"]


def test_motion_is_that_which_was_drawn_and_orders_clips_by_it():
    """Each clip has a picture and a direction of its own."""
    rng = np.random.default_rng(0)
    speeds = np.array([0.0, *np.geomspace(0.1, 2.4, 15)])  # pixels a frame
    measured = []
    for seed, speed in enumerate(speeds):
        direction = rng.uniform(0, 2 * np.pi)
        picture = texture(100 + seed)
        measured.append(motion_of(encode(moving(picture, 51, speed * np.cos(direction), speed * np.sin(direction)))))
    assert measured == sorted(measured) and len(set(measured)) == len(measured)
    np.testing.assert_allclose(measured, speeds * FPS / 120 * 100, rtol=0.1, atol=0.1)


def test_motion_does_not_depend_on_size_or_frame_rate():
    small = motion_of(encode(moving(texture(3), 51, 0.8)))
    large = motion_of(encode(moving(cv2.resize(texture(3), (320, 240), interpolation=cv2.INTER_CUBIC), 51, 1.6)))
    rare = motion_of(encode(moving(texture(3), 26, 1.6), fps=FPS / 2))
    assert large == pytest.approx(small, rel=0.1)
    assert rare == pytest.approx(small, rel=0.1)


def test_motion_of_a_part_of_a_clip_and_of_a_very_short_one():
    still, fast = moving(texture(1), 40, 0), moving(texture(1), 40, 0.8)
    data = encode([*still, *fast], g=15)
    assert motion_of(data, (0, 40)) < 0.5
    assert motion_of(data, (40, 80)) == pytest.approx(100 * 0.8 * FPS / 120, rel=0.1)
    assert motion_of(encode(fast[:6])) == pytest.approx(100 * 0.8 * FPS / 120, rel=0.1)
    assert isinstance(Motion().score([clip(encode(fast[:1]))])[0], Failure)


def test_a_damaged_clip_is_a_failure_with_a_reason():
    data = encode(moving(texture(1), 20, 1.0))
    for damaged in (b"", b"not a clip", data[:300]):
        outcome = Motion().score([clip(damaged)])[0]
        assert isinstance(outcome, Failure) and outcome.reason == "undecodable clip"


def static_of(frames: list[np.ndarray]) -> dict:
    return dict(Static().score([clip(encode(frames))])[0])


def test_stillness_is_the_share_of_time_in_which_nothing_moves():
    picture = texture(5)
    still, slow = moving(picture, 100, 0), moving(picture, 100, 0.1)
    assert static_of(still) == {"still": 1.0, "pictures": 1, "slideshow": False}
    assert static_of(slow)["still"] == 0.0
    assert static_of([*still, *moving(picture, 100, 0.2)])["still"] == pytest.approx(0.5, abs=0.05)


def test_one_small_thing_that_moves_is_not_still():
    frames = moving(texture(5), 100, 0)
    for i, frame in enumerate(frames):
        frame[50:60, i : i + 10] = 255
    assert static_of(frames)["still"] == 0.0


def test_slideshows_are_found_with_cuts_and_with_dissolves_and_films_are_not():
    pictures = [moving(texture(10 + i), 50, 0) for i in range(4)]
    cuts = [frame for shown in pictures for frame in shown]
    dissolved = pictures[0][:]
    for before, after in pairwise(pictures):
        shares = np.linspace(1, 0, 20)
        mixed = zip(faded(before[:20], shares), faded(after[:20], 1 - shares), strict=True)
        dissolved += [cv_add(a, b) for a, b in mixed] + after
    film = [frame for i in range(4) for frame in moving(texture(10 + i), 50, 0.5)]
    assert static_of(cuts)["slideshow"] and static_of(cuts)["pictures"] == 4
    assert static_of(dissolved)["slideshow"] and static_of(dissolved)["pictures"] == 4
    assert not static_of(film)["slideshow"]
    # The same picture again after something moved over it is not another one.
    passing = [*moving(texture(5), 50, 0), *moving(texture(5), 20, 1.0), *moving(texture(5), 50, 0)]
    assert static_of(passing)["pictures"] == 1


def cv_add(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.clip(a.astype(int) + b, 0, 255).astype(np.uint8)


def test_the_drawn_clips_are_as_long_as_drawn():
    assert len(decode(encode(moving(texture(1), 31, 0)))) == 31
