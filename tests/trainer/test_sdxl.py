"""SDXL's base and refiner at tiny scale: what they are told, at which times they learn, and on two ranks."""

from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch

from conf.compose import compose
from conf.schema import build, check
from data.run_directory import read_jsonl
from data.transforms import Framing, place
from models.given import Given
from models.unet import UNet
from tests.data.shard_files import write_shard
from tests.trainer.jobs import QUICK, train_on
from tools import cli
from tools.demo.scenes import draw, encode, scenes
from trainer.checkpoint import load_weights
from trainer.train import Config

STAGES = ("base_256", "base_512", "base_1024", "refiner")
SHAPES = ("[[16,16],[16,24],[24,16]]", {(64, 64): (16, 16), (56, 72): (16, 24), (72, 56): (24, 16)})
TINY = [
    *("scale=tiny", "rehearse=false", "log.wandb=null", "batch=4", "lanes=2", "schedule.warmup=0", "sampler.steps=2"),
    *("conditioner.steps=10", "checkpoint.every=2", "samples.count=2", "validation.samples=4"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Scenes with a score, of three shapes, and the text encoder of the first run."""
    folder = tmp_path_factory.mktemp("sdxl")
    rng = np.random.default_rng(0)
    samples = [
        {
            "__key__": f"{index:04d}",
            "png": encode(draw(scene, rng), "png"),
            "txt": scene.caption,
            "json": {"aesthetic": 4 + index % 3},
        }
        for index, scene in enumerate(scenes(80, 0, "train"))
    ]
    write_shard(folder / "tars" / "0.tar", samples)
    return folder


def places(folder: Path) -> list[str]:
    return [f"data.sources.drawn.shards={folder}/tars", f"conditioner.folder={folder}/text_encoder"]


class Calls:
    """What UNets are called with, all calls after another."""

    def __init__(self, monkeypatch) -> None:
        self.times: list[float] = []
        self.sizes: list[tuple[float, ...]] = []
        self.shapes: list[tuple[int, int]] = []
        forward = UNet.forward

        def watched(network, x, timestep, **conditions):
            self.times += timestep.tolist()
            self.sizes += [tuple(row) for row in conditions["size_ids"].tolist()]
            self.shapes += [tuple(x.shape[-2:])] * len(x)
            return forward(network, x, timestep, **conditions)

        monkeypatch.setattr(UNet, "forward", watched)


def run_here(folder: Path, name: str, *overrides: str) -> None:
    arguments = ["train", *TINY, *places(folder), f"runs={folder}/runs", f"name={name}", f"data.cache_folder={folder}"]
    assert cli.execute([*arguments, *overrides]) == 0


def test_the_base_is_told_sizes_and_crops_of_every_sample(folder, monkeypatch):
    calls = Calls(monkeypatch)
    run_here(
        folder, "told", "experiment=sdxl/base_256", "buckets=square", "buckets.size=16", "steps=8", "samples.every=null"
    )
    originals = {(row[0], row[1]) for row in calls.sizes}
    assert originals == set(SHAPES[1]) and {row[4:] for row in calls.sizes} == {(16, 16)}
    tops, lefts = ({row[i] for row in calls.sizes if row[0] > row[1]} for i in (2, 3))
    assert len(tops) > 1 and tops <= set(range(6)) and lefts == {0}, "of 16 x 16 from 72 x 56 pixels, 21 x 16 resized"
    assert {row[2] for row in calls.sizes if row[0] < row[1]} == {0}
    assert {row[2:4] for row in calls.sizes if row[0] == row[1]} == {(0, 0)}
    assert max(calls.times) > 800


def test_the_refiner_never_sees_more_than_a_fifth_of_the_times_and_is_told_scores(folder, monkeypatch):
    calls = Calls(monkeypatch)
    shapes = f"buckets.sizes={SHAPES[0]}"
    every = ["validation.every=4", "samples.every=4", "rehearse=true"]
    run_here(folder, "refined", "experiment=sdxl/refiner", shapes, "steps=8", *every)
    assert min(calls.times) > -1 and 150 < max(calls.times) <= 199 + 1e-3
    assert {4.0, 5.0, 6.0} <= {row[4] for row in calls.sizes}, "of the samples"
    assert 2.5 in {row[4] for row in calls.sizes}, "of unconditional predictions"
    assert {len(row) for row in calls.sizes} == {5}
    assert (folder / "runs/refined/samples/step_00000008.png").stat().st_size > 500


def test_the_refiner_learns_at_the_originals_integer_steps_too(folder, monkeypatch):
    calls = Calls(monkeypatch)
    alone = ["samples.every=null", "validation.every=null", "buckets=square", "buckets.size=16", "steps=8"]
    run_here(folder, "steps", "experiment=sdxl/refiner", "process/density=steps", *alone)
    times = torch.tensor(calls.times)
    assert (times - times.round()).abs().max() < 1e-3 and 0 <= times.min().round() < times.max().round() <= 199


def test_the_stages_chain(folder):
    last = None
    for stage in STAGES[:3]:
        buckets = [f"buckets.sizes={SHAPES[0]}"] if stage == "base_1024" else ["buckets=square", "buckets.size=16"]
        start = [f"init_from={folder}/runs/{last}/checkpoints/step_00000002"] if last else []
        name = f"chain_{stage}"
        run_here(folder, name, f"experiment=sdxl/{stage}", "steps=2", *buckets, *start)
        last = name


def test_the_stages_have_their_shapes_at_full_size():
    """The configurations as they are built, which scale=tiny has other buckets for."""
    found = {}
    for stage in STAGES:
        config = compose("train", [f"experiment=sdxl/{stage}", "data.sources.a.shards=/a", "first_stage.folder=/vae"])
        check(config, Config)
        shapes = build(config.buckets).shapes
        found[stage] = len(shapes), (shapes[0].height, shapes[0].width), config.steps, config.batch
        assert config.objective.offset_noise == (0.0 if stage in STAGES[:2] else 0.05)
    last = (40, (512, 2048), 100_000, 2048)
    assert found == {
        **{"base_256": (1, (256, 256), 600_000, 2048), "base_512": (1, (512, 512), 200_000, 2048)},
        **{"base_1024": last, "refiner": last},
    }


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
@pytest.mark.parametrize("stage", ["base_1024", "refiner"])
def test_two_ranks_resume_to_the_bit(folder, stage, engine):
    shared = [f"experiment=sdxl/{stage}", f"engine={engine}", *TINY, *places(folder), f"buckets.sizes={SHAPES[0]}"]
    shared += ["validation.every=4", "samples.every=4"]
    whole, name = f"{stage}_{engine}", f"{stage}_{engine}_twice"
    rows = train_on(2, folder, *shared, f"name={whole}", "steps=4", small=QUICK)
    train_on(2, folder, *shared, f"name={name}", "steps=2", small=QUICK)
    again = train_on(2, folder, *shared, f"name={name}", "steps=4", small=QUICK)
    assert [row["step"] for row in rows] == [1, 2, 3, 4] == [row["step"] for row in again]
    for one, other in zip(rows, again, strict=True):
        assert one["loss"] == other["loss"] > 0 and one["grad_norm"] == other["grad_norm"] > 0
    assert rows[-1]["val/loss"] == again[-1]["val/loss"] > 0
    runs = folder / "runs"
    ends = [load_weights(runs / run / "checkpoints/step_00000004", "denoiser") for run in (whole, name)]
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    sizes = {(scene.height, scene.width) for scene in _served(runs / whole)}
    assert sizes == set(SHAPES[1]), "slices of every bucket"
    assert (runs / whole / "samples/step_00000004.png").stat().st_size > 500


def _served(run: Path) -> list:
    drawn = list(scenes(80, 0, "train"))
    return [drawn[int(key)] for row in read_jsonl(run / "keys.jsonl") for key in row["keys"]]


CONFIGS = {"sdxl_base": 2816, "sdxl_refiner": 2560}


@pytest.mark.parametrize(("model", "channels"), CONFIGS.items())
def test_the_vector_is_what_diffusers_pipelines_make_of_the_same_sizes(model, channels):
    """The published widths of what is embedded, in a network that is else small."""
    config = compose("train", [f"model={model}", "data.sources.a.shards=/a"]).model
    small = {
        **{"block_out_channels": [32], "down_block_types": ["CrossAttnDownBlock2D"], "layers_per_block": 1},
        **{"up_block_types": ["CrossAttnUpBlock2D"], "cross_attention_dim": 8, "attention_head_dim": 2},
    }
    embedded = {key: config[key] for key in ("addition_embed_type", "addition_time_embed_dim")}
    ours = UNet(**small, **embedded, pooled_dim=config.pooled_dim, size_ids=config.size_ids)
    theirs = diffusers.UNet2DConditionModel(**small, **embedded, projection_class_embeddings_input_dim=channels)
    seen: dict[str, torch.Tensor] = {}
    for name, network in (("ours", ours), ("theirs", theirs)):
        network.add_embedding.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))

    sizes, target, shares = [(767, 512), (1024, 1536), (333, 480)], (1024, 1024), [(0.3, 0.0), (0.0, 0.9), (0.5, 0.5)]
    framings = [place(size, target, Framing(*share, flip=False)) for size, share in zip(sizes, shares, strict=True)]
    assert all(max(framing.crop) > 0 for framing in framings)
    scores = [5.5, 6.0, 2.5]
    refiner = model == "sdxl_refiner"
    sizing = build(compose("train", [f"conditioner={model.replace('_base', '')}"], missing="null").conditioner.sizes)
    given = Given(
        captions=[""] * 3,
        size=target,
        fields={"aesthetic_score": torch.tensor(scores)},
        original_size=torch.tensor([framing.original_size for framing in framings]),
        crop=torch.tensor([framing.crop for framing in framings]),
    )
    stub = SimpleNamespace(unet=theirs, config=SimpleNamespace(requires_aesthetics_score=refiner))
    if refiner:
        kind = diffusers.StableDiffusionXLImg2ImgPipeline
        rows = [
            kind._get_add_time_ids(
                stub, f.original_size, f.crop, target, score, 0.0, (0, 0), (0, 0), (0, 0), torch.float32, 1280
            )[0]
            for f, score in zip(framings, scores, strict=True)
        ]
    else:
        kind = diffusers.StableDiffusionXLPipeline
        rows = [kind._get_add_time_ids(stub, f.original_size, f.crop, target, torch.float32, 1280) for f in framings]

    x, t, context, pooled = torch.randn(3, 4, 8, 8), torch.rand(3) * 999, torch.randn(3, 5, 8), torch.randn(3, 1280)
    theirs(x, t, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": torch.cat(rows)})
    ours(x, t, context=context, pooled=pooled, size_ids=sizing(given))
    assert seen["theirs"].shape == (3, channels)
    torch.testing.assert_close(seen["ours"], seen["theirs"], rtol=1e-5, atol=1e-5)
