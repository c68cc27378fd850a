"""Pictures from networks, in lockstep over all ranks: for training's sample grids and for `millrace sample`."""

import json
import math
from collections.abc import Callable, Container, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from data.draws import Draws
from models.code_sampler import CodeSampler
from models.conditioner import Conditioner
from models.given import Given
from models.guidance import Guidance, denoiser
from models.process import Process
from models.samplers import Course, Sampler

# The "step" of draws that belong to pictures, and to no training step.
SAMPLING_STEP = -2


@dataclass(frozen=True)
class OwnSampler:
    """The sampler of what is sampled from, a run's or a pipeline's.

    Args:
        steps: in the place of its own number.
    """

    steps: PositiveInt | None = None


@dataclass(frozen=True)
class OwnGuidance:
    """The guidance of what is sampled from, a run's or a pipeline's.

    Args:
        scale, picture_scale, rescale, low, high: in the place of its own; see `Guidance`.
    """

    scale: float | None = None
    picture_scale: float | None = None
    rescale: float | None = None
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        Guidance(**self.given)

    @property
    def given(self) -> dict[str, float]:
        """What is not its own."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def acting(guidance: Guidance, conditioner: nn.Module) -> Guidance:
    """What of guidance changes predictions: without encoders nothing is left out of the unconditional one, without maps
    nothing more of the bare one."""
    guidance = copy(guidance)
    guidance.scale = guidance.scale if conditioner.encoders else 1.0
    guidance.picture_scale = guidance.picture_scale if conditioner.concat_channels else 1.0
    return guidance


@dataclass(frozen=True)
class Picture:
    """A picture to draw.

    Args:
        prompt: its caption.
        seed: of its noise; the same prompt, seed and size give the same picture in any company.
        height, width: in pixels.
        image: (3, H, W) uint8, what encoders of pictures see; their null embeddings stand for none.
        fields: what else the picture comes with, one sample's value each: a row of a tensor, or an item of a list.
        negative: caption that guidance leads away from, in the place of none.
        start: (3, H, W) uint8, the picture to change: it is drawn on from as much noise as the course begins with.
        mask: (H, W) bool, where `start` is to be drawn anew; None: everywhere.
        original_size, crop, target_size: that SDXL is told; `height` and `width`, (0, 0), `height` and `width`.
    """

    prompt: str
    seed: int
    height: int
    width: int
    image: Tensor | None = field(default=None, compare=False)
    fields: Mapping[str, Any] = field(default_factory=dict, compare=False)
    negative: str | None = None
    start: Tensor | None = field(default=None, compare=False)
    mask: Tensor | None = field(default=None, compare=False)
    original_size: tuple[int, int] | None = None
    crop: tuple[int, int] = (0, 0)
    target_size: tuple[int, int] | None = None

    @property
    def shapes(self) -> tuple:
        """Pictures with the same can be drawn in one pass."""
        return self.height, self.width, *(tuple(v.shape) for v in self.fields.values() if isinstance(v, Tensor))


def draw(
    networks: Mapping[str, nn.Module],
    process: Process,
    sampler: Sampler | CodeSampler,
    guidance: Guidance,
    pictures: Sequence[Picture],
    device: torch.device,
    batch: int = 16,
) -> list[Tensor]:
    """Draw pictures, the ranks sharing the work; see `share_work` and `draw_pass`."""
    return share_work(lambda part: draw_pass(networks, process, sampler, guidance, part, device), pictures, batch)


@torch.no_grad()
def share_work(
    draw_part: Callable[[Sequence[Picture]], Sequence[Tensor]],
    pictures: Sequence[Picture],
    batch: int = 16,
    alive: Callable[[], None] = lambda: None,
) -> list[Tensor]:
    """Draw pictures, the ranks sharing the work. Collective; every rank returns all, as uint8 (3, H, W) on the CPU.

    Ranks run the same number of passes of the same shape, as sharded networks require: a rank with less to do repeats.

    Args:
        draw_part: draws pictures of one size, in one pass.
        batch: pictures in one pass, at most.
        alive: called after each pass: all of them together may take long.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    drawn: dict[int, Tensor] = {}
    for shapes in dict.fromkeys(p.shapes for p in pictures):
        numbers = [i for i, p in enumerate(pictures) if p.shapes == shapes]
        share = math.ceil(len(numbers) / world)
        mine = numbers[rank * share : (rank + 1) * share]
        padded = mine + [numbers[0]] * (share - len(mine))
        for start in range(0, share, batch):
            part = padded[start : start + batch]
            images = draw_part([pictures[i] for i in part])
            drawn |= dict(zip(part, images, strict=True))
            alive()
    if world > 1:
        gathered: list[dict[int, Tensor]] = [{}] * world
        dist.all_gather_object(gathered, drawn)
        drawn = {number: image for part in gathered for number, image in part.items()}
    return [drawn[i] for i in range(len(pictures))]


