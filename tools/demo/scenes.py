"""Captioned pictures of coloured shapes, drawn rather than collected, and a hold-out that asks for composition.

A scene has one object (in a corner or in the middle) or, one in four, two (side by side, or one above the other). An
object is a triple (shape, colour, place): 4 shapes x 6 colours x 9 places = 216 triples. The hold-out is systematic:
with the shape, colour and place numbered in the order of `SHAPES`, `COLOURS` and `PLACES`, a triple is held out when

    (shape + colour + place) mod 6 == 0,

36 triples in all. For every shape and place exactly one colour is missing, and for every shape and colour one or two
places. No training scene contains such an object, yet training shows every *pair*: each shape in each colour, each
shape in each place, and each colour in each place. A held-out scene has at least one held-out object, so a model draws
it only if it has learned shape, colour and place as parts.

Half of the held-out triples, those with (shape // 2 + place) even, are for choosing hyperparameters ("validation"); the
other half ("test") gives the figure that the demo reports. A scene of one never has an object of the other.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

import cv2
import numpy as np
import webdataset
from PIL import Image

MAX_ANGLE = np.radians(6)
"""Shapes are turned by at most this, in radians, to either side."""
SHAPES = ("circle", "square", "triangle", "cross")
# sRGB, about evenly spaced in hue and saturated, so that a picture of 32 x 32 pixels still tells them apart.
COLOURS = {
    "red": (220, 30, 40),
    "yellow": (235, 200, 20),
    "green": (30, 160, 60),
    "cyan": (40, 195, 215),
    "blue": (35, 65, 205),
    "purple": (165, 45, 190),
}
# Where an object's middle is, as fractions (x, y) of the picture's width and height.
NEAR, MIDDLE, FAR = 0.25, 0.5, 0.75
PLACES = {
    "top left": (NEAR, NEAR),
    "top right": (FAR, NEAR),
    "centre": (MIDDLE, MIDDLE),
    "bottom left": (NEAR, FAR),
    "bottom right": (FAR, FAR),
    "left": (NEAR, MIDDLE),
    "right": (FAR, MIDDLE),
    "top": (MIDDLE, NEAR),
    "bottom": (MIDDLE, FAR),
}
SINGLE_PLACES = ("top left", "top right", "centre", "bottom left", "bottom right")
PAIR_PLACES = (("left", "right"), ("top", "bottom"))
# Width x height of the stored pictures: three aspect ratios of about equal area.
SIZES = ((64, 64), (72, 56), (56, 72))
FORMATS = ("jpg", "png", "webp")
_SUPERSAMPLING = 4

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True)
class SceneObject:
    """A shape of one colour at one place; the names are those of `SHAPES`, `COLOURS` and `PLACES`."""

    shape: str
    colour: str
    place: str

    @property
    def split(self) -> Split:
        """The split whose scenes show it, by the module's rule; all scenes may show those of training."""
        shape, place = SHAPES.index(self.shape), list(PLACES).index(self.place)
        colour = list(COLOURS).index(self.colour)
        if (shape + colour + place) % 6:
            return "train"
        return "test" if (shape // 2 + place) % 2 else "validation"


@dataclass(frozen=True)
class Scene:
    """What a picture shows, and its caption.

    Args:
        objects: one object, or two, the left or upper one first.
        caption: a sentence that names every object's shape, colour and place.
        width: of the stored picture, in pixels.
        height: of the stored picture, in pixels.
    """

    objects: tuple[SceneObject, ...]
    caption: str
    width: int
    height: int


def describe(objects: tuple[SceneObject, ...], rng: np.random.Generator) -> str:
    """A caption, in one of the grammar's phrasings."""
    return _choose(rng, *phrasings(objects, swapped=len(objects) > 1 and rng.random() >= 0.5))


def phrasings(objects: tuple[SceneObject, ...], swapped: bool = False) -> tuple[str, ...]:
    """All captions of the grammar; of two objects, those that name the first one first unless `swapped`."""
    names = [f"{thing.colour} {thing.shape}" for thing in objects]
    if len(objects) == 1:
        (name,), place = names, objects[0].place
        where = "in the centre" if place == "centre" else f"in the {place} corner"
        return f"a {name} {where}", f"{where}, a {name}", f"there is a {name} {where}", f"{name}, {place}"
    sides = [thing.place for thing in objects]
    spots = [f"on the {side}" if side in ("left", "right") else f"at the {side}" for side in sides]
    relation = {"left": "to the left of", "right": "to the right of", "top": "above", "bottom": "below"}
    order = (1, 0) if swapped else (0, 1)
    (one, other), (here, there) = [names[i] for i in order], [spots[i] for i in order]
    return (
        f"a {one} {here} and a {other} {there}",
        f"{here}, a {one}; {there}, a {other}",
        f"a {one} {relation[sides[order[0]]]} a {other}",
        f"{one}, {sides[order[0]]}; {other}, {sides[order[1]]}",
    )


def draw(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """The scene as (height, width, 3) uint8 RGB, antialiased; sizes, positions, angles, shades and background vary."""
    scale, side = _SUPERSAMPLING, min(scene.width, scene.height)
    slope = rng.uniform(-8, 8, size=2)
    y = slope[0] * np.linspace(-0.5, 0.5, scene.height)[:, None, None]
    x = slope[1] * np.linspace(-0.5, 0.5, scene.width)[None, :, None]
    canvas = (rng.uniform(215, 245) + rng.uniform(-5, 5, size=3) + y + x).astype(np.float32)
    for thing in scene.objects:
        middle = np.array(PLACES[thing.place]) * (scene.width, scene.height) + rng.uniform(-0.02, 0.02, size=2) * side
        corners = outline(thing.shape, rng.uniform(-MAX_ANGLE, MAX_ANGLE))
        points = middle + rng.uniform(0.165, 0.195) * side * corners
        large = np.zeros((scene.height * scale, scene.width * scale), np.uint8)
        cv2.fillPoly(large, [np.round(points * scale - 0.5).astype(np.int32)], 255)
        cover = cv2.resize(large, (scene.width, scene.height), interpolation=cv2.INTER_AREA)[..., None] / np.float32(
            255
        )
        colour = np.float32(np.array(COLOURS[thing.colour]) + rng.uniform(-12, 12, size=3))
        canvas = (1 - cover) * canvas + cover * colour
    return canvas.round().clip(0, 255).astype(np.uint8)


def scenes(count: int, seed: int, split: Split) -> Iterator[Scene]:
    """`count` scenes of objects that training may show; in the other splits, with at least one that it never shows.

    Every fourth shows two objects, the others one. Every kind of each is equally likely, up to the hold-out.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    for index in range(count):
        width, height = SIZES[rng.integers(len(SIZES))]
        places = _choose(rng, *PAIR_PLACES) if index % 4 == 3 else (_choose(rng, *SINGLE_PLACES),)
        while True:
            objects = tuple(SceneObject(_choose(rng, *SHAPES), _choose(rng, *COLOURS), place) for place in places)
            # The objects' own splits are "train", but for at least one in the splits that are held out.
            if {thing.split for thing in objects} - {"train"} == {split} - {"train"}:
                break
        yield Scene(objects, describe(objects, rng), width, height)


def encode(picture: np.ndarray, extension: str) -> bytes:
    """The picture as a JPEG, PNG or WebP file."""
    options = {"jpg": {"quality": 92}, "png": {"compress_level": 1}, "webp": {"quality": 92, "method": 0}}[extension]
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[extension], **options)
    return buffer.getvalue()


def write_tars(folder: Path, count: int, seed: int, split: Split = "train", per_shard: int = 1000) -> list[Scene]:
    """Write `count` scenes to `folder/00000.tar` and so on, and return them in the tars' order.

    Each sample has a picture, a `.txt` with the caption and a `.json` with caption, width, height and objects. The same
    arguments write the same pictures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, SPLITS.index(split), 1])
    written = list(scenes(count, seed, split))
    for start in range(0, count, per_shard):
        with webdataset.TarWriter(str(folder / f"{start // per_shard:05d}.tar"), mtime=0) as tar:
            for index, scene in enumerate(written[start : start + per_shard], start):
                extension = FORMATS[index % len(FORMATS)]
                facts = {"caption": scene.caption, "width": scene.width, "height": scene.height}
                tar.write(
                    {
                        "__key__": f"{split}_{index:06d}",
                        extension: encode(draw(scene, rng), extension),
                        "txt": scene.caption,
                        "json": json.dumps(facts | {"objects": [asdict(thing) for thing in scene.objects]}),
                    }
                )
    return written


def _choose(rng: np.random.Generator, *options):
    return options[rng.integers(len(options))]


def outline(shape: str, angle: float) -> np.ndarray:
    """(k, 2) corners of a shape of about unit radius around its centroid, turned by `angle` radians."""
    if shape == "circle":
        turn = np.linspace(0, 2 * np.pi, 64, endpoint=False)
        points = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    elif shape == "square":
        points = 0.87 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
    elif shape == "triangle":
        turn = np.radians([-90, 30, 150])
        points = 1.15 * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    elif shape == "cross":
        arm, half = 1.05, 0.35
        quarter = [(half, -arm), (half, -half), (arm, -half)]
        points = np.array([_turned(point, turns) for turns in range(4) for point in quarter])
    else:
        raise ValueError(f"no shape called {shape!r}; there are {', '.join(SHAPES)}")
    cos, sin = np.cos(angle), np.sin(angle)
    return points @ np.array([(cos, sin), (-sin, cos)])


def _turned(point: tuple[float, float], quarters: int) -> tuple[float, float]:
    x, y = point
    for _ in range(quarters):
        x, y = -y, x
    return x, y
