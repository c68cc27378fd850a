"""Sources to pack, the job, and what of a packed folder tests look at."""

import io
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data.buckets import Bucket, Buckets
from data.tars import TarData
from tests.data.shard_files import sample, write_shard
from tools.cli import execute

BUCKETS = Buckets([Bucket(16, 16)])


def photo(width: int, height: int, seed: int) -> bytes:
    """A smooth picture, as JPEG: noise would not survive encoding."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
    return file.getvalue()


def write_sources(folder: Path) -> list[str]:
    """Two sources whose shards share keys, and the overrides that name them."""
    for shard in range(2):
        samples = [sample(i, width=24 + shard) for i in range(20)]
        write_shard(folder / "a" / f"{shard:05d}.tar", samples)
    write_shard(folder / "b" / "00000.tar", [sample(i, "b/", width=40) for i in range(15)])
    return [
        f"data.sources.a.shards={folder / 'a'}",
        "data.sources.a.where=index >= 3",
        f"data.sources.b.shards={folder / 'b'}",
    ]


def run(*overrides: str) -> int:
    return execute(["pack", "log.wandb=null", *overrides])


def tars(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.tar"))


def contents(folder: Path) -> dict[str, tuple[bytes, int | None]]:
    """Bytes of everything in the folder, hidden files too, and the tars' times."""
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns if p.suffix == ".tar" else None) for p in folder.iterdir()}


def epoch(sources: dict, **options) -> dict[str, tuple[torch.Tensor, str]]:
    """Picture and caption of each key, from an epoch of the real loader in centre crops."""
    data = TarData(sources, workers=0, crop="center", **options)
    split = data.open(BUCKETS)
    total = int(split.totals().sum())
    weights = {name: len(selection) for name, selection in split.selections.items()}
    for name, weight in weights.items():  # as many turns as samples: one epoch of each
        data.sources[name] = type(data.sources[name])(**{**vars(data.sources[name]), "weight": float(weight)})
    plan = split.plan(1, 1, seed=0)
    loader = split.loader(plan, range(1))
    served = [loader.step(step)[0] for step in range(total)]
    return {batch.keys[0]: (batch.images[0], batch.captions[0]) for batch in served}


def in_tar(folder: Path) -> dict[str, dict[str, bytes]]:
    found: dict[str, dict[str, bytes]] = {}
    for path in tars(folder):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                assert extension not in found.setdefault(key, {})
                file = tar.extractfile(member)
                assert file is not None
                found[key][extension] = file.read()
    return found
