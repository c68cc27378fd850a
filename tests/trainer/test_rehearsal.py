"""A rehearsal shows what does not fit, by name, and leaves a run as it was."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from data.buckets import Bucket
from tests.trainer.jobs import train_on
from tools.demo.scenes import write_tars
from trainer.objectives.base import Losses, Phase
from trainer.rehearsal import rehearse


def test_a_rehearsed_run_is_bit_equal_to_one_that_was_not(tmp_path: Path):
    write_tars(tmp_path / "scenes", 60, seed=0, per_shard=60)
    curves = []
    for name, rehearsed in (("rehearsed", "true"), ("plain", "false")):
        source = f"data.sources.scenes.shards={tmp_path}/scenes"
        rows = train_on(2, tmp_path, f"name={name}", f"rehearse={rehearsed}", source)
        curves.append([(row["loss"], row["grad_norm"]) for row in rows])
    assert curves[0] == curves[1]


class TooLarge:
    """An objective of two phases, the second of which has no memory for more than a megapixel in all."""

    phases = (Phase("generator", ("g",)), Phase("discriminator", ("d",)))

    def losses(self, phase, networks, batch):
        if phase.name == "discriminator" and len(batch) * batch.images[0, 0].numel() > 2**20:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return Losses(torch.zeros(len(batch)))


class Notes:
    """An engine that notes what is asked of it."""

    device = torch.device("cpu")

    def __init__(self):
        self.networks, self.discarded, self.passes = {}, [], 0

    def accumulating(self, phase, last):
        assert last
        self.passes += 1
        return nullcontext()

    def backward(self, phase, loss):
        pass

    def discard(self, phase):
        self.discarded.append(phase.name)


def test_every_phase_meets_every_shape_and_drops_its_gradients():
    engine = Notes()
    rehearse(TooLarge(), engine, [Bucket(64, 64), Bucket(32, 128)], 2, 3, lambda slices: slices, 1)
    assert engine.passes == 4
    assert engine.discarded == ["generator", "discriminator"] * 2


def test_a_shape_without_room_is_named():
    with pytest.raises(ValueError, match=r"a pass of 2 samples of 512x2048 does not fit.*lower pass_size"):
        rehearse(TooLarge(), Notes(), [Bucket(64, 64), Bucket(512, 2048)], 2, 3, lambda slices: slices, 1)
