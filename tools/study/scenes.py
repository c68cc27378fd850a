"""The demo's captioned scenes, for small studies: data that all runs share, and what trained runs are asked for."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from data.index import ensure_indexed
from data.store import Store
from tools.demo import judge
from tools.demo.scenes import Scene, SceneObject, Split, draw, scenes, write_tars

if TYPE_CHECKING:
    from trainer.sampling import Picture

# Stored pictures are twice as large as the small buckets' (conf/buckets/tiny.yaml).
_SHRINK = 2
# Side of the pictures that the Fréchet distance is taken of: 3 x 5 x 5 numbers each.
_THUMBNAIL = 5


@dataclass(frozen=True)
class DrawnScenes:
    """Draws scenes into the study's `data` folder.

    Args:
        count: of scenes.
        seed: of the drawing.
    """

    count: int
    seed: int = 0

    def prepare(self, folder: Path) -> None:
        """Draw and index them, unless they are there."""
        make_data(folder, lambda scratch: write_tars(scratch, self.count, self.seed))


@dataclass(frozen=True)
class SceneEvaluation:
    """Has a run draw held-out scenes, and measures how well they are what was asked for, and how much they look it.

    For every number of steps, and for the weights themselves and each average that the run keeps:

    - `agreement`: the share of the asked objects' attributes (shape, colour, place) that the drawn objects have; what a
      CLIP score is to photographs.
    - `frechet`: the Fréchet distance (Dowson & Landau 1982) between normal distributions fitted to thumbnails of the
      drawn pictures and of ground truth; what FID is.

    Args:
        count: of scenes.
        steps: of the run's sampler.
        guidance: scale of classifier-free guidance.
        averages: names of the averages that are measured beside the weights.
        split: whose held-out scenes are asked for.
        seed: of the scenes and of the noise.
    """

    count: int
    steps: list[int]
    guidance: float
    averages: list[str]
    split: Split = "validation"
    seed: int = 0

    def columns(self) -> Sequence[str]:
        return "agreement", "frechet"

    def commands(self, run: Path) -> list[list[str]]:
        """None: it is all done here."""
        return []

    def evaluate(self, run: Path) -> list[dict[str, float | str]]:
        """A row for each number of steps and each set of weights."""
        asked = list(scenes(self.count, self.seed, self.split))
        rng = np.random.default_rng([self.seed, 3])
        truth = np.array([_thumbnail(_shrunk(draw(scene, rng), scene)) for scene in asked])
        rows: list[dict[str, float | str]] = []
        for weights in ("none", *self.averages):
            for steps in self.steps:
                pictures = self._draw(run, weights, asked, steps)
                agreements = [agreement(p, scene.objects) for p, scene in zip(pictures, asked, strict=True)]
                distance = frechet(np.array([_thumbnail(picture) for picture in pictures]), truth)
                rows.append(
                    {
                        "steps": steps,
                        "weights": "raw" if weights == "none" else weights,
                        "agreement": float(np.mean(agreements)),
                        "frechet": distance,
                    }
                )
        return rows

    def _draw(self, run: Path, weights: str, asked: Sequence[Scene], steps: int) -> list[np.ndarray]:
        from trainer.sampling import Picture

        wanted = [
            Picture(scene.caption, self.seed * 100_000 + i, scene.height // _SHRINK, scene.width // _SHRINK)
            for i, scene in enumerate(asked)
        ]
        return draw_from(run, weights, steps, self.guidance, wanted)


def make_data(folder: Path, write: Callable[[Path], object]) -> None:
    """Have a study's tars written to `folder/data`, and index them, unless they are there."""
    data = folder / "data"
    if data.exists():
        return
    scratch = folder / "data.partial"
    shutil.rmtree(scratch, ignore_errors=True)
    write(scratch)
    scratch.rename(data)
    # Now, so that not every run that starts does it.
    store = Store()
    ensure_indexed(store.expand([str(data)]), store)


def draw_from(run: Path, weights: str, steps: int, scale: float, wanted: "Sequence[Picture]") -> list[np.ndarray]:
    """Have a run draw pictures, (H, W, 3) uint8 each.

    Args:
        weights: name of an average, or "none" for the weights themselves.
        steps: of the run's sampler.
        scale: of guidance.
    """
    import torch
    from omegaconf import OmegaConf

    from conf.schema import build
    from trainer.loading import load_model
    from trainer.sampling import draw as draw_pictures

    config: Any = OmegaConf.load(run / "config.yaml")
    config.sampler.steps, config.guidance.scale = steps, scale
    loaded = load_model(run, weights)
    sampler, guidance, device = build(config.sampler), build(config.guidance), torch.device("cpu")
    drawn = draw_pictures(loaded.networks, loaded.process, sampler, guidance, wanted, device, batch=32)
    return [image.permute(1, 2, 0).numpy() for image in drawn]


def agreement(picture: np.ndarray, objects: Sequence[SceneObject]) -> float:
    """The share of the objects' attributes that a picture (H, W, 3) shows, each object held against the finding at its
    place, or else against none; findings beyond the objects take as many shares away as an object has."""
    found = judge.look(picture)
    right = 0
    for thing in objects:
        here = next((finding for finding in found if finding.place == thing.place), None)
        if here is not None:
            right += 1 + (here.shape == thing.shape) + (here.colour == thing.colour)
    litter = max(0, len(found) - len(objects))
    return max(0.0, right / (3 * len(objects)) - litter / len(objects))


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """|mean_a - mean_b|^2 + trace(C_a + C_b - 2 (C_a C_b)^(1/2)) of points (n, d) and (m, d)."""
    c, d = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(c @ d).real.clip(min=0))  # also where a feature never varies
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c + d) - 2 * roots.sum())


def _shrunk(picture: np.ndarray, scene: Scene) -> np.ndarray:
    size = scene.width // _SHRINK, scene.height // _SHRINK
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA)


def _thumbnail(picture: np.ndarray) -> np.ndarray:
    return cv2.resize(picture, (_THUMBNAIL, _THUMBNAIL), interpolation=cv2.INTER_AREA).reshape(-1) / 255
