"""What a picture of coloured shapes shows, by classical image analysis: no learned part, so it can be tested itself.

Segmentation by distance from the background, connected components, colour by nearest palette hue, and shape by areas of
the contour against those of its convex hull and of the smallest circle and rectangle around it.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from tools.demo.scenes import COLOURS, PAIR_PLACES, PLACES, SHAPES, SINGLE_PLACES, SceneObject

# The analysis runs at this many pixels along the shorter side, whatever the picture's own size.
_WORKING_SIDE = 160
# An object covers at least this share of the square on the shorter side (the smallest drawn cover about 5 %); what is
# smaller, but not a speck, counts as one more object, so that a picture with litter in it is wrong.
_SPECK, _SMALLEST = 0.006, 0.02
# How far an object's middle may be from its place, in fractions of the picture's width and height: places are at least
# 0.23 apart, and drawn objects within 0.04 of theirs.
_PLACE_TOLERANCE = 0.11


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

    One or two objects with equal chance, then every place, shape and colour with equal chance.
    """
    looks = len(SHAPES) * len(COLOURS)
    single, pair = 0.5 / len(SINGLE_PLACES) / looks, 0.5 / len(PAIR_PLACES) / looks**2
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
    contours, _ = cv2.findContours(component.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    core = component & (distance > 0.8 * np.quantile(distance[component], 0.8))
    colour = _colour(np.median(lab[core], axis=0))
    return (x, y), Finding(_shape(max(contours, key=cv2.contourArea)), colour, _place(x, y))


def _place(x: float, y: float) -> str | None:
    name, (px, py) = min(PLACES.items(), key=lambda item: (item[1][0] - x) ** 2 + (item[1][1] - y) ** 2)
    return name if max(abs(px - x), abs(py - y)) <= _PLACE_TOLERANCE else None


def _colour(lab: np.ndarray) -> str | None:
    """The palette's colour of nearest hue, None for greys."""
    if np.hypot(lab[1], lab[2]) < 15:
        return None
    hue = np.arctan2(lab[2], lab[1])
    return min(_HUES, key=lambda name: abs((hue - _HUES[name] + np.pi) % (2 * np.pi) - np.pi))


def _shape(contour: np.ndarray) -> str | None:
    """The shape by how much of its hull, its smallest circle and its smallest rectangle a contour fills.

    Ideal shapes fill: circle 1, 1, 0.79; square 1, 0.64, 1; triangle 1, 0.41, 0.5; cross 0.71, 0.57, 0.64. Blur rounds
    the corners and brings all of them nearer to the circle. What lies between two shapes is none.
    """
    area = cv2.contourArea(contour)
    hull = area / cv2.contourArea(cv2.convexHull(contour))
    circle = area / (np.pi * cv2.minEnclosingCircle(contour)[1] ** 2)
    rectangle = area / np.prod(cv2.minAreaRect(contour)[1])
    if hull < 0.88:
        return "cross" if circle > 0.55 and rectangle > 0.62 else None
    if circle > 0.83:
        return "circle"
    if circle > 0.62 and rectangle > 0.83:
        return "square"
    if circle < 0.6 and rectangle < 0.7:
        return "triangle"
    return None


def _palette_hues() -> dict[str, float]:
    palette = np.array([list(COLOURS.values())], dtype=np.float32) / 255
    lab = cv2.cvtColor(palette, cv2.COLOR_RGB2LAB)[0]
    return {name: float(np.arctan2(b, a)) for name, (_, a, b) in zip(COLOURS, lab, strict=True)}


_HUES = _palette_hues()
