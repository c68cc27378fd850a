"""Tars of drawn pictures with everything that latent diffusion's tasks are conditioned on."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from tests.data.shard_files import write_shard

COLOURS = np.array([[30, 30, 30], [220, 40, 40], [40, 200, 60], [50, 60, 220]], np.uint8)
NAMES = ("nothing", "red", "green", "blue")


def write_task_tars(folder: Path, count: int, height: int = 40, width: int = 48) -> Path:
    """`count` samples: <key>.png with one or two rectangles, .seg.png with their labels, .cls with the first one's,
    .txt with their names, .json with boxes."""
    samples = []
    for index in range(count):
        rng = np.random.default_rng(index)
        labels = np.zeros((height, width), np.uint8)
        boxes = []
        for _ in range(1 + index % 2):
            label = int(rng.integers(1, 4))
            top, left = int(rng.integers(height // 2)), int(rng.integers(width // 2))
            tall, wide = int(rng.integers(8, height // 2)), int(rng.integers(8, width // 2))
            labels[top : top + tall, left : left + wide] = label
            boxes.append({"bbox": [left, top, wide, tall], "category_id": label})
        samples.append(
            {
                "__key__": f"{index:04d}",
                "png": _png(COLOURS[labels]),
                "seg.png": _png(labels),
                "cls": str(boxes[0]["category_id"]).encode(),
                "txt": " and ".join(NAMES[box["category_id"]] for box in boxes),
                "json": {"boxes": boxes, "aesthetic": 5 + index % 3},
            }
        )
    write_shard(folder / "0.tar", samples)
    return folder


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
