"""The `sample` job: pictures of prompts, from a run or a diffusers pipeline."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from pydantic import PositiveInt
from torch import Tensor

from conf.errors import ConfigError
from conf.schema import build
from models.autoregressive import AutoregressiveTransformer
from models.code_sampler import CodeSampler
from models.conditions import MaskedPicture, PictureMap
from models.guidance import Guidance
from models.samplers import Course, Sampler
from trainer.distributed import Cluster, joined
from trainer.engines.networks import prepare_frozen
from trainer.loading import Loaded, load_model, merge_adapters
from trainer.sample_conditions import ConditionReader, asked_for, map_of, size_of
from trainer.sample_neighbours import NeighboursConfig
from trainer.sampling import (
    OwnGuidance,
    OwnSampler,
    Picture,
    acting,
    decode,
    draw_latents,
    draw_pass,
    grid,
    sampled_with,
    save_png,
    share_work,
)

# Of an image to change, where nothing is said.
_STRENGTH = 0.8


@dataclass
class Config:
    """conf/sample.yaml, whose comments explain the keys. A class stands for a `_target_` that builds such an object."""

    sampler: Sampler | CodeSampler | OwnSampler
    guidance: Guidance | OwnGuidance
    cluster: Cluster
    source: str
    prompts: list[str]
    prompts_file: str | None
    images: list[str]
    fields: dict[str, list[str | int | float]]
    neighbours: NeighboursConfig
    database: str | None
    original_size: list[int] | None
    crop: list[int]
    target_size: list[int] | None
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
    loaded = load_model(config.source, config.average)
    for folder in config.adapters:
        merge_adapters(folder, loaded, config.adapter_scale)
    refiner = load_model(config.refiner) if config.refiner is not None else None
    config = _as_condition(config, loaded)
    strength = _strength(config)
    asked = asked_for(config, loaded)
    size = size_of(config, loaded, asked)
    given = ConditionReader(config, loaded, size, refiner)
    start = given.image("image", config.image) if config.image is not None else None
    mask = given.mask("mask", config.mask) if config.mask is not None else None
    seeds = [config.seed + i for i in range(config.each)]
    told = [(given.completed(of, seed), seed) for of in asked for seed in seeds]
    pictures = [
        replace(given.picture(of, seed), negative=config.negative or None, start=start, mask=mask) for of, seed in told
    ]
    sampler = sampler_of(build(config.sampler), loaded)
    chosen = build(config.guidance)
    check_guidance(chosen, *([loaded] if refiner is None else [loaded, refiner]))
    guidance = guidance_of(chosen, loaded)
    refining = guidance_of(chosen, refiner) if refiner is not None else None
    if isinstance(sampler, CodeSampler) and (start is not None or refiner is not None):
        key = "image" if start is not None else "refiner"
        raise ConfigError(f"{key}: {loaded.source} draws pictures code after code, from the first; leave it out.")
    with joined(config.device) as world:
        for one in [loaded] + ([refiner] if refiner is not None else []):
            for name, network in one.networks.items():
                prepare_frozen(name, network, False, config.precision, one.seed, world.device)
        if refiner is not None:
            _check_first_stages(loaded, refiner)

        def draw_part(part: Sequence[Picture]) -> list[Tensor]:
            if isinstance(sampler, CodeSampler):
                return draw_pass(loaded.networks, loaded.process, sampler, guidance, part, world.device)
            stop = round(1 - config.refine_from, 9) if refiner is not None and config.refine_from is not None else 0.0
            course = Course(strength=strength, stop=stop)
            latents = draw_latents(loaded.networks, loaded.process, sampler, guidance, part, world.device, course)
            if refiner is None or refining is None:
                return decode(loaded.networks, latents)
            on = Course(noisy=latents, start=stop) if stop else Course(image=latents, strength=config.refine_strength)
            bare = [replace(picture, start=None, mask=None) for picture in part]
            refined = draw_latents(refiner.networks, refiner.process, sampler, refining, bare, world.device, on)
            return decode(refiner.networks, refined)

        images = share_work(draw_part, pictures, config.batch)
        if not world.is_main:
            return
        out = Path(config.out)
        shared: dict[str, Any] = {"source": loaded.source, "sampler": type(sampler).__name__}
        shared |= asdict(sampler) if isinstance(sampler, CodeSampler) else {"steps": sampler.steps}
        shared |= told_of(guidance)
        shared |= {f"refiner_{key}": scale for key, scale in told_of(refining).items()} if refining is not None else {}
        shared |= {"adapters": list(config.adapters)} if config.adapters else {}
        shared |= {key: config[key] for key in ("negative", "mask", "strength", "refiner") if config[key]}
        shared |= {"changed": config.image} if config.image else {}
        shared |= sampled_with(loaded.networks["conditioner"], told[0][0])
        for number, ((of, seed), image) in enumerate(zip(told, images, strict=True)):
            save_png(image, out / f"{number:05d}.png", {"prompt": "", **of, "seed": seed} | shared)
        metadata = {"prompts": [p.prompt for p in pictures], "seeds": [p.seed for p in pictures], **shared}
        metadata |= {f"{name}s": [of[name] for of, _ in told] for name in told[0][0] if name != "prompt"}
        save_png(grid(images), out / "grid.png", metadata)
        print(f"{len(images)} pictures and grid.png in {out}")


def sampler_of(chosen: Sampler | CodeSampler | OwnSampler, loaded: Loaded) -> Any:
    """The sampler that is chosen; or the model's own, with as many steps as are chosen.

    Raises:
        ConfigError: it is of codes and the model of latents, or the other way round.
    """
    of_codes = isinstance(loaded.networks["denoiser"], AutoregressiveTransformer)
    if isinstance(chosen, OwnSampler) and of_codes and chosen.steps is not None:
        raise ConfigError("sampler.steps: this model draws one code after the other; leave it out.")
    if not isinstance(chosen, OwnSampler):
        if isinstance(chosen, CodeSampler) != of_codes:
            raise ConfigError(f"sampler: {type(chosen).__name__} does not go with {loaded.source}; leave it out.")
        return chosen
    return build(loaded.config["sampler"] | ({"steps": chosen.steps} if chosen.steps is not None else {}))


def guidance_of(chosen: Guidance | OwnGuidance, loaded: Loaded) -> Guidance:
    """The guidance that is chosen, or the model's own with what is chosen in its place: what of it acts."""
    whole = chosen if isinstance(chosen, Guidance) else build(loaded.config["guidance"] | chosen.given)
    return acting(whole, loaded.networks["conditioner"])


