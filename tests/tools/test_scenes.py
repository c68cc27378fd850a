"""The demo's scenes: the hold-out is what the docstring says, the tars are well formed, and a seed fixes every byte."""

import hashlib
import io
import itertools
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from tools.demo.scenes import COLOURS, FORMATS, PLACES, SHAPES, SIZES, Scene, SceneObject, draw, scenes, write_tars

TRIPLES = [SceneObject(*triple) for triple in itertools.product(SHAPES, COLOURS, PLACES)]


def of(split: str) -> set[SceneObject]:
    return {thing for thing in TRIPLES if thing.split == split}


def test_a_sixth_of_all_triples_is_held_out_and_every_pair_is_still_shown():
    shown = of("train")
    assert (len(TRIPLES), len(shown)) == (216, 180)
    assert {(o.shape, o.colour) for o in shown} == set(itertools.product(SHAPES, COLOURS))
    assert {(o.shape, o.place) for o in shown} == set(itertools.product(SHAPES, PLACES))
    assert {(o.colour, o.place) for o in shown} == set(itertools.product(COLOURS, PLACES))


def test_half_of_the_held_out_triples_are_for_the_test_alone_and_both_halves_have_every_shape_colour_and_place():
    for held in (of("validation"), of("test")):
        assert len(held) == 18
        assert {o.shape for o in held} == set(SHAPES)
        assert {o.colour for o in held} == set(COLOURS)
        assert {o.place for o in held} == set(PLACES)


def test_training_scenes_never_show_a_held_out_object_and_held_out_scenes_always_one_of_their_own_half():
    seen = {thing for scene in scenes(3000, 0, "train") for thing in scene.objects}
    assert seen == of("train"), "3,000 scenes show every allowed triple"
    for split in ("validation", "test"):
        held = list(scenes(1000, 0, split))
        assert all(of(split).intersection(scene.objects) for scene in held)
        asked = {thing for scene in held for thing in scene.objects} - of("train")
        assert asked == of(split), "1,000 prompts ask for every held-out one of the half, and for none of the other"


def test_a_caption_names_each_object_with_its_place():
    for scene in scenes(500, seed=1, split="train"):
        for thing in scene.objects:
            assert f"{thing.colour} {thing.shape}" in scene.caption
        if len(scene.objects) == 1:
            assert scene.objects[0].place in scene.caption


@pytest.mark.parametrize("relation, first", [("to the left of", 0), ("to the right of", 1), ("above", 0), ("below", 1)])
def test_a_relation_names_the_object_that_it_is_true_of_first(relation, first):
    told = [scene for scene in scenes(500, seed=1, split="train") if f" {relation} " in scene.caption]
    assert told
    for scene in told:
        one, other = scene.objects[first], scene.objects[1 - first]
        assert scene.caption == f"a {one.colour} {one.shape} {relation} a {other.colour} {other.shape}"
        assert (
            one.place
            == {"to the left of": "left", "to the right of": "right", "above": "top", "below": "bottom"}[relation]
        )


def test_tars_hold_picture_caption_and_facts_in_three_formats_and_aspects(tmp_path):
    written = write_tars(tmp_path, 30, seed=3, per_shard=20)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["00000.tar", "00001.tar"]
    members: dict[str, dict[str, bytes]] = {}
    for path in sorted(tmp_path.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                members.setdefault(key, {})[extension] = tar.extractfile(member).read()
    assert len(members) == 30
    kinds, sizes = set(), set()
    for scene, sample in zip(written, members.values(), strict=True):
        (extension,) = set(sample) - {"txt", "json"}
        facts = json.loads(sample["json"])
        size = Image.open(io.BytesIO(sample[extension])).size
        assert size == (facts["width"], facts["height"]) == (scene.width, scene.height)
        assert sample["txt"].decode() == facts["caption"] == scene.caption
        assert tuple(SceneObject(**thing) for thing in facts["objects"]) == scene.objects
        kinds.add(extension)
        sizes.add(size)
    assert kinds == set(FORMATS) and sizes == set(SIZES)


def test_the_same_seed_writes_the_same_bytes_and_another_does_not(tmp_path):
    def digest(name: str, seed: int) -> str:
        write_tars(tmp_path / name, 12, seed)
        return hashlib.sha256((tmp_path / name / "00000.tar").read_bytes()).hexdigest()

    assert digest("a", 0) == digest("b", 0) != digest("c", 1)


def test_an_unknown_shape_is_named():
    scene = Scene((SceneObject("hexagon", "red", "left"),), "", 64, 64)
    with pytest.raises(ValueError, match="hexagon"):
        draw(scene, np.random.default_rng(0))
