"""Retrieval-augmented diffusion in small (arXiv 2204.11824, 2207.13038): scenes with neighbours in a database, by a
CLIP that is trained on the way, and what databases do to trained runs' pictures."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import webdataset

from tools.demo import judge
from tools.demo.scenes import COLOURS, SHAPES, SINGLE_PLACES, Scene, SceneObject, draw, encode, phrasings, scenes
from tools.study.pool import Command, Pool
from tools.study.scenes import draw_from, frechet
from tools.study.sizes import LARGE, features, ground_truth

_ALL = "others"
# Neighbours that precision and recall look for (arXiv 1904.06991).
_WITHIN = 3


@dataclass(frozen=True)
class ScenesWithNeighbours:
    """Under the study's `data`: `scenes` to train on; `others`, of their kind; and scenes of a single colour, a folder
    for each. Of the others, a CLIP is trained (`clip`), and a database of each kind is made (`databases`). The scenes'
    neighbours are of the others.

    Args:
        count: of scenes to train on.
        others: of scenes in the database.
        each: of scenes in each colour's database.
        k: neighbours that are kept of a scene.
        clip: overrides of the CLIP's run.
        seed: of the drawing.
    """

    count: int
    others: int
    each: int
    k: int
    clip: list[str]
    seed: int = 0

    def prepare(self, folder: Path) -> None:
        """Make what is not there yet.

        Raises:
            ValueError: a command failed.
        """
        data = folder / "data"
        _write(data / "scenes", square(scenes(self.count, self.seed, "train")), self.seed)
        _write(data / _ALL, square(scenes(self.others, self.seed + 1, "train")), self.seed + 1)
        for number, colour in enumerate(COLOURS):
            _write(data / colour, islice(of_colour(colour, self.seed + 2), self.each), self.seed + 2 + number)
        model = data / "clip" / "clip"
        quiet = ["log.wandb=null", f"runs={data}"]
        train = ["train", "experiment=demo/clip", "name=clip", f"data.sources.scenes.shards={data / _ALL}"]
        if not (model / "config.json").exists():
            _run(data, "clip", [*train, *self.clip, *quiet])
        for name in (_ALL, *COLOURS):
            database = data / "databases" / name
            retrieve = ["retrieve", f"database={database}", f"shards={data / name}", f"embedding.model={model}"]
            if name == _ALL:
                retrieve += [f"neighbours_of={data / 'scenes'}", f"k={self.k}"]
            done = data / "logs" / f"database_{name}.done"
            if not done.exists():
                _run(data, f"database_{name}", [*retrieve, *quiet, f"name=database_{name}"])
                done.touch()


@dataclass(frozen=True)
class RetrievalEvaluation:
    """Has a run draw pictures, and measures:

    - `frechet`: the Fréchet distance to ground truth in the features of a network of random weights
      (`features=random_stand_in` of `millrace evaluate`), in thousandths; `precision` and `recall` (arXiv 1904.06991)
      in the same. Each picture has the neighbours of a row of the database that is drawn at random.
    - `swapped`: of the pictures of a shape at a place, whose neighbours a text that names no colour finds in a database
      of one colour, the share that shows that colour alone.
    - `named`: the same, where the text names the colour, and the database has all.

    A run without neighbours draws whatever it draws.

    Args:
        count: of pictures for the distances.
        steps: of the run's sampler.
        guidance: scale of classifier-free guidance towards what a text finds.
        average: whose weights draw; "none" for the weights themselves.
        seed: of scenes, rows and noise.
    """

    count: int
    steps: int
    guidance: float
    average: str
    seed: int = 9

    def columns(self) -> Sequence[str]:
        return "frechet", "precision", "recall", "swapped", "named"

    def commands(self, run: Path) -> list[list[str]]:
        """None: it is all done here."""
        return []

    def evaluate(self, run: Path) -> list[dict[str, float | str]]:
        """One row."""
        import torch
        from omegaconf import OmegaConf

        from conf.schema import build
        from trainer.evaluation.distributions import neighbour_distances, share_within
        from trainer.sampling import Picture

        config: Any = OmegaConf.load(run / "config.yaml")
        side, node = config.buckets.size, (config.data.get("fields") or {}).get("neighbours")
        field = build(node) if node is not None else None
        databases = {} if field is None else {name: swapped_for(field, name) for name in (_ALL, *COLOURS)}

        def drawn(texts: Sequence[str], names: Sequence[str], guidance: float) -> list[np.ndarray]:
            given: list[dict[str, Any]] = [{}] * len(texts)
            if databases:
                found = zip(texts, names, strict=True)
                given = [{"neighbours": databases[name].given(text, (side, side))} for text, name in found]
            wanted = [Picture("", self.seed * 100_000 + i, side, side, fields=one) for i, one in enumerate(given)]
            return draw_from(run, self.average, self.steps, guidance, wanted)

        truth = ground_truth(list(square(scenes(self.count, self.seed, "train"))), side, self.seed)
        rows = [""] * self.count if field is None else rows_and_neighbours(databases[_ALL], self.count, self.seed)
        free, true = (torch.from_numpy(features(p)) for p in (drawn(rows, [_ALL] * self.count, 1.0), truth))
        asked = list(product(COLOURS, SHAPES, SINGLE_PLACES))
        named = drawn([text_of(*one) for one in asked], [_ALL] * len(asked), self.guidance)
        swapped = drawn([text_of(None, *one[1:]) for one in asked], [one[0] for one in asked], self.guidance)
        return [
            {
                "frechet": 1000 * frechet(free.numpy(), true.numpy()),
                "precision": share_within(free, true, neighbour_distances(true, _WITHIN)),
                "recall": share_within(true, free, neighbour_distances(free, _WITHIN)),
                "swapped": share_of_colour(swapped, [one[0] for one in asked]),
                "named": share_of_colour(named, [one[0] for one in asked]),
            }
        ]


def swapped_for(field: Any, name: str) -> Any:
    """The field of neighbours with another of the study's databases."""
    return replace(field, database=str(Path(field.database).with_name(name)))


