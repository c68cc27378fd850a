"""The `sample` job: pictures of prompts, from a run or a diffusers pipeline."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from models.lora import Adapter
from models.samplers import Course, Sampler
from trainer.distributed import Cluster, joined
from trainer.engines.networks import prepare_frozen
from trainer.loading import Loaded, load_model
from trainer.sampling import OwnSampler, Picture, decode, draw_latents, grid, save_png, share_work

# Of an image to change, where nothing is said.
_STRENGTH = 0.8


@dataclass
class Config:
    """conf/sample.yaml, whose comments explain the keys. A class stands for a `_target_` that builds such an object."""

    sampler: Sampler | OwnSampler
    guidance: Guidance
    cluster: Cluster
    source: str
    prompts: list[str]
    prompts_file: str | None
    images: list[str]
    adapters: list[str]
    adapter_scale: float
    negative: str
    image: str | None
    strength: float | None
    mask: str | None
    refiner: str | None
    refine_from: float | None
    refine_strength: float
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
    for folder in config.adapters:
        Adapter.load(folder).merge_into(loaded.networks["denoiser"], config.adapter_scale)
    refiner = load_model(config.refiner) if config.refiner is not None else None
    size = height, width = config.height or loaded.size[0], config.width or loaded.size[1]
    if config.images and not getattr(loaded.networks["conditioner"], "reads_images", False):
        raise ConfigError(f"images: no encoder of {loaded.source} reads pictures; leave them out.")
    seen = {path: _read_image("images", path, size) for _, path in given if path is not None}
    start = _read_image("image", config.image, size) if config.image is not None else None
    mask = _read_image("mask", config.mask, size).float().mean(0) >= 128 if config.mask is not None else None
    pictures = [
        Picture(
            prompt,
            config.seed + i,
            height,
            width,
            image=seen[path] if path is not None else None,
            negative=config.negative or None,
            start=start,
            mask=mask,
        )
        for prompt, path in given
        for i in range(config.each)
    ]
    sampler = sampler_of(build(config.sampler), loaded)
    guidance = build(config.guidance)
    with joined(config.device) as world:
        for one in [loaded] + ([refiner] if refiner is not None else []):
            for name, network in one.networks.items():
                prepare_frozen(name, network, False, config.precision, one.seed, world.device)

        def draw_part(part: Sequence[Picture]) -> list[Tensor]:
            stop = round(1 - config.refine_from, 9) if refiner is not None and config.refine_from is not None else 0.0
            course = Course(strength=_strength(config), stop=stop)
            latents = draw_latents(loaded.networks, loaded.process, sampler, guidance, part, world.device, course)
            if refiner is None:
                return decode(loaded.networks, latents)
            on = Course(noisy=latents, start=stop) if stop else Course(image=latents, strength=config.refine_strength)
            bare = [replace(picture, start=None, mask=None) for picture in part]
            refined = draw_latents(refiner.networks, refiner.process, sampler, guidance, bare, world.device, on)
            return decode(refiner.networks, refined)

        images = share_work(draw_part, pictures, config.batch)
        if not world.is_main:
            return
        out = Path(config.out)
        shared = {"source": loaded.source, "sampler": type(sampler).__name__, "steps": sampler.steps}
        shared["guidance"] = guidance.scale
        shared |= {"adapters": list(config.adapters)} if config.adapters else {}
        shared |= {key: config[key] for key in ("negative", "mask", "strength", "refiner") if config[key]}
        shared |= {"changed": config.image} if config.image else {}
        paths = [path for _, path in given for _ in range(config.each) if path is not None]
        for number, (picture, image) in enumerate(zip(pictures, images, strict=True)):
            told = {"prompt": picture.prompt, "seed": picture.seed, **({"image": paths[number]} if paths else {})}
            save_png(image, out / f"{number:05d}.png", told | shared)
        metadata = {"prompts": [p.prompt for p in pictures], "seeds": [p.seed for p in pictures], **shared}
        metadata |= {"images": paths} if paths else {}
        save_png(grid(images), out / "grid.png", metadata)
        print(f"{len(images)} pictures and grid.png in {out}")


def sampler_of(chosen: Sampler | OwnSampler, loaded: Loaded) -> Sampler:
    """The sampler that is chosen; or the model's own, with as many steps as are chosen."""
    if isinstance(chosen, Sampler):
        return chosen
    return build(loaded.config["sampler"] | ({"steps": chosen.steps} if chosen.steps is not None else {}))


def _strength(config: Any) -> float | None:
    """The share of the steps to take with a picture to change.

    Raises:
        ConfigError: there is none to change.
    """
    if config.image is None:
        for key in ("strength", "mask"):
            if config[key] is not None:
                raise ConfigError(f"{key}: there is no picture to change; give image=<path>.")
        return None
    return _STRENGTH if config.strength is None and config.mask is None else config.strength


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


def _read_image(key: str, path: str, size: tuple[int, int]) -> Tensor:
    """A picture's middle, (3, *size) uint8, cut out as in training.

    Raises:
        ConfigError: there is no picture at the path.
    """
    try:
        decoded = decode_image(Path(path).read_bytes(), cover=size)
    except (OSError, DecodeError) as error:
        raise ConfigError(f"{key}: {path}: {error}.") from error
    image = torch.empty((3, *size), dtype=torch.uint8)
    frame(decoded.pixels, size, Framing(CENTER, CENTER, flip=False), image)
    return image
