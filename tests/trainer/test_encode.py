"""Encoded once, trained on as if it were encoded on the fly."""

import io
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import webdataset
from PIL import Image
from safetensors.torch import load

from conf.compose import compose
from conf.errors import ConfigError
from conf.schema import check
from tests.data.shard_files import picture, write_tar
from tests.trainer.jobs import train_on
from tests.trainer.ranks import ranks
from trainer.distributed import World
from trainer.encode import Config, encode, preflight
from trainer.run_directory import read_jsonl

WORDS = ["red", "green", "blue", "small", "large", "circle", "square", "left", "right", "above"]
BASE = [
    "first_stage=kl_tiny",
    "conditioner=t5_local",
    *("conditioner.length=12", "conditioner.width=32", "conditioner.vocab_size=64", "conditioner.steps=3"),
    *("model.in_channels=4", "model.out_channels=4", "model.joint_attention_dim=32", "model.pooled_projection_dim=32"),
    *(
        "model.patch_size=2",
        "buckets=tiny",
        "buckets.sizes=[[32,32],[24,40],[40,24]]",
        "data.crop=center",
        "data.flip=true",
    ),
    *("objective.caption_dropout=0.3", "steps=10", "data.holdout=0.1"),
]


def scene(i: int) -> bytes:
    """A smooth picture: random colours at a few points, enlarged; of three aspect ratios."""
    width, height = [(50, 50), (70, 40), (40, 70)][i % 3]
    points = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(points).resize((width, height), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


def write_shards(folder: Path, shards: int = 2, size: int = 24, bad: tuple[int, ...] = ()) -> None:
    """Shards of scenes under captions; every seventh has none, and the bad ones' pictures cannot be decoded."""
    for s in range(shards):
        members = []
        for i in range(s * size, (s + 1) * size):
            data = scene(i)
            members.append((f"{i:04d}.png", data[:60] + bytes(len(data) - 60) if i in bad else data))
            caption = " ".join(np.random.default_rng(i).choice(WORDS, 1 + i % 5)) if i % 7 else ""
            members.append((f"{i:04d}.txt", caption.encode()))
            members.append((f"{i:04d}.json", f'{{"other": "the other of {WORDS[i % 10]}"}}'.encode()))
        write_tar(folder / f"{s:05d}.tar", members)


def overrides(folder: Path, *more: str) -> list[str]:
    shared = [f"data.sources.s.shards={folder}/shards", f"conditioner.folder={folder}/text_encoder"]
    return [*BASE, *shared, *more]


def encode_on(world: int, folder: Path, *more: str) -> None:
    """The job on gloo ranks."""
    common = [f"runs={folder}/runs", f"data.cache_folder={folder}/cache", "data.workers=0", "engine.precision=fp32"]
    ranks(world).run(_encode, [*common, *overrides(folder, *more)])


def _encode(arguments: list[str]) -> None:
    config = compose("encode", arguments)
    check(config, Config)
    preflight(config, dist.get_world_size())
    encode(config, World(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu"), launched=False))


def losses(world: int, folder: Path, name: str, *more: str) -> list[float]:
    rows = train_on(world, folder, *overrides(folder, *more), f"name={name}")
    return [row["loss"] for row in rows]


def files(folder: Path, name: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "shards" / f"encoded-{name}").iterdir())}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encode")
    write_shards(folder / "shards")
    encode_on(1, folder, "data.encoded=whole", "encode.dtype=float32", "encode.batch=5")
    return folder


@pytest.fixture(scope="module")
def on_the_fly(folder) -> list[float]:
    return losses(1, folder, "fly")


def test_training_from_float32_encodings_equals_encoding_on_the_fly(folder, on_the_fly):
    assert losses(1, folder, "whole", "data.encoded=whole") == pytest.approx(on_the_fly, rel=1e-6)
    assert losses(2, folder, "whole2", "data.encoded=whole") == pytest.approx(on_the_fly, rel=1e-5)
    keys = [read_jsonl(folder / "runs" / name / "keys.jsonl") for name in ("fly", "whole", "whole2")]
    assert keys[0] == keys[1] == keys[2]
