"""Random ways to cut tensors over ranks, and state that says by its values where it belongs."""

import random
from math import prod

import torch
from torch import Tensor

from trainer.engines.base import Box, Shard

Boxes = dict[str, list[list[Box]]]  # name -> rank -> boxes


def whole_value(name: str, shape: tuple[int, ...], step: int = 0) -> Tensor:
    """The value of a tensor at a step; no two names or steps agree anywhere near."""
    generator = torch.Generator().manual_seed(hash_of(name) * 1000 + step)
    return torch.randn(shape, generator=generator)


def hash_of(name: str) -> int:
    return sum((i + 1) * ord(letter) for i, letter in enumerate(name)) % 100_003


def part(whole: Tensor, boxes: list[Box]) -> Tensor:
    """The boxes of a tensor, one after the other, by plain indexing."""
    slices = [tuple(slice(o, o + s) for o, s in zip(b.offsets, b.sizes, strict=True)) for b in boxes]
    return torch.cat([torch.empty(0), *(whole[where].reshape(-1) for where in slices)])


def shards_of(shapes: dict[str, tuple[int, ...]], cut: Boxes, rank: int, step: int | None) -> list[Shard]:
    """A rank's shards, filled for `step` or (None) with NaN."""
    shards = []
    for name, shape in shapes.items():
        boxes = cut[name][rank]
        tensor = part(whole_value(name, shape, step or 0), boxes)
        shards.append(Shard(name, shape, tuple(boxes), tensor if step is not None else tensor.fill_(float("nan"))))
    return shards


def wrong(shapes: dict[str, tuple[int, ...]], cut: Boxes, rank: int, shards: list[Shard], step: int) -> list[str]:
    """Names whose shard is not bit-equal to what it should be at `step`."""
    expected = shards_of(shapes, cut, rank, step)
    return [a.name for a, b in zip(shards, expected, strict=True) if not torch.equal(a.tensor, b.tensor)]


def random_shapes(rng: random.Random, count: int = 6) -> dict[str, tuple[int, ...]]:
    """Scalars, empty tensors and up to four uneven dimensions, as weights, moments and averages."""
    kinds = ["", "exp_avg/", "ema.0.99/"]
    shapes = {
        f"{rng.choice(kinds)}net.p{i}": tuple(rng.randint(1, 7) for _ in range(rng.randint(0, 4))) for i in range(count)
    }
    return shapes | {"net.none": (0, 3), "net.scalar": ()}


def random_cut(rng: random.Random, shapes: dict[str, tuple[int, ...]], ranks: int) -> Boxes:
    """Each tensor cut by rows, into random boxes, or into flat ranges; boxes dealt to random ranks, some to several."""
    cut: Boxes = {}
    for name, shape in shapes.items():
        held: list[list[Box]] = [[] for _ in range(ranks)]
        if prod(shape):
            style = rng.choice(["rows", "boxes", "flat", "replicated"])
            if style == "flat":
                bounds = sorted([0, prod(shape), *(rng.randint(0, prod(shape)) for _ in range(ranks - 1))])
                for rank in range(ranks):
                    held[rank] = flat_boxes(shape, bounds[rank], bounds[rank + 1])
            else:
                whole = Box((0,) * len(shape), shape)
                depth = {"rows": 2, "boxes": 4, "replicated": 0}[style]
                for box in split(rng, whole, depth, rows_only=style == "rows"):
                    copies = ranks if style == "replicated" else rng.choice([1, 1, 1, 2])
                    for rank in rng.sample(range(ranks), min(copies, ranks)):
                        held[rank].append(box)
        cut[name] = held
    return cut


def split(rng: random.Random, box: Box, depth: int, rows_only: bool) -> list[Box]:
    """Cut a box in two along a random dimension, again and again."""
    dims = [d for d in range(1 if rows_only else len(box.sizes)) if d < len(box.sizes) and box.sizes[d] > 1]
    if not depth or not dims:
        return [box]
    dim = rng.choice(dims)
    at = rng.randint(1, box.sizes[dim] - 1)
    low = Box(box.offsets, (*box.sizes[:dim], at, *box.sizes[dim + 1 :]))
    offsets = (*box.offsets[:dim], box.offsets[dim] + at, *box.offsets[dim + 1 :])
    high = Box(offsets, (*box.sizes[:dim], box.sizes[dim] - at, *box.sizes[dim + 1 :]))
    return split(rng, low, depth - 1, rows_only) + split(rng, high, depth - 1, rows_only)


def flat_boxes(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """The flat range [start, stop) of a row-major tensor as boxes in order: part of a row, rows, part of a row."""
    if start >= stop:
        return []
    if not shape:
        return [Box((), ())]
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row

    def inside(index: int, low: int, high: int) -> list[Box]:
        inner = flat_boxes(shape[1:], low, high)
        return [Box((index, *box.offsets), (1, *box.sizes)) for box in inner]

    if first > last:  # within one row
        return inside(last, start - last * row, stop - last * row)
    head = inside(first - 1, start - (first - 1) * row, row) if start < first * row else []
    rows = [Box((first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:]))] if last > first else []
    tail = inside(last, 0, stop - last * row) if stop > last * row else []
    return head + rows + tail
