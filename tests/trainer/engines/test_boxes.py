"""A flat range as boxes, against brute force."""

import itertools
from math import prod

import pytest
import torch

from trainer.engines.base import boxes_of_range


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 4), (2, 1, 3), (3, 2, 2, 2), (1, 5, 1)])
def test_boxes_hold_exactly_the_range_in_order(shape):
    whole = torch.arange(prod(shape)).view(shape)
    for start, stop in itertools.combinations_with_replacement(range(prod(shape) + 1), 2):
        boxes = boxes_of_range(shape, start, stop)
        assert len(boxes) <= max(1, 2 * len(shape) - 1)
        parts = [whole[tuple(slice(o, o + s) for o, s in zip(b.offsets, b.sizes, strict=True))] for b in boxes]
        assert (
            torch.cat([part.reshape(-1) for part in parts]).tolist() == list(range(start, stop))
            if parts
            else start == stop
        )
