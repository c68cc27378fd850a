"""The contact sheet and the bucket table."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data.batch import Batch
from data.buckets import BucketList
from data.compiled import compile_sizes
from data.draws import slice_draws
from data.inspect import bucket_fill, bucket_table, contact_sheet
from data.plan import Plan, PlanSource
from models.layout import Layout


def plan(folder: Path) -> Plan:
    buckets = BucketList([[64, 64], [32, 128], [128, 32]])
    width, height = np.array([64] * 30 + [128] * 10), np.array([64] * 30 + [32] * 10)
    return Plan([PlanSource("photos", compile_sizes([(width, height)], 40, buckets, folder, "test"))], 2, 5, seed=0)


def test_bucket_fill_counts_samples_shares_and_slices(tmp_path):
    assert bucket_fill(plan(tmp_path)) == [
        {"source": "photos", "bucket": "64x64", "samples": 30, "share": 0.75, "slices": 6.0},
        {"source": "photos", "bucket": "32x128", "samples": 10, "share": 0.25, "slices": 2.0},
    ]
    assert [line.split() for line in bucket_table(plan(tmp_path)).splitlines()][1:] == [
        ["photos", "64x64", "30", "75.0%", "6.0"],
        ["photos", "32x128", "10", "25.0%", "2.0"],
    ]


def test_every_picture_is_on_the_sheet(tmp_path):
    rng = np.random.default_rng(0)
    batches = []
    for lane, (height, width) in enumerate([(64, 96), (128, 32)]):
        n = 11
        batches.append(
            Batch(
                draws=slice_draws(0, 0, lane, n),
                keys=[f"{i}" for i in range(n)],
                captions=["", "short", "a long caption without end " * 20, "x" * 500] + ["more"] * (n - 4),
                images=torch.from_numpy(rng.integers(0, 256, (n, 3, height, width), dtype=np.uint8)),
                original_size=torch.tensor([[height * 2, width * 2]] * n),
                crop=torch.zeros(n, 2, dtype=torch.int64),
                fields={"flip": torch.tensor([False, True] * 5 + [True])},
            )
        )
    path = tmp_path / "run" / "sheet.png"
    contact_sheet(batches, path, bucket_table(plan(tmp_path)))
    sheet = np.asarray(Image.open(path))
    colours = sheet.astype(np.uint32) @ [1 << 16, 1 << 8, 1]
    for batch in batches:
        for image in batch.images.permute(0, 2, 3, 1).numpy():
            corners = np.argwhere(colours == image[0, 0].astype(np.uint32) @ [1 << 16, 1 << 8, 1])
            height, width = image.shape[:2]
            assert any(np.array_equal(sheet[y : y + height, x : x + width], image) for y, x in corners)


def test_fields_are_drawn_into_the_picture_and_beside_it(tmp_path):
    labels = torch.zeros(2, 64, 64, dtype=torch.int16)
    labels[:, :, 32:] = 5
    batch = Batch(
        draws=slice_draws(0, 0, 0, 2),
        keys=["a", "b"],
        captions=["", ""],
        images=torch.full((2, 3, 64, 64), 7, dtype=torch.uint8),
        original_size=torch.tensor([[64, 64]] * 2),
        crop=torch.zeros(2, 2, dtype=torch.int64),
        fields={
            "class": torch.tensor([3, 4]),
            "map": labels,
            "mask": labels == 5,
            "boxes": [Layout((1,), ((0.25, 0.25, 0.75, 0.75),)), Layout()],
        },
    )
    contact_sheet([batch], tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    top, left = np.argwhere((sheet == 7).all(2))[0]
    picture, beside, mask = (sheet[top : top + 64, left + 64 * i : left + 64 * (i + 1)] for i in range(3))
    box = np.zeros((64, 64), bool)
    box[16:49, 16:49] = True
    box[17:48, 17:48] = False
    assert ((picture != 7).any(2) == box).all()
    assert (beside[:, :32] == 0).all() and len(np.unique(beside[:, 32:].reshape(-1, 3), axis=0)) == 1
    assert (mask[:, 32:] == 255).all() and (mask[:, :32] == 0).all()
