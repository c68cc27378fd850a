"""SDXL's table in small: what is drawn, and what is measured of runs."""

import io
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from conf.compose import ROOT
from models.unet import UNet
from tools import cli
from tools.demo import judge
from tools.study.scenes import frechet
from tools.study.sizes import (
    LARGE,
    ScenesOfSizes,
    SizesEvaluation,
    class_of,
    features,
    ground_truth,
    recognized,
    single,
)
from trainer.checkpoint import load_weights

SCENES = ScenesOfSizes(40, large=6, least=8, most=15)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sizes")
    SCENES.prepare(folder)
    return folder


def test_so_many_pictures_are_large_and_classes_are_what_they_show(folder):
    with tarfile.open(folder / "data/00000.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    pictures = {name[:6]: Image.open(io.BytesIO(data)) for name, data in members.items() if name.endswith("png")}
    sides = Counter(picture.size[0] for picture in pictures.values())
    assert all(picture.size[0] == picture.size[1] for picture in pictures.values())
    assert sides.pop(LARGE) == 6 and sum(sides.values()) == 34 and min(sides) >= 8 and max(sides) <= 15
    scenes = list(single(40, 0))
    for index, scene in enumerate(scenes):
        (thing,) = scene.objects
        assert int(members[f"{index:06d}.cls"]) == class_of(thing)
        picture = pictures[f"{index:06d}"]
        if picture.size[0] == LARGE:
            assert judge.is_right(np.asarray(picture), [thing])
    assert len({class_of(scene.objects[0]) for scene in single(500, 0)}) == 24


def test_blur_is_measured_and_ground_truth_is_recognized():
    asked = list(single(200, 1))
    truth = ground_truth(asked, 16, 1)
    assert np.mean([recognized(p, s.objects[0]) for p, s in zip(truth, asked, strict=True)]) > 0.97
    assert np.mean([recognized(p, s.objects[0]) for p, s in zip(truth, reversed(asked), strict=True)]) < 0.2
    others = features(ground_truth(asked, 16, 2))
    blurred = [np.asarray(Image.fromarray(p).resize((9, 9), Image.Resampling.BOX).resize((16, 16))) for p in truth]
    sharp, blunt = frechet(others, features(truth)), frechet(others, features(blurred))
    assert 0 < sharp < blunt / 1.5


@pytest.mark.parametrize("label", ["untold", "told"])
def test_a_run_of_the_study_is_measured_as_of_large_pictures(folder, label, monkeypatch):
    study = yaml.safe_load((ROOT / "study/size_conditioning.yaml").read_text())
    base = [override.replace("${runs}/${study.name}", str(folder)) for override in study["base"]]
    where = [f"runs={folder}/runs", f"name={label}", f"data.cache_folder={folder}/cache", "log.wandb=null", "steps=2"]
    assert cli.execute(["train", *base, *study["axes"]["small_pictures"][label], *where]) == 0
    told: list[torch.Tensor] = []
    forward = UNet.forward

    def watched(network, *args, **conditions):
        told.append(conditions["size_ids"])
        return forward(network, *args, **conditions)

    monkeypatch.setattr(UNet, "forward", watched)
    evaluation = SizesEvaluation(count=40, steps=2, guidance=2.0, average="decay_9999")
    (row,) = evaluation.evaluate(folder / "runs" / label)
    assert row.keys() == set(evaluation.columns()) and row["frechet"] > 10 and 0 <= row["recognized"] < 0.5
    assert {tuple(ids) for batch in told for ids in batch.tolist()} == {(64, 64, 0, 0, 16, 16)}
    read = load_weights(folder / "runs" / label / "checkpoints/step_00000002", "denoiser")
    assert any(name.startswith("add_embedding") for name in read) == (label == "told")
