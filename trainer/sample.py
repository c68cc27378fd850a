"""The `sample` job: pictures of prompts, from a run or a diffusers pipeline."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveInt

from conf.errors import ConfigError
from conf.schema import build
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
    prompts = list(config.prompts)
    if config.prompts_file:
        prompts += [line.strip() for line in Path(config.prompts_file).read_text().splitlines() if line.strip()]
    if not prompts:
        raise ConfigError("there is nothing to draw: give prompts=['a red circle'] or prompts_file=<a prompt a line>.")
    loaded = load_model(config.source, config.average)
    height, width = config.height or loaded.size[0], config.width or loaded.size[1]
    pictures = [Picture(p, config.seed + i, height, width) for p in prompts for i in range(config.each)]
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
        for number, (picture, image) in enumerate(zip(pictures, images, strict=True)):
            save_png(image, out / f"{number:05d}.png", {"prompt": picture.prompt, "seed": picture.seed, **shared})
        metadata = {"prompts": [p.prompt for p in pictures], "seeds": [p.seed for p in pictures], **shared}
        save_png(grid(images), out / "grid.png", metadata)
        print(f"{len(images)} pictures and grid.png in {out}")
