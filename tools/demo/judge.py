"""What a picture of coloured shapes shows, by classical image analysis: no learned part, so it can be tested itself.

Segmentation by distance from the background, connected components, colour by nearest palette hue, and shape by overlap
with the ideal ones.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np

from tools.demo.scenes import (
    COLOURS,
    MAX_ANGLE,
    PAIR_PLACES,
    PLACES,
    SHAPES,
    SINGLE_PLACES,
    SceneObject,
    outline,
)

# The analysis runs at this many pixels along the shorter side, whatever the picture's own size.
_WORKING_SIDE = 160
# An object covers at least this share of the square on the shorter side (the smallest drawn cover about 5 %); what is
# smaller, but not a speck, counts as one more object, so that a picture with litter in it is wrong.
_SPECK, _SMALLEST = 0.006, 0.02
# How far an object's middle may be from its place, in fractions of the picture's width and height: places are at least
# 0.23 apart, and drawn objects within 0.04 of theirs.
_PLACE_TOLERANCE = 0.11
# Shapes are compared as masks of this side, in which they cover this share.
_TEMPLATE_SIDE, _TEMPLATE_AREA = 64, 0.25
# A shape overlaps with its ideal by at least this much, and by so much more than with any other.
_LEAST_OVERLAP, _LEAST_MARGIN = 0.75, 0.04


@dataclass(frozen=True)
class Finding:
    """An object found in a picture; a part that cannot be told is None, and then equals nothing that was asked for."""

    shape: str | None
    colour: str | None
    place: str | None


def look(picture: np.ndarray) -> list[Finding]:
    """The objects that an (H, W, 3) uint8 RGB picture shows, from left to right and top to bottom."""
    height, width = picture.shape[:2]
    zoom = _WORKING_SIDE / min(height, width)
    large = cv2.resize(picture, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_CUBIC)
    large = cv2.GaussianBlur(large, (0, 0), _WORKING_SIDE / 70)
    lab = cv2.cvtColor(large.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    distance = np.linalg.norm(lab - _background(lab), axis=2)
    # The outline of an antialiased object runs where it is half object, half background: at half the nearby maximum.
    nearby = cv2.dilate(distance, np.ones((_WORKING_SIDE // 8, _WORKING_SIDE // 8), np.uint8))
    objects = ((distance > 15) & (distance > nearby / 2)).astype(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(objects, connectivity=4)
    findings = []
    for label in range(1, count):
        share = stats[label, cv2.CC_STAT_AREA] / _WORKING_SIDE**2
        if share >= _SPECK:
            findings.append(_identify(lab, distance, labels == label, share))
    return [finding for _, finding in sorted(findings, key=lambda found: found[0])]


def is_right(picture: np.ndarray, objects: Sequence[SceneObject]) -> bool:
    """Whether the picture shows exactly these objects, each with its shape, colour and place."""
    return Counter(look(picture)) == Counter(Finding(o.shape, o.colour, o.place) for o in objects)


def composition_accuracy(pictures: Sequence[np.ndarray], asked: Sequence[Sequence[SceneObject]]) -> float:
    """The share of pictures that show exactly what was asked for."""
    if len(pictures) != len(asked) or not pictures:
        raise ValueError(f"{len(pictures)} pictures for {len(asked)} prompts: there must be one each, and at least one")
    return float(np.mean([is_right(picture, objects) for picture, objects in zip(pictures, asked, strict=True)]))


def analytic_chance(asked: Sequence[Sequence[SceneObject]]) -> float:
    """The expected accuracy of a perfect draughtsman who cannot read: a well-formed scene, drawn without the prompt.

    Two objects as often as scenes have them, then every place, shape and colour with equal chance.
    """
    looks = len(SHAPES) * len(COLOURS)
    single, pair = 0.75 / len(SINGLE_PLACES) / looks, 0.25 / len(PAIR_PLACES) / looks**2
    return float(np.mean([single if len(objects) == 1 else pair for objects in asked]))


def shuffled_chance(
    pictures: Sequence[np.ndarray], asked: Sequence[Sequence[SceneObject]], rounds: int = 20, seed: int = 0
) -> float:
    """The mean accuracy of the same pictures judged against prompts that were dealt out anew, over `rounds` deals."""
    found = [Counter(look(picture)) for picture in pictures]
    wanted = [Counter(Finding(o.shape, o.colour, o.place) for o in objects) for objects in asked]
    rng = np.random.default_rng(seed)
    hits = [found[i] == wanted[j] for _ in range(rounds) for i, j in enumerate(rng.permutation(len(wanted)))]
    return float(np.mean(hits))


def _background(lab: np.ndarray) -> np.ndarray:
    """The colour that most of the picture's frame has, (3,) in Lab."""
    edge = max(2, _WORKING_SIDE // 40)
    frame = np.concatenate([part.reshape(-1, 3) for part in (lab[:edge], lab[-edge:], lab[:, :edge], lab[:, -edge:])])
    return np.median(frame, axis=0)


def _identify(
    lab: np.ndarray, distance: np.ndarray, component: np.ndarray, share: float
) -> tuple[tuple[float, float], Finding]:
    """The middle (x, y), in fractions of the picture, and the finding of one connected component."""
    height, width = component.shape
    rows, columns = np.nonzero(component)
    x, y = columns.mean() / width, rows.mean() / height
    if share < _SMALLEST:
        return (x, y), Finding(None, None, None)
    core = component & (distance > 0.8 * np.quantile(distance[component], 0.8))
    colour = _colour(np.median(lab[core], axis=0))
    return (x, y), Finding(_shape(component), colour, _place(x, y))


def _place(x: float, y: float) -> str | None:
    name, (px, py) = min(PLACES.items(), key=lambda item: (item[1][0] - x) ** 2 + (item[1][1] - y) ** 2)
    return name if max(abs(px - x), abs(py - y)) <= _PLACE_TOLERANCE else None


def _colour(lab: np.ndarray) -> str | None:
    """The palette's colour of nearest hue, None for greys."""
    if np.hypot(lab[1], lab[2]) < 15:
        return None
    hue = np.arctan2(lab[2], lab[1])
    return min(_HUES, key=lambda name: abs((hue - _HUES[name] + np.pi) % (2 * np.pi) - np.pi))


def _shape(component: np.ndarray) -> str | None:
    """The ideal shape, of any angle that scenes are drawn at, that overlaps most with a component (intersection over
    union at equal area and centre); none where no shape overlaps well or two do about equally."""
    side = _TEMPLATE_SIDE
    rows, columns = np.nonzero(component)
    zoom = side * np.sqrt(_TEMPLATE_AREA / len(rows))
    shift = side / 2 - zoom * np.array([columns.mean(), rows.mean()])
    matrix = np.array([[zoom, 0, shift[0]], [0, zoom, shift[1]]])
    scaled = cv2.warpAffine(component.astype(np.float32), matrix, (side, side), flags=cv2.INTER_LINEAR) > 0.5
    overlap = {
        shape: max(float((scaled & ideal).sum() / (scaled | ideal).sum()) for ideal in ideals)
        for shape, ideals in _templates().items()
    }
    second, best = sorted(overlap, key=overlap.__getitem__)[-2:]
    return best if overlap[best] >= _LEAST_OVERLAP and overlap[best] - overlap[second] >= _LEAST_MARGIN else None


@cache
def _templates() -> dict[str, list[np.ndarray]]:
    """Masks of each shape at a few angles, all of the same area and centred."""
    ideals: dict[str, list[np.ndarray]] = {}
    for shape in SHAPES:
        for angle in np.linspace(-MAX_ANGLE, MAX_ANGLE, 5):
            points = outline(shape, float(angle))
            area = cv2.contourArea(points.astype(np.float32))
            points = points * _TEMPLATE_SIDE * np.sqrt(_TEMPLATE_AREA / area) + _TEMPLATE_SIDE / 2
            mask = np.zeros((_TEMPLATE_SIDE, _TEMPLATE_SIDE), np.uint8)
            cv2.fillPoly(mask, [np.round(points * 16).astype(np.int32)], 1, shift=4)
            ideals.setdefault(shape, []).append(mask > 0)
    return ideals


def _palette_hues() -> dict[str, float]:
    palette = np.array([list(COLOURS.values())], dtype=np.float32) / 255
    lab = cv2.cvtColor(palette, cv2.COLOR_RGB2LAB)[0]
    return {name: float(np.arctan2(b, a)) for name, (_, a, b) in zip(COLOURS, lab, strict=True)}


_HUES = _palette_hues()
