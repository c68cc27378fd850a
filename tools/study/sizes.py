"""SDXL's size conditioning in small (arXiv 2307.01952, table 2): pictures of which most are smaller than those of
training, and how good trained runs' pictures are."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import webdataset

from data.transforms import resize
from tools.demo import judge
from tools.demo.scenes import COLOURS, SHAPES, Scene, SceneObject, draw, encode, scenes
from tools.study.scenes import draw_from, frechet, make_data

# Side of the pictures that are drawn, and of those that are stored as they are.
LARGE = 64


def class_of(thing: SceneObject) -> int:
    """A number for each shape in each colour, from 0."""
    return SHAPES.index(thing.shape) * len(COLOURS) + list(COLOURS).index(thing.colour)


def single(count: int, seed: int) -> Iterator[Scene]:
    """Square scenes of one object each, of those that training may show."""
    alone = (scene for scene in scenes(2 * count, seed, "train") if len(scene.objects) == 1)
    return (replace(scene, width=LARGE, height=LARGE) for scene in islice(alone, count))


@dataclass(frozen=True)
class ScenesOfSizes:
    """Draws scenes of one object into the study's `data` folder: some stored at 64 pixels a side, the others smaller.

    Each sample has a picture and its class, `.cls`: which shape in which colour. All are drawn at 64 pixels and shrunk
    from there, so that they differ in nothing but size. No picture is compressed with loss.

    Args:
        count: of scenes.
        large: how many of them are stored at 64 pixels.
        least, most: sides of the others, in pixels, all alike.
        seed: of the drawing.
    """

    count: int
    large: int
    least: int
    most: int
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.large <= self.count or not 0 < self.least <= self.most < LARGE:
            raise ValueError(f"large={self.large}, least={self.least}, most={self.most}: parts of {self.count} and 64")

    def prepare(self, folder: Path) -> None:
        """Draw and index them, unless they are there."""
        make_data(folder, self.write)

    def write(self, folder: Path) -> None:
        """Write `folder/00000.tar`."""
        folder.mkdir(parents=True)
        rng = np.random.default_rng([self.seed, 4])
        sides = rng.integers(self.least, self.most, self.count, endpoint=True)
        sides[rng.permutation(self.count)[: self.large]] = LARGE
        with webdataset.TarWriter(str(folder / "00000.tar"), mtime=0) as tar:
            for index, (scene, side) in enumerate(zip(single(self.count, self.seed), sides.tolist(), strict=True)):
                picture = draw(scene, rng)
                if side < LARGE:
                    picture = cv2.resize(picture, (side, side), interpolation=cv2.INTER_AREA)
                number = str(class_of(scene.objects[0]))
                tar.write({"__key__": f"{index:06d}", "png": encode(picture, "png"), "cls": number.encode()})


@dataclass(frozen=True)
class SizesEvaluation:
    """Has a run draw scenes of one object by their classes, and measures:

    - `frechet`: the Fréchet distance to ground truth of large pictures, in the features of a network of random weights
      (`features=random_stand_in` of `millrace evaluate`), in thousandths; what FID is.
    - `recognized`: the share of pictures that show one object, of the asked shape and colour, as image analysis judges;
      what an Inception score is.

    Args:
        count: of pictures.
        steps: of the run's sampler.
        guidance: scale of classifier-free guidance.
        average: whose weights draw; "none" for the weights themselves.
        original_size: side that a run is told, if it is told sizes; what is asked for is a picture that was large.
        seed: of scenes and noise.
    """

    count: int
    steps: int
    guidance: float
    average: str
    original_size: int = LARGE
    seed: int = 1

    def columns(self) -> Sequence[str]:
        return "frechet", "recognized"

    def commands(self, run: Path) -> list[list[str]]:
        """None: it is all done here."""
        return []

    def evaluate(self, run: Path) -> list[dict[str, float | str]]:
        """One row."""
        import torch
        from omegaconf import OmegaConf

        from trainer.sampling import Picture

        config: Any = OmegaConf.load(run / "config.yaml")
        side, told = config.buckets.size, (self.original_size, self.original_size)
        asked = list(single(self.count, self.seed))
        wanted = [
            Picture("", self.seed * 100_000 + i, side, side, fields={"class": torch.tensor(class_of(scene.objects[0]))})
            for i, scene in enumerate(asked)
        ]
        wanted = [replace(picture, original_size=told) for picture in wanted]
        pictures = draw_from(run, self.average, self.steps, self.guidance, wanted)
        truth = ground_truth(asked, side, self.seed)
        return [
            {
                "frechet": 1000 * frechet(features(pictures), features(truth)),
                "recognized": float(
                    np.mean([recognized(p, s.objects[0]) for p, s in zip(pictures, asked, strict=True)])
                ),
            }
        ]


def ground_truth(asked: Sequence[Scene], side: int, seed: int) -> list[np.ndarray]:
    """Large pictures of the scenes, resized as training does it, (side, side, 3) uint8."""
    rng = np.random.default_rng([seed, 5])
    return [resize(draw(scene, rng), (side, side)).permute(1, 2, 0).numpy() for scene in asked]


def features(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """(n, 64) of n pictures."""
    import torch

    from models.features import RandomStandIn

    with torch.no_grad():
        return RandomStandIn()(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)).double().numpy()


def recognized(picture: np.ndarray, thing: SceneObject) -> bool:
    """Whether a picture shows one object, of the right shape and colour, wherever it is."""
    found = judge.look(picture)
    return len(found) == 1 and (found[0].shape, found[0].colour) == (thing.shape, thing.colour)
