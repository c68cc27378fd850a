"""Slices to passes: what is in them, what is refused, and that training does not notice."""

from pathlib import Path

import pytest
import torch

from data.batch import Batch
from data.buckets import Bucket
from data.draws import slice_draws
from tests.trainer.jobs import train_on
from tools.demo.scenes import write_tars
from trainer.passes import Passes
from trainer.rehearsal import blank


def slices(count: int, size: int) -> list[Batch]:
    """Slices whose keys tell lane and slot, and whose pixels tell the lane."""
    made = []
    for lane in range(count):
        batch = blank(Bucket(4, 6), size, lane)
        batch.images.fill_(lane)
        batch.keys[:] = [f"{lane}.{slot}" for slot in range(size)]
        made.append(batch)
    return made


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (None, [["0.0", "0.1"], ["1.0", "1.1"], ["2.0", "2.1"], ["3.0", "3.1"]]),
        (1, [["0.0"], ["0.1"], ["1.0"], ["1.1"], ["2.0"], ["2.1"], ["3.0"], ["3.1"]]),
        (4, [["0.0", "0.1", "1.0", "1.1"], ["2.0", "2.1", "3.0", "3.1"]]),
        (8, [["0.0", "0.1", "1.0", "1.1", "2.0", "2.1", "3.0", "3.1"]]),
    ],
)
def test_passes_hold_the_samples_in_order_with_their_own_draws(size, expected):
    passes = Passes(size, slice_size=2, lanes=4, buckets=1, scope="sample")(slices(4, 2))
    assert [batch.keys for batch in passes] == expected
    for batch in passes:
        for i, key in enumerate(batch.keys):
            lane, slot = map(int, key.split("."))
            assert (batch.images[i] == lane).all()
            own = slice_draws(0, batch.draws.places[i][0], lane, 2).normal("noise", (5,))[slot]
            assert torch.equal(batch.draws.normal("noise", (5,))[i], own)


@pytest.mark.parametrize(
    ("size", "buckets", "scope", "says"),
    [
        (3, 1, "sample", "pass_size=3 does not divide the slice of 4 samples"),
        (6, 1, "sample", "pass_size=6 does not group 4 slices of 4 samples evenly"),
        (12, 1, "sample", "pass_size=12 does not group 4 slices of 4 samples evenly"),
        (32, 1, "sample", "pass_size=32 does not group 4 slices"),
        (8, 3, "sample", "needs a single bucket, and there are 3"),
        (2, 1, "slice", "'slice', this objective takes passes of 4 samples"),
        (8, 1, "slice", "'slice', this objective takes passes of 4 samples"),
        (4, 1, "global", "'global', this objective takes passes of 16 samples"),
        (None, 2, "global", "4 slices in one pass, which needs a single bucket, and there are 2: take buckets=square"),
    ],
)
def test_sizes_that_cannot_be_are_refused(size, buckets, scope, says):
    with pytest.raises(ValueError, match=says):
        Passes(size, slice_size=4, lanes=4, buckets=buckets, scope=scope)


def test_slice_scope_takes_slices_and_global_scope_all_that_a_rank_has():
    assert [len(batch) for batch in Passes(None, 2, 4, 3, "slice")(slices(4, 2))] == [2, 2, 2, 2]
    assert [len(batch) for batch in Passes(None, 2, 4, 1, "global")(slices(4, 2))] == [8]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("passes")
    write_tars(folder / "scenes", 60, seed=0)
    return folder


def test_fused_and_split_passes_train_like_slices(folder):
    common = [f"data.sources.scenes.shards={folder}/scenes", "buckets=square", "buckets.size=32", "schedule.warmup=0"]
    common += ["schedule.lr=1e-2", "data.holdout=0.2", "validation.every=4", "validation.samples=9"]
    reference = train_on(1, folder, "name=slices", *common)
    assert reference[0]["loss"] != reference[-1]["loss"]
    for world, size in ((1, 4), (2, 4), (1, 8), (2, 1)):
        rows = train_on(world, folder, f"name=passes_{world}_{size}", f"pass_size={size}", *common)
        for ours, theirs in zip(rows, reference, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5), (world, size)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        assert rows[-1]["val/loss"] == pytest.approx(reference[-1]["val/loss"], rel=1e-4)
