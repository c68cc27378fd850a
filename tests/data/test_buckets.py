"""Aspect buckets against brute force, and the shipped configurations."""

import math
from pathlib import Path

import hydra
import numpy as np
import pytest
from omegaconf import OmegaConf

import conf
from data.buckets import Bucket, BucketList, Buckets, ConstantArea, Square


def shipped(name: str) -> Buckets:
    return hydra.utils.instantiate(OmegaConf.load(Path(conf.__file__).parent / "buckets" / f"{name}.yaml"))


def test_every_image_goes_to_the_bucket_nearest_in_log_aspect():
    rng = np.random.default_rng(0)
    for buckets in (shipped("sdxl"), shipped("constant_area"), BucketList([[64, 64], [32, 96], [200, 40]])):
        width, height = rng.integers(1, 5000, 2000), rng.integers(1, 5000, 2000)
        chosen = buckets.assign(width, height)
        assert chosen.dtype == np.uint8
        for w, h, index in zip(width.tolist(), height.tolist(), chosen.tolist(), strict=True):
            distances = [abs(math.log(w / h) - math.log(shape.width / shape.height)) for shape in buckets.shapes]
            assert distances[index] <= min(distances) + 1e-12


def test_an_image_of_a_buckets_own_shape_goes_there():
    for name in ("sdxl", "constant_area", "square"):
        buckets = shipped(name)
        width, height = (np.array([getattr(shape, side) for shape in buckets.shapes]) for side in ("width", "height"))
        assert buckets.assign(width, height).tolist() == list(range(len(buckets)))


def test_sdxl_has_its_forty_buckets():
    shapes = shipped("sdxl").shapes
    assert len(set(shapes)) == 40
    assert all(shape.height % 64 == 0 and shape.width % 64 == 0 for shape in shapes)
    assert all(0.9 * 1024**2 < shape.height * shape.width <= 1024**2 for shape in shapes)
    assert (shapes[0], shapes[20], shapes[-1]) == (Bucket(512, 2048), Bucket(1024, 1024), Bucket(2048, 512))


@pytest.mark.parametrize(
    ("resolution", "step", "max_aspect"), [(1024, 64, 4.0), (256, 32, 2.0), (64, 16, 2.0), (96, 8, 3.0)]
)
def test_constant_area_buckets_are_the_longest_that_fit(resolution, step, max_aspect):
    buckets = ConstantArea(resolution, step, max_aspect)
    shapes = set(buckets.shapes)
    assert Bucket(resolution, resolution) in shapes
    for shape in shapes:
        assert shape.height % step == shape.width % step == 0
        assert Bucket(shape.width, shape.height) in shapes, "a rule knows no difference between portrait and landscape"
        short, long = sorted((shape.height, shape.width))
        assert long <= max_aspect * short
        assert short * long <= resolution**2 < short * (long + step), "the longest side that keeps the area"
    assert list(buckets.shapes) == sorted(buckets.shapes, key=lambda shape: shape.aspect)


def test_wrong_buckets_are_named():
    with pytest.raises(ValueError, match=r"64x64 and 32x32 have the same aspect ratio|32x32 and 64x64 have the same"):
        BucketList([[32, 32], [64, 64]])
    with pytest.raises(ValueError, match="no buckets"):
        BucketList([])
    with pytest.raises(ValueError, match=r"\[1, 2, 3\]: expected \[height, width\]"):
        BucketList([[1, 2, 3]])
    with pytest.raises(ValueError, match="0x8: height and width must be positive"):
        BucketList([[0, 8]])
    with pytest.raises(ValueError, match="at most 255"):
        BucketList([[1000, width] for width in range(1, 300)])
    with pytest.raises(ValueError, match="resolution 100 must be a multiple of step 64"):
        ConstantArea(100, 64, 2.0)
    with pytest.raises(ValueError, match="max_aspect"):
        ConstantArea(128, 64, 0.5)


def test_an_image_without_a_size_is_named():
    with pytest.raises(ValueError, match="row 1 of 2 has size 0x7"):
        Square(8).assign(np.array([3, 7]), np.array([3, 0]))


def test_fingerprint_tells_shapes_and_their_order_apart():
    prints = {
        buckets.fingerprint
        for buckets in (Square(64), Square(128), BucketList([[64, 64], [32, 64]]), BucketList([[32, 64], [64, 64]]))
    }
    assert len(prints) == 4
    assert BucketList([[64, 64]]).fingerprint == Square(64).fingerprint
