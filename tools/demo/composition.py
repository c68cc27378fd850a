"""The demo's figure as a metric of `millrace evaluate`: whether pictures show what captions of drawn scenes ask for."""

from functools import cache
from itertools import product

import numpy as np
import torch

from tools.demo import judge
from tools.demo.scenes import COLOURS, PAIR_PLACES, SHAPES, SINGLE_PLACES, SceneObject, phrasings
from trainer.distributed import World
from trainer.evaluation.metric import Gathered, Needs, PictureMetric, Seen


class CompositionAccuracy(PictureMetric):
    """The share of pictures with exactly the shapes, colours and places that their captions name, by classical image
    analysis; of captions with one object and with two; and what the same pictures get under each other's captions."""

    name = "composition_accuracy"
    needs: frozenset[Needs] = frozenset({"captions"})

    def place(self, world: World) -> None:
        self._world, self._outcomes = world, Gathered()

    def see(self, seen: Seen) -> None:
        rows = []
        for image, caption in zip(seen.images.cpu(), seen.captions, strict=True):
            objects = asked_for(caption)
            rows.append([float(judge.is_right(image.permute(1, 2, 0).numpy(), objects)), float(len(objects))])
        self._outcomes.add(seen.numbers, torch.tensor(rows))

    def result(self) -> dict[str, float]:
        outcomes = self._outcomes.all(self._world)
        if outcomes is None:
            return {}
        right, objects = outcomes.double().T.numpy()
        values = {self.name: float(right.mean())}
        for count, word in ((1, "one_object"), (2, "two_objects")):
            if np.any(objects == count):
                values[f"{self.name}_{word}"] = float(right[objects == count].mean())
        return values


def asked_for(caption: str) -> tuple[SceneObject, ...]:
    """The objects that a caption of the demo's grammar names.

    Raises:
        ValueError: it is none.
    """
    objects = _captions().get(caption)
    if objects is None:
        raise ValueError(
            f"composition_accuracy is of the demo's captions, and {caption!r} is none: evaluate with metric=composition"
            " on tars of drawn scenes only"
        )
    return objects


@cache
def _captions() -> dict[str, tuple[SceneObject, ...]]:
    """What every caption of the grammar names."""
    things = list(product(SHAPES, COLOURS))
    found: dict[str, tuple[SceneObject, ...]] = {}
    for (shape, colour), place in product(things, SINGLE_PLACES):
        single = (SceneObject(shape, colour, place),)
        found |= dict.fromkeys(phrasings(single), single)
    for first, second, places in product(things, things, PAIR_PLACES):
        pair = SceneObject(*first, places[0]), SceneObject(*second, places[1])
        for swapped in (False, True):
            found |= dict.fromkeys(phrasings(pair, swapped), pair)
    return found
