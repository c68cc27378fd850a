"""Pictures from networks, in lockstep over all ranks: for training's sample grids and for `millrace sample`."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.draws import Draws
from models.guidance import Guidance, denoiser
from models.process import Process
from models.samplers import Sampler

# The "step" of draws that belong to pictures, and to no training step.
SAMPLING_STEP = -2


@dataclass(frozen=True)
class Picture:
    """A picture to draw.

    Args:
        prompt: its caption.
        seed: of its noise; the same prompt, seed and size give the same picture in any company.
        height, width: in pixels.
        image: (3, H, W) uint8, what encoders of pictures see; their null embeddings stand for none.
    """

    prompt: str
    seed: int
    height: int
    width: int
    image: Tensor | None = field(default=None, compare=False)


def draw(
    networks: Mapping[str, nn.Module],
    process: Process,
    sampler: Sampler,
    guidance: Guidance,
    pictures: Sequence[Picture],
    device: torch.device,
    batch: int = 16,
) -> list[Tensor]:
    """Draw pictures by diffusion, the ranks sharing the work; see `share_work` and `draw_pass`."""
    return share_work(lambda part: draw_pass(networks, process, sampler, guidance, part, device), pictures, batch)


@torch.no_grad()
def share_work(
    draw_part: Callable[[Sequence[Picture]], Sequence[Tensor]], pictures: Sequence[Picture], batch: int = 16
) -> list[Tensor]:
    """Draw pictures, the ranks sharing the work. Collective; every rank returns all, as uint8 (3, H, W) on the CPU.

    Ranks run the same number of passes of the same shape, as sharded networks require: a rank with less to do repeats.

    Args:
        draw_part: draws pictures of one size, in one pass.
        batch: pictures in one pass, at most.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    drawn: dict[int, Tensor] = {}
    for size in dict.fromkeys((p.height, p.width) for p in pictures):
        numbers = [i for i, p in enumerate(pictures) if (p.height, p.width) == size]
        share = math.ceil(len(numbers) / world)
        mine = numbers[rank * share : (rank + 1) * share]
        padded = mine + [numbers[0]] * (share - len(mine))
        for start in range(0, share, batch):
            part = padded[start : start + batch]
            images = draw_part([pictures[i] for i in part])
            drawn |= dict(zip(part, images, strict=True))
    if world > 1:
        gathered: list[dict[int, Tensor]] = [{}] * world
        dist.all_gather_object(gathered, drawn)
        drawn = {number: image for part in gathered for number, image in part.items()}
    return [drawn[i] for i in range(len(pictures))]


def draw_pass(
    networks: Mapping[str, nn.Module],
    process: Process,
    sampler: Sampler,
    guidance: Guidance,
    pictures: Sequence[Picture],
    device: torch.device,
) -> list[Tensor]:
    """Draw pictures of one size together, by diffusion, as uint8 (3, H, W) on the CPU.

    Args:
        networks: "denoiser", "conditioner" and "first_stage".
        pictures: all with an image, of one size, or all without.
    """
    first_stage, conditioner = networks["first_stage"], networks["conditioner"]
    shape = first_stage.latent_shape(pictures[0].height, pictures[0].width)  # type: ignore[operator]
    prompts = [p.prompt for p in pictures]
    encoders: int = conditioner.encoders  # type: ignore[assignment]
    keep = torch.ones(len(prompts), encoders, dtype=torch.bool)
    given = [p.image for p in pictures if p.image is not None]
    assert len(given) in (0, len(pictures)), "some pictures have an image, and some have none"
    images = torch.stack(given).to(device) if given else None
    conditions = conditioner(prompts, keep, images=images)
    null_conditions = conditioner(prompts, ~keep, images=images) if guidance.scale != 1 else None
    denoise = denoiser(networks["denoiser"], process, conditions, null_conditions, guidance)

    def noise(purpose: str, step: int) -> Tensor:
        rows = [
            Draws(p.seed, ((SAMPLING_STEP, 0, step),)).normal(f"sampling/{purpose}", shape, device) for p in pictures
        ]
        return torch.cat(rows)

    latents = sampler.sample(denoise, process, noise).float()
    images = first_stage.decode(latents)  # type: ignore[operator]
    return list(((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu())


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
