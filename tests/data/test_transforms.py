"""Framing against Pillow's resize and against closed forms."""

import numpy as np
import pytest
import torch
from PIL import Image

from data.draws import slice_draws
from data.transforms import Framing, covering_size, draw_framings, frame


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("height,width", [(300, 400), (400, 300), (100, 700), (17, 23), (256, 192), (1, 1)])
@pytest.mark.parametrize("target", [(256, 192), (64, 64), (32, 128)])
def test_the_resized_image_covers_the_target_with_nothing_to_spare_on_one_side(height, width, target):
    size = covering_size(height, width, target)
    assert size[0] >= target[0] and size[1] >= target[1]
    assert size[0] == target[0] or size[1] == target[1]
    scale = max(target[0] / height, target[1] / width)
    assert abs(size[0] - scale * height) <= 0.5 and abs(size[1] - scale * width) <= 0.5


@pytest.mark.parametrize("height,width", [(300, 400), (90, 61), (64, 64)])
@pytest.mark.parametrize("flip", [False, True])
def test_a_framed_image_is_pillows_resize_and_crop(height, width, flip):
    pixels, target = noise(height, width), (64, 48)
    out = torch.empty(3, *target, dtype=torch.uint8)
    top, left = frame(pixels, target, Framing(0.7, 0.3, flip), out).crop
    rows, columns = covering_size(height, width, target)
    assert (top, left) == (int(0.7 * (rows - 64 + 1)), int(0.3 * (columns - 48 + 1)))
    resized = np.asarray(Image.fromarray(pixels).resize((columns, rows), Image.Resampling.BICUBIC))
    mirrored = resized[:, ::-1] if flip else resized
    expected = mirrored[top : top + 64, left : left + 48].transpose(2, 0, 1)
    # Pillow rounds to uint8 between the two directions, as torch does, but in the other order or precision.
    assert np.abs(out.numpy().astype(int) - expected).max() <= 3


def test_an_image_of_the_target_size_is_untouched():
    pixels = noise(32, 40)
    out = torch.empty(3, 32, 40, dtype=torch.uint8)
    assert frame(pixels, (32, 40), Framing(0.9, 0.9, False), out).crop == (0, 0)
    assert np.array_equal(out.permute(1, 2, 0).numpy(), pixels)


def test_random_offsets_are_uniform_and_reach_both_ends():
    framings = draw_framings(slice_draws(1, 2, 3, 20_000), "random", flip=True)
    tops = np.bincount([int(f.top * 5) for f in framings], minlength=5)
    lefts = np.bincount([int(f.left * 5) for f in framings], minlength=5)
    for counts in (tops, lefts):
        assert len(counts) == 5 and np.abs(counts / 4000 - 1).max() < 0.08
    assert abs(np.mean([f.flip for f in framings]) - 0.5) < 0.02
    assert abs(np.corrcoef([f.top for f in framings], [f.left for f in framings])[0, 1]) < 0.03


def test_centred_crops_lie_in_the_middle():
    (framing,) = draw_framings(slice_draws(0, 0, 0, 1), "center", flip=False)
    out = torch.empty(3, 10, 10, dtype=torch.uint8)
    assert frame(noise(10, 16), (10, 10), framing, out).crop == (0, 3)
    assert not framing.flip


def test_scalar_draws_belong_to_the_place_and_the_purpose():
    draws = slice_draws(7, 3, 1, 8)
    units = draws.unit("crop_top")
    assert units[2:5] == draws[2:5].unit("crop_top")
    assert units != draws.unit("crop_left")
    assert units != slice_draws(7, 3, 2, 8).unit("crop_top")
    assert all(0 <= u < 1 for u in units)
