"""What small studies measure of drawn scenes, on pictures of which we know what they show."""

import numpy as np
import pytest

from tools.demo.scenes import SceneObject, draw, scenes
from tools.study.scenes import DrawnScenes, agreement, frechet


def test_ground_truth_agrees_and_other_pictures_agree_in_part():
    rng = np.random.default_rng(0)
    asked = list(scenes(40, 0, "validation"))
    assert np.mean([agreement(draw(scene, rng), scene.objects) for scene in asked]) > 0.99
    single = next(scene for scene in asked if len(scene.objects) == 1)
    (thing,) = single.objects
    picture = draw(single, rng)
    other = "red" if thing.colour != "red" else "blue"
    assert agreement(picture, [SceneObject(thing.shape, other, thing.place)]) == pytest.approx(2 / 3)
    elsewhere = "top left" if thing.place != "top left" else "centre"
    assert agreement(picture, [SceneObject(thing.shape, thing.colour, elsewhere)]) == 0
    assert agreement(np.full_like(picture, 230), [thing]) == 0


def test_an_object_too_many_counts_against_a_picture():
    rng = np.random.default_rng(0)
    pair = next(scene for scene in scenes(40, 0, "validation") if len(scene.objects) == 2)
    assert agreement(draw(pair, rng), [pair.objects[0]]) == 0
    assert agreement(draw(pair, rng), pair.objects) == 1


def test_the_frechet_distance_is_that_of_normal_distributions():
    # Between N(0, 1) and N(m, s^2) in each of d independent directions: d (m^2 + (1 - s)^2).
    rng = np.random.default_rng(0)
    a = rng.standard_normal((20000, 3))
    b = 0.5 + 2 * rng.standard_normal((20000, 3))
    assert frechet(a, b) == pytest.approx(3 * (0.25 + 1), rel=0.05)
    assert frechet(a, a) == pytest.approx(0, abs=1e-6)


def test_scenes_are_drawn_once(tmp_path):
    DrawnScenes(20).prepare(tmp_path)
    first = (tmp_path / "data" / "00000.tar").stat().st_mtime_ns
    DrawnScenes(20).prepare(tmp_path)
    assert (tmp_path / "data" / "00000.tar").stat().st_mtime_ns == first
    assert not (tmp_path / "data.partial").exists()