def draw_pass(
    networks: Mapping[str, nn.Module],
    process: Process,
    sampler: Sampler | CodeSampler,
    guidance: Guidance,
    pictures: Sequence[Picture],
    device: torch.device,
) -> list[Tensor]:
    """Draw pictures of one size together, as uint8 (3, H, W) on the CPU; see `draw_latents` and `draw_codes`."""
    if isinstance(sampler, CodeSampler):
        return decode(networks, draw_codes(networks, sampler, guidance, pictures, device))
    return decode(networks, draw_latents(networks, process, sampler, guidance, pictures, device))


def decode(networks: Mapping[str, nn.Module], latents: Tensor) -> list[Tensor]:
    """Latents, or codes, to pictures, uint8 (3, H, W) on the CPU."""
    images = networks["first_stage"].decode(latents)  # type: ignore[operator]
    return list(((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu())


def draw_latents(
    networks: Mapping[str, nn.Module],
    process: Process,
    sampler: Sampler,
    guidance: Guidance,
    pictures: Sequence[Picture],
    device: torch.device,
    course: Course | None = None,
) -> Tensor:
    """Latents of pictures of one size.

    Args:
        networks: "denoiser", "conditioner" and "first_stage".
        pictures: of one size, and alike in what they come with.
        course: which steps to take, and from what. Pictures to change are put into it.
    """
    first_stage: Any = networks["first_stage"]
    conditioner: Any = networks["conditioner"]
    shape = first_stage.latent_shape(pictures[0].height, pictures[0].width)
    given = given_of(pictures, first_stage, conditioner, device)
    guidance = acting(guidance, conditioner)
    conditions = conditioner(given)
    null_conditions = _null_conditions(conditioner, given, pictures) if guidance.acts else None
    bare_conditions = conditioner(given, conditioner.bare(len(pictures))) if guidance.picture_scale != 1 else None
    seeds = [p.seed for p in pictures]

    def noise(purpose: str, step: int) -> Tensor:
        return SamplingDraws(seeds, step).normal(f"sampling/{purpose}", shape, device)

    course = _with_starts(course or Course(), pictures, first_stage, device)
    denoise = denoiser(networks["denoiser"], process, conditions, null_conditions, guidance, bare_conditions)
    return sampler.sample(denoise, process, noise, course)


def draw_codes(
    networks: Mapping[str, nn.Module],
    sampler: CodeSampler,
    guidance: Guidance,
    pictures: Sequence[Picture],
    device: torch.device,
) -> Tensor:
    """Codes of pictures of one size, (n, H/f, W/f); a picture's seed draws all of its own.

    Args:
        networks: "denoiser", an autoregressive one, "conditioner" and "first_stage", of codes.
        pictures: of one size, and alike in what they come with.
    """
    first_stage: Any = networks["first_stage"]
    conditioner: Any = networks["conditioner"]
    _, rows, columns = first_stage.latent_shape(pictures[0].height, pictures[0].width)
    given = given_of(pictures, first_stage, conditioner, device)
    guidance = acting(guidance, conditioner)
    null = _null_conditions(conditioner, given, pictures)["context"] if guidance.scale != 1 else None
    uniform = SamplingDraws([p.seed for p in pictures]).uniform("sampling/codes", (rows * columns,), device)
    context = conditioner(given).get("context")
    codes = sampler.sample(networks["denoiser"], uniform, context, null, guidance.scale)
    return codes.unflatten(1, (rows, columns))


def _null_conditions(conditioner: Any, given: Given, pictures: Sequence[Picture]) -> dict[str, Tensor]:
    """Conditions of the unconditional prediction: of negative prompts, or of none."""
    sizes = conditioner.sizes
    if sizes is not None and sizes.aesthetic is not None:
        ugly = torch.full((len(given),), sizes.negative_aesthetic)
        given = replace(given, fields={**given.fields, sizes.aesthetic: ugly})
    if all(p.negative is None for p in pictures):
        return conditioner(given, conditioner.unconditional(len(pictures)))
    return conditioner(replace(given, captions=[p.negative or "" for p in pictures]))


def _with_starts(course: Course, pictures: Sequence[Picture], first_stage: Any, device: torch.device) -> Course:
    """The course from the pictures that are to be changed."""
    starts = [p.start for p in pictures if p.start is not None]
    if not starts:
        return course
    assert len(starts) == len(pictures), "some pictures are to be changed, and some begin with noise"
    images = torch.stack(starts).to(device).float() / 127.5 - 1
    latents = first_stage.encode(images)
    if all(p.mask is None for p in pictures):
        return replace(course, image=latents)
    whole = torch.ones(images.shape[-2:], dtype=torch.bool)
    masks = torch.stack([whole if p.mask is None else p.mask for p in pictures])[:, None].to(device).float()
    return replace(course, image=latents, keep=F.interpolate(masks, size=latents.shape[-2:]) < 0.5)


@dataclass(frozen=True)
class SamplingDraws:
    """The randomness of pictures, each of a seed of its own (models.conditioner.Randomness)."""

    seeds: Sequence[int]
    step: int = 0

    def normal(self, purpose: str, shape: Sequence[int] = (), device: torch.device | str = "cpu") -> Tensor:
        """See `Draws.normal`."""
        return torch.cat([draws.normal(purpose, shape, device) for draws in self._each()])

    def uniform(self, purpose: str, shape: Sequence[int] = (), device: torch.device | str = "cpu") -> Tensor:
        """See `Draws.uniform`."""
        return torch.cat([draws.uniform(purpose, shape, device) for draws in self._each()])

    def _each(self) -> list[Draws]:
        return [Draws(seed, ((SAMPLING_STEP, 0, self.step),)) for seed in self.seeds]


def sampled_with(conditioner: nn.Module, given: Container[str]) -> dict[str, float]:
    """Numbers that stand for the fields which are not given; see `ConditionMap`."""
    maps = conditioner.map_list() if isinstance(conditioner, Conditioner) else []
    return {name: number for one in maps for name, number in one.sampled_with.items() if name not in given}


def given_of(
    pictures: Sequence[Picture], first_stage: nn.Module, conditioner: nn.Module, device: torch.device
) -> Given:
    """What pictures of one size come with, as a conditioner takes it, and numbers that it is sampled with."""
    images = [p.image for p in pictures if p.image is not None]
    assert len(images) in (0, len(pictures)), "some pictures have an image, and some have none"
    height, width = pictures[0].height, pictures[0].width
    fields = {name: _column([p.fields[name] for p in pictures], device) for name in pictures[0].fields}
    for name, number in sampled_with(conditioner, fields).items():
        fields[name] = torch.full((len(pictures),), number, device=device)

    def sizes(values: Sequence[tuple[int, int] | None]) -> Tensor:
        return torch.tensor([value or (height, width) for value in values], device=device)

    return Given(
        captions=[p.prompt for p in pictures],
        size=(height, width),
        images=torch.stack(images).to(device) if images else None,
        fields=fields,
        original_size=sizes([p.original_size for p in pictures]),
        crop=sizes([p.crop for p in pictures]),
        target_size=sizes([p.target_size for p in pictures]),
        first_stage=first_stage,  # type: ignore[arg-type]
        draws=SamplingDraws([p.seed for p in pictures]),
    )


def _column(values: list, device: torch.device) -> Tensor | list:
    return torch.stack(values).to(device) if isinstance(values[0], Tensor) else values


def grid(images: Sequence[Tensor], columns: int | None = None, gap: int = 2) -> Tensor:
    """A sheet (3, H, W) of pictures (3, h, w), which may differ in size; white between them."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    height, width = max(i.shape[1] for i in images), max(i.shape[2] for i in images)
    sheet = torch.full((3, rows * (height + gap) + gap, columns * (width + gap) + gap), 255, dtype=torch.uint8)
    for number, image in enumerate(images):
        top = gap + number // columns * (height + gap) + (height - image.shape[1]) // 2
        left = gap + number % columns * (width + gap) + (width - image.shape[2]) // 2
        sheet[:, top : top + image.shape[1], left : left + image.shape[2]] = image
    return sheet


def save_png(image: Tensor, path: Path, metadata: Mapping[str, object] | None = None, scale: int = 1) -> None:
    """Write a (3, H, W) uint8 picture; metadata becomes PNG text chunks, lists and mappings as JSON.

    Args:
        scale: enlarge so many times, without smoothing (sheets of tiny pictures).
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, value in (metadata or {}).items():
        info.add_itxt(name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    if scale > 1:
        picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, pnginfo=info)