def rows_and_neighbours(field: Any, count: int, seed: int) -> list[str]:
    """For each picture, the rows of the database that are nearest to one of them, that one first: "[3, 17]"."""
    vectors = field.opened.vectors(np.arange(field.opened.rows))
    chosen = np.random.default_rng([seed, 6]).integers(len(vectors), size=count)
    nearest = np.argsort(-(vectors[chosen] @ vectors.T), axis=1)[:, : field.k]
    return [json.dumps(one.tolist()) for one in nearest]


def square(of: Iterable[Scene]) -> Iterator[Scene]:
    """The scenes in square pictures."""
    return (replace(scene, width=LARGE, height=LARGE) for scene in of)


def of_colour(colour: str, seed: int) -> Iterator[Scene]:
    """Endless scenes of objects of one colour."""
    drawn = (scene for number in range(1_000_000) for scene in scenes(256, seed + 1000 * number, "train"))
    return square(scene for scene in drawn if all(thing.colour == colour for thing in scene.objects))


def text_of(colour: str | None, shape: str, place: str) -> str:
    """A caption of the demo's grammar, without the colour where there is none."""
    text = phrasings((SceneObject(shape, colour or "red", place),))[0]
    return text if colour else text.replace("red ", "", 1)


def share_of_colour(pictures: Sequence[np.ndarray], colours: Sequence[str]) -> float:
    """The share of pictures (H, W, 3) with objects, all of the colour that each is to have."""
    found = [[thing.colour for thing in judge.look(picture)] for picture in pictures]
    return float(np.mean([bool(one) and set(one) == {colour} for one, colour in zip(found, colours, strict=True)]))


def _write(folder: Path, of: Iterable[Scene], seed: int) -> None:
    """Draw scenes into `folder/00000.tar`, unless it is there."""
    path, rng = folder / "00000.tar", np.random.default_rng([seed, 7])
    if path.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with webdataset.TarWriter(str(partial), mtime=0) as tar:
        for index, scene in enumerate(of):
            tar.write({"__key__": f"{index:06d}", "png": encode(draw(scene, rng), "png"), "txt": scene.caption})
    partial.rename(path)


def _run(data: Path, name: str, arguments: list[str]) -> None:
    (outcome,) = Pool(1).run([Command(name, arguments, data / "logs" / f"{name}.log")])
    if outcome.reason is not None:
        raise ValueError(f"the study's {name} failed: {outcome.reason}; see {outcome.command.log}")