def check_guidance(chosen: Guidance | OwnGuidance, *models: Loaded, key: str = "guidance.scale") -> None:
    """Refuse guidance that is asked for, and acts in none of the models.

    Args:
        key: that the scale was given by.

    Raises:
        ConfigError: names the key.
    """
    given = chosen.given if isinstance(chosen, OwnGuidance) else vars(chosen)
    able = [acting(Guidance(2.0, 2.0), one.networks["conditioner"]) for one in models]
    source = " or ".join(one.source for one in models)
    if given.get("scale", 1) != 1 and all(one.scale == 1 for one in able):
        raise ConfigError(f"{key}={given['scale']:g}: there is nothing that {source} could be guided to; leave it out.")
    if given.get("picture_scale", 1) != 1 and all(one.picture_scale == 1 for one in able):
        raise ConfigError(
            f"guidance.picture_scale={given['picture_scale']:g}: {source} reads no picture beside what it draws; leave"
            " it out."
        )


def told_of(guidance: Guidance) -> dict[str, float]:
    """Guidance as pictures' metadata tells it."""
    more = {"picture_scale": guidance.picture_scale} if guidance.picture_scale != 1 else {}
    return {"guidance": guidance.scale, **more}


def _check_first_stages(base: Loaded, refiner: Loaded) -> None:
    """Whether the refiner's latents are the base's, which its first stage decodes.

    Raises:
        ConfigError: they are of other channels, size, scale or shift.
    """
    for name, default in (("channels", None), ("downsampling", None), ("scaling_factor", 1.0), ("shift_factor", 0.0)):
        ours, theirs = (getattr(one.networks["first_stage"], name, default) for one in (base, refiner))
        if ours != theirs:
            raise ConfigError(
                f"refiner: {name} of its first stage is {theirs}, and {ours} in {base.source}, whose latents it is to"
                " go on with; give a refiner that shares the first stage."
            )


def _strength(config: Any) -> float | None:
    """The share of the steps to take with a picture to change."""
    if config.image is None:
        return None
    return _STRENGTH if config.strength is None and config.mask is None else config.strength


def _as_condition(config: Any, loaded: Loaded) -> Any:
    """The config with a picture to change, and the mask of what to draw anew, as what the network reads, if it reads
    any. Then it is no start, too, unless a strength is asked for, or a mask that the network does not read.

    Raises:
        ConfigError: there is no picture to change; an inpainting model lacks it, or the mask.
    """
    for key in ("strength", "mask"):
        if config.image is None and config[key] is not None:
            raise ConfigError(f"{key}: there is no picture to change; give image=<path>.")
    fields, images, mask = dict(config.fields), list(config.images), config.mask
    if (masked := map_of(loaded.networks["conditioner"], MaskedPicture)) is not None:
        if config.image is not None and config.mask is not None:
            images, fields[masked.field], mask = [config.image], [config.mask], None
        elif config.image is not None or not images or masked.field not in fields:
            raise ConfigError("image: this is an inpainting model: give image=a.png mask=m.png, white where it draws.")
    elif (edited := map_of(loaded.networks["conditioner"], PictureMap)) is None or edited.reads[0] in fields:
        return config
    elif config.image is None:
        raise ConfigError(f"image: the model reads a picture, {edited.reads[0]!r}: give image=a.png.")
    else:
        fields[edited.reads[0]] = [config.image]
    start = config.image if config.strength is not None or mask is not None else None
    return OmegaConf.create({**config, "fields": fields, "images": images, "image": start, "mask": mask})
