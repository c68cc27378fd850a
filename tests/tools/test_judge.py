"""The judge against ground truth: it sees what was drawn, through files, shrinking, noise and blur, and no more."""

import io
from dataclasses import replace

import cv2
import numpy as np
import pytest
from PIL import Image

from tools.demo.judge import (
    Finding,
    analytic_chance,
    composition_accuracy,
    is_right,
    look,
    shuffled_chance,
)
from tools.demo.scenes import COLOURS, FORMATS, PLACES, SHAPES, Scene, SceneObject, draw, encode, scenes

COUNT = 240


def shrunk(picture: np.ndarray) -> np.ndarray:
    height, width = picture.shape[:2]
    return cv2.resize(picture, (width // 2, height // 2), interpolation=cv2.INTER_AREA)


def enlarged(picture: np.ndarray) -> np.ndarray:
    height, width = picture.shape[:2]
    return cv2.resize(shrunk(picture), (width, height), interpolation=cv2.INTER_CUBIC)


def noisy(picture: np.ndarray, strength: float) -> np.ndarray:
    noise = np.random.default_rng(int(picture.sum())).normal(0, strength, picture.shape)
    return (picture + noise).clip(0, 255).astype(np.uint8)


CONDITIONS = {
    "as stored": lambda picture: picture,
    "at training size": shrunk,
    "at training size and back": enlarged,
    "at training size, noisy": lambda picture: noisy(shrunk(picture), 8),
    "at training size, noisy and blurred": lambda picture: cv2.GaussianBlur(noisy(shrunk(picture), 12), (0, 0), 0.5),
    "at training size, in weaker colours": lambda picture: (0.75 * shrunk(picture) + 50).astype(np.uint8),
}


@pytest.fixture(scope="module")
def ground_truth() -> list[tuple[Scene, np.ndarray]]:
    """Training and held-out scenes, decoded from their files in all formats."""
    rng = np.random.default_rng(5)
    drawn = []
    for split in ("train", "test"):
        for index, scene in enumerate(scenes(COUNT // 2, seed=11, split=split)):
            data = encode(draw(scene, rng), FORMATS[index % len(FORMATS)])
            drawn.append((scene, np.array(Image.open(io.BytesIO(data)).convert("RGB"))))
    return drawn


@pytest.mark.parametrize("condition", CONDITIONS)
def test_the_judge_agrees_with_ground_truth(ground_truth, condition):
    pictures = [CONDITIONS[condition](picture) for _, picture in ground_truth]
    assert composition_accuracy(pictures, [scene.objects for scene, _ in ground_truth]) >= 0.97


def test_every_shape_colour_and_place_is_recognised():
    rng = np.random.default_rng(0)
    for shape in SHAPES:
        for colour in COLOURS:
            for place in PLACES:
                thing = SceneObject(shape, colour, place)
                assert look(shrunk(draw(Scene((thing,), "", 64, 64), rng))) == [Finding(shape, colour, place)]


@pytest.mark.parametrize("part", ["shape", "colour", "place"])
def test_a_picture_with_one_wrong_part_is_rejected(ground_truth, part):
    names = {"shape": SHAPES, "colour": tuple(COLOURS), "place": tuple(PLACES)}[part]
    for scene, picture in ground_truth:
        first = scene.objects[0]
        for other in set(names) - {getattr(first, part)}:
            assert not is_right(picture, (replace(first, **{part: other}), *scene.objects[1:]))


def test_pictures_with_an_object_too_many_or_too_few_are_rejected(ground_truth):
    for scene, picture in ground_truth:
        if len(scene.objects) == 2:
            assert not is_right(picture, scene.objects[:1])
            swapped = tuple(
                replace(thing, place=other.place)
                for thing, other in zip(scene.objects, scene.objects[::-1], strict=True)
            )
            same = (
                scene.objects[0].shape == scene.objects[1].shape and scene.objects[0].colour == scene.objects[1].colour
            )
            assert is_right(picture, swapped) == same
        else:
            assert not is_right(picture, (*scene.objects, replace(scene.objects[0], place="top")))


def test_an_empty_picture_noise_and_a_stray_blob_show_no_scene():
    asked = (SceneObject("circle", "red", "centre"),)
    blank = np.full((32, 32, 3), 230, np.uint8)
    assert look(blank) == []
    assert not is_right(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8), asked)
    picture = draw(Scene(asked, "", 64, 64), np.random.default_rng(0))
    assert is_right(picture, asked)
    picture[2:12, 2:12] = 20
    assert not is_right(picture, asked)


def test_an_object_between_two_places_is_nowhere():
    picture = draw(Scene((SceneObject("circle", "red", "centre"),), "", 64, 64), np.random.default_rng(0))
    moved = np.roll(picture, (8, 8), axis=(0, 1))
    assert look(moved) == [Finding("circle", "red", None)]


def test_chance_is_what_a_blind_draughtsman_gets():
    asked = [scene.objects for scene in scenes(200, seed=2, split="test")]
    rng = np.random.default_rng(3)
    blind = [shrunk(draw(scene, rng)) for scene in scenes(200, seed=4, split="train")]
    # Three in four prompts have 120 equally likely answers of those with one object, one in four 1,152 with two.
    assert analytic_chance(asked) == pytest.approx(0.75 * 0.75 / 120 + 0.25 * 0.25 / 1152)
    assert shuffled_chance(blind, asked) == 0.0, "scenes free of held-out objects are never right for these prompts"
    seeing = [shrunk(draw(scene, rng)) for scene in scenes(200, seed=2, split="test")]
    assert composition_accuracy(seeing, asked) >= 0.97
    # Ten triples of the test's half are at places of single objects: with both of one object, one deal in ten is right.
    assert shuffled_chance(seeing, asked) == pytest.approx(0.75 * 0.75 / 10, abs=0.015)


def test_pictures_and_prompts_must_be_as_many():
    with pytest.raises(ValueError, match="1 pictures for 2 prompts"):
        composition_accuracy([np.zeros((8, 8, 3), np.uint8)], [(), ()])
