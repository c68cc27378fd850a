"""Pictures drawn by several ranks, from sharded networks, against those of one."""

import zlib
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from models.autoencoder import AutoencoderKL
from models.densities import Uniform
from models.first_stage import KLFirstStage
from models.given import Given
from models.guidance import Guidance
from models.mmdit import MMDiT
from models.parameterizations import Velocity
from models.process import Process
from models.samplers import Euler
from models.schedules import RectifiedFlow
from models.weighting import Unweighted
from tests.trainer.ranks import ranks
from tests.trainer.toys import DENOISE, OPTIMIZER
from trainer.checkpoint.layout import box_views
from trainer.engines.base import EngineConfig
from trainer.engines.deepspeed import DeepSpeed
from trainer.engines.fsdp import FSDP
from trainer.sampling import Picture, draw, share_work

ENGINES: dict[str, EngineConfig] = {"fsdp": FSDP(precision="fp32"), "zero3": DeepSpeed(stage=3, precision="fp32")}


class Words(nn.Module):
    """Every prompt is a random sequence of its own."""

    encoders, concat_channels = 1, 0
    sizes = None

    def unconditional(self, n: int) -> Tensor:
        return torch.zeros(n, 1, dtype=torch.bool)

    def forward(self, given: Given, keep: Tensor | None = None) -> dict[str, Tensor]:
        keep = torch.ones(len(given), 1) if keep is None else keep
        seeds = [zlib.crc32(prompt.encode()) for prompt in given.captions]
        rows = torch.stack([torch.randn(3, 12, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        rows = rows * keep[:, :, None]
        return {"context": rows, "pooled": rows[:, 0, :10]}


def drawn(kind: str, pictures: list[Picture], batch: int) -> list[Tensor]:
    with torch.device("meta"):
        denoiser = MMDiT(
            sample_size=8,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=12,
            pooled_projection_dim=10,
            out_channels=4,
            pos_embed_max_size=8,
        )
        autoencoder = AutoencoderKL(block_out_channels=[8, 8], norm_num_groups=4, latent_channels=4)
        first_stage = KLFirstStage(autoencoder)
    networks = {"denoiser": denoiser, "conditioner": Words(), "first_stage": first_stage}
    engine = ENGINES[kind].build(networks, DENOISE, {"main": OPTIMIZER}, 7, torch.device("cpu"))
    for shard in engine.shards("weight"):
        # A fresh network predicts zero, whatever the prompt.
        whole = torch.randn(shard.shape, generator=torch.Generator().manual_seed(zlib.crc32(shard.name.encode())))
        for box, view in box_views(shard):
            view.copy_(0.2 * whole[tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))])
    engine.written()
    process = Process(RectifiedFlow(), Velocity(), Uniform(), Unweighted())
    return draw(engine.networks, process, Euler(3), Guidance(3.0), pictures, engine.device, batch)


def pictures_of(count: int, sizes: int) -> list[Picture]:
    return [Picture(f"picture {i}", 10 + i, 16, (16, 24)[i % sizes]) for i in range(count)]


@pytest.mark.parametrize("kind", ENGINES)
def test_ranks_together_draw_what_one_draws(kind):
    for count, sizes, batch in ((1, 1, 16), (5, 2, 16), (7, 2, 2)):
        pictures = pictures_of(count, sizes)
        (alone,) = ranks(1).run(drawn, kind, pictures, batch)
        assert [image.shape for image in alone] == [(3, p.height, p.width) for p in pictures]
        assert all(image.float().std() > 5 for image in alone), "a blank picture would agree with anything"
        for world in (2, 3):
            for images in ranks(world).run(drawn, kind, pictures, batch):
                for ours, theirs in zip(images, alone, strict=True):
                    assert (ours.int() - theirs.int()).abs().max() <= 1


def test_a_prompt_and_a_seed_make_the_picture():
    (first, other, seed) = ranks(1).run(
        drawn, "fsdp", [Picture("a", 1, 16, 16), Picture("b", 1, 16, 16), Picture("a", 2, 16, 16)], 16
    )[0]
    assert (first.int() - other.int()).abs().max() > 10 and (first.int() - seed.int()).abs().max() > 10


def passes_of(pictures: list[Picture], batch: int) -> tuple[list[list[Picture]], list[Tensor]]:
    """Those that were made, each of which was followed by a sign of life."""
    passes: list[list[Picture]] = []
    beats = []

    def draw_part(part: Sequence[Picture]) -> list[Tensor]:
        passes.append(list(part))
        return [torch.full((3, p.height, p.width), p.seed, dtype=torch.uint8) for p in part]

    images = share_work(draw_part, pictures, batch, lambda: beats.append(len(passes)))
    assert beats == list(range(1, len(passes) + 1))
    return passes, images


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize(("count", "batch"), [(1, 4), (2, 4), (9, 2), (10, 3)])
def test_every_rank_takes_as_many_passes_of_the_same_shapes(world, count, batch):
    pictures = pictures_of(count, 2)
    answers = ranks(world).run(passes_of, pictures, batch)
    shapes = [[[(p.height, p.width) for p in part] for part in passes] for passes, _ in answers]
    assert all(own == shapes[0] for own in shapes)
    assert all(len(set(part)) == 1 and len(part) <= batch for part in shapes[0])
    for _, images in answers:
        assert [int(image[0, 0, 0]) for image in images] == [p.seed for p in pictures]
