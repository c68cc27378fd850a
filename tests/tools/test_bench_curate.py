"""The benchmarks of curation, small: every figure that they promise, and alternatives that do the same."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "data" / "curation"))
from onnx_file import write_convolution

from data.curation.base import Media
from data.curation.blank import Blank
from data.curation.hashes import ContentHash, PerceptualHash
from data.curation.sharpness import Sharpness
from data.curation.text_area import TextArea
from data.curation.text_detectors import ProbabilityMap
from tools.bench import curate, curate_bare, curate_tasks
from tools.bench.curate_samples import picture

FILTERS = ["sharpness", "blank", "perceptual_hash", "content_hash", "text_area", "text_area_mser"]
CLIPS = ["probe", "motion", "static", "cuts"]
PASSES = ["pictures", "videos", "parts", "stills"]


def test_every_filter_and_pass_is_measured_against_its_alternative(tmp_path):
    model = write_convolution(tmp_path / "text.onnx", np.full((1, 3), 0.5), np.zeros(1))
    result = curate.run(pictures=2, clips=1, height=128, frames=40, repeats=1, text_model=str(model))
    json.dumps(result)
    assert list(result) == [*FILTERS, *CLIPS, *PASSES, "text_area_network"]
    for name, part in result.items():
        assert part["samples_per_s"] > 0 and part["alternative_samples_per_s"] > 0, name
        assert part["ratio"] == pytest.approx(part["samples_per_s"] / part["alternative_samples_per_s"]), name


def test_measurements_can_be_chosen_by_name():
    assert list(curate.run(pictures=1, clips=1, height=64, frames=8, repeats=1, only=["stills", "blank"])) == [
        "stills",
        "blank",
    ]
    with pytest.raises(ValueError, match="no measurement 'blur'; there are sharpness, blank"):
        curate.run(pictures=1, clips=1, height=64, frames=8, repeats=1, only=["blur"])


def test_the_bare_calls_find_what_the_filters_find(tmp_path):
    data = picture(360, 1, text=True)
    pixels, sample = curate_bare.decode(data), Media("key", {}, "image", data, 512)
    assert np.array_equal(pixels, sample.image)
    assert Sharpness().score([sample])[0]["sharpness"] == pytest.approx(curate_bare.sharpness(pixels))
    blank = Blank().score([sample])[0]
    assert (blank["contrast"], blank["uniformity"]) == pytest.approx(curate_bare.blank(pixels))
    hashes = PerceptualHash().score([sample])[0]
    ours = [np.uint64(one).tobytes() for one in (hashes["phash"], *hashes["phash_windows"])]
    assert (ours, [hashes["phash_colors"], *hashes["phash_window_colors"]]) == curate_bare.perceptual_hash(pixels)
    assert ContentHash().score([sample])[0]["content_hash"] == curate_bare.content_hash(data)


def test_the_bare_network_finds_the_text_that_the_filter_finds(tmp_path):
    # A network that says "text" where a picture is bright: three bright boxes on a dark ground.
    model = str(write_convolution(tmp_path / "text.onnx", np.full((1, 3), 8.0), np.array([-8.0])))
    pixels = np.zeros((320, 640, 3), np.uint8)
    for left in (40, 240, 440):
        pixels[100:180, left : left + 120] = 255
    sample = Media("key", {}, "image", b"", 512, picture=pixels)
    area = TextArea(ProbabilityMap(model, 320, unclip=0.0)).score([sample])[0]["text_area"]
    assert area == pytest.approx(3 * 120 * 80 / (320 * 640), rel=0.05)
    assert curate_bare.Network(model, 320)(pixels) == pytest.approx(area, rel=0.05)


def test_two_tasks_are_held_against_two_processes_of_the_bare_libraries(tmp_path):
    result = curate_tasks.run(shards=2, per_shard=2, height=64, repeats=1, folder=str(tmp_path))
    assert not list(tmp_path.iterdir())
    json.dumps(result)
    assert result["samples"] == 4
    seconds, speed_up = result["seconds"], result["speed_up"]
    for side in ("curate", "library"):
        assert speed_up[side] == pytest.approx(seconds[side][1][0] / seconds[side][2][0])
    assert result["ratio"] == pytest.approx(speed_up["curate"] / speed_up["library"])
    with pytest.raises(ValueError, match="shards=3 a multiple"):
        curate_tasks.run(tasks=2, shards=3)
