"""The `sample` job: pictures of prompts, from a run or a diffusers pipeline."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from conf.errors import ConfigError
from conf.schema import build
from data.decode import DecodeError, decode_image
from data.transforms import CENTER, Framing, frame
from models.guidance import Guidance
from models.samplers import Sampler
from trainer.distributed import Cluster, joined
from trainer.engines.networks import prepare_frozen
from trainer.loading import load_model
from trainer.sampling import Picture, draw, grid, save_png


@dataclass
class Config:
    """conf/sample.yaml, whose comments explain the keys. A class stands for a `_target_` that builds such an object."""

    sampler: Sampler
    guidance: Guidance
    cluster: Cluster
    source: str
    prompts: list[str]
    prompts_file: str | None
    images: list[str]
    each: PositiveInt
    seed: int
    height: PositiveInt | None
    width: PositiveInt | None
    average: str
    batch: PositiveInt
    device: Literal["auto", "cpu", "cuda"]
    precision: Literal["fp32", "bf16"]
    out: str
    name: str
    runs: str


def run(config: Any) -> None:
    """Draw every prompt; write `<out>/<number>.png` and `<out>/grid.png`, each with its prompts and seeds inside."""
    given = _given(config)
    loaded = load_model(config.source, config.average)
    height, width = config.height or loaded.size[0], config.width or loaded.size[1]
    if config.images and not getattr(loaded.networks["conditioner"], "reads_images", False):
        raise ConfigError(f"images: no encoder of {loaded.source} reads pictures; leave them out.")
    seen = {path: _read_image(path, (height, width)) for _, path in given if path is not None}
    pictures = [
        Picture(prompt, config.seed + i, height, width, seen[path] if path is not None else None)
        for prompt, path in given
        for i in range(config.each)
    ]
    sampler = build(config.sampler)
    with joined(config.device) as world:
        for name, network in loaded.networks.items():
            prepare_frozen(name, network, False, config.precision, loaded.seed, world.device)
        images = draw(
            loaded.networks, loaded.process, sampler, build(config.guidance), pictures, world.device, config.batch
        )
        if not world.is_main:
            return
        out = Path(config.out)
        shared = {"source": loaded.source, "sampler": type(sampler).__name__, "steps": sampler.steps}
        shared["guidance"] = config.guidance.scale
        paths = [path for _, path in given for _ in range(config.each) if path is not None]
        for number, (picture, image) in enumerate(zip(pictures, images, strict=True)):
            told = {"prompt": picture.prompt, "seed": picture.seed, **({"image": paths[number]} if paths else {})}
            save_png(image, out / f"{number:05d}.png", told | shared)
        metadata = {"prompts": [p.prompt for p in pictures], "seeds": [p.seed for p in pictures], **shared}
        metadata |= {"images": paths} if paths else {}
        save_png(grid(images), out / "grid.png", metadata)
        print(f"{len(images)} pictures and grid.png in {out}")


def _given(config: Any) -> list[tuple[str, str | None]]:
    """Prompts, each with the path of the image that goes with it.

    Raises:
        ConfigError: there are none, or as many of one as cannot go with the other.
    """
    prompts, images = list(config.prompts), list(config.images)
    if config.prompts_file:
        prompts += [line.strip() for line in Path(config.prompts_file).read_text().splitlines() if line.strip()]
    if not prompts and not images:
        raise ConfigError("there is nothing to draw: give prompts=['a red circle'] or prompts_file=<a prompt a line>.")
    if not images:
        return [(prompt, None) for prompt in prompts]
    if len(prompts) > 1 and len(images) > 1 and len(prompts) != len(images):
        raise ConfigError(f"there are {len(prompts)} prompts and {len(images)} images: give as many, or one of either.")
    prompts, number = prompts or [""], max(len(prompts), len(images))
    return [(prompts[i % len(prompts)], images[i % len(images)]) for i in range(number)]


def _read_image(path: str, size: tuple[int, int]) -> Tensor:
    """A picture's middle, (3, *size) uint8, cut out as in training.

    Raises:
        ConfigError: there is no picture at the path.
    """
    try:
        decoded = decode_image(Path(path).read_bytes(), cover=size)
    except (OSError, DecodeError) as error:
        raise ConfigError(f"images: {path}: {error}.") from error
    image = torch.empty((3, *size), dtype=torch.uint8)
    frame(decoded.pixels, size, Framing(CENTER, CENTER, flip=False), image)
    return image
