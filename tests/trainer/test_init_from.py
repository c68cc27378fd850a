"""Weights from other runs and from diffusers folders, whole or in part, against diffusers' own classes."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from models.initialization import initialize
from models.mmdit import MMDiT
from tests.trainer.jobs import train_on
from tests.trainer.ranks import ranks
from tests.trainer.toys import DENOISE, OPTIMIZER, Denoiser, held, join, toy_networks
from tools.demo.scenes import write_tars
from trainer.checkpoint import CheckpointError, CheckpointPolicy, Record, load_weights
from trainer.ema import ConstantDecay, Ema
from trainer.engines.base import Engine
from trainer.engines.deepspeed import DeepSpeed
from trainer.engines.fsdp import FSDP
from trainer.init_from import InitFrom, Report, resize_positions
from trainer.resume import save_run

SMALL = {
    "sample_size": 8,
    "in_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 10,
    "out_channels": 4,
    "pos_embed_max_size": 6,
}
ENGINES = {"fsdp": FSDP(precision="fp32"), "zero3": DeepSpeed(precision="fp32", stage=3)}


def build(kind: str, network: torch.nn.Module) -> Engine:
    return ENGINES[kind].build({"denoiser": network}, DENOISE, {"main": OPTIMIZER}, 7, torch.device("cpu"))


def mmdit(**changes) -> MMDiT:
    with torch.device("meta"):
        return MMDiT(**{k: v for k, v in SMALL.items() if k != "caption_projection_dim"} | changes)


def init_mmdit(kind: str, path: Path, changes: dict) -> tuple[Report, dict]:
    engine = build(kind, mmdit(**changes))
    (report,) = InitFrom(str(path)).apply(engine)
    return report, held(engine)


def forward_mmdit(kind: str, path: Path, inputs: dict) -> torch.Tensor:
    engine = build(kind, mmdit())
    InitFrom(str(path)).apply(engine)
    with torch.no_grad():
        return engine.networks["denoiser"](**inputs)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """diffusers' class with random weights, and its saved folder."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    network = SD3Transformer2DModel(**SMALL, patch_size=2).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("pipeline") / "denoiser"
    network.save_pretrained(folder)
    return network, folder


@pytest.mark.parametrize("kind", ["fsdp", "zero3"])
def test_a_sharded_network_started_from_diffusers_computes_what_diffusers_computes(theirs, kind):
    network, folder = theirs
    generator = torch.Generator().manual_seed(1)
    x, context = torch.randn(2, 4, 8, 12, generator=generator), torch.randn(2, 5, 12, generator=generator)
    pooled, timestep = torch.randn(2, 10, generator=generator), torch.tensor([3.0, 900.0])
    with torch.no_grad():
        expected = network(x, context, pooled, timestep).sample
    inputs = {"x": x, "timestep": timestep, "context": context, "pooled": pooled}
    for source in (folder, folder.parent):  # the component, and the pipeline with a component of the network's name
        for output in ranks(2).run(forward_mmdit, kind, source, inputs):
            torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_a_whole_match_is_reported_as_complete(theirs):
    _, folder = theirs
    for report, _ in ranks(2).run(init_mmdit, "fsdp", folder, {}):
        assert report.complete and len(report.matched) == len(list(mmdit().parameters()))
        assert str(report) == f"denoiser from {folder}: {len(report.matched)} matched"


def test_what_does_not_fit_a_folder_is_listed_and_left_as_initialised(theirs):
    _, folder = theirs
    changes = {"num_layers": 3, "in_channels": 8, "position_scale": 2.0}
    answers = ranks(2).run(init_mmdit, "fsdp", folder, changes)
    report = answers[0][0]
    assert not report.complete
    # The last block's text stream has two modulations instead of six; here, another block is the last.
    assert report.mismatched == [
        "patch_embedding.weight: (16, 4, 2, 2) in the source, (16, 8, 2, 2) here",
        "blocks.1.text.modulation.weight: (32, 16) in the source, (96, 16) here",
        "blocks.1.text.modulation.bias: (32,) in the source, (96,) here",
    ]
    assert any(name.startswith("blocks.2.image.") for name in report.missing)
    assert report.fixed == ["positions.axis (pos_embed.pos_embed)"]
    text = str(report)
    assert "of another shape, left as initialised: patch_embedding.weight" in text and "missing in the source" in text

    loaded = join([parts for _, parts in answers], "weight")
    fresh = dict(initialize(mmdit(**changes).to_empty(device="cpu"), 7, "denoiser").named_parameters())
    for name in ["patch_embedding.weight", *report.missing]:
        assert torch.equal(loaded[f"denoiser.{name}"], fresh[name]), name
    assert not torch.equal(loaded["denoiser.final.weight"], fresh["final.weight"])


def test_learned_positions_are_resized(theirs):
    network, folder = theirs
    answers = ranks(2).run(init_mmdit, "fsdp", folder, {"learned_positions": True, "pos_embed_max_size": 9})
    report = answers[0][0]
    assert report.resized == ["positions.table: from (1, 36, 16) to (1, 81, 16)"]
    table = network.pos_embed.pos_embed.view(6, 6, 16).numpy()
    images = [Image.fromarray(table[..., channel]).resize((9, 9), Image.Resampling.BICUBIC) for channel in range(16)]
    expected = torch.from_numpy(np.stack(images, axis=-1)).view(1, 81, 16)
    loaded = join([parts for _, parts in answers], "weight")["denoiser.positions.table"]
    torch.testing.assert_close(loaded, expected, atol=1e-5, rtol=1e-5)


def test_resized_positions_of_a_plane_stay_a_plane():
    """Away from the border, where there is nothing to interpolate with."""
    side = torch.arange(12.0)
    table = (2 * side[:, None] - 3 * side[None, :]).reshape(1, 144, 1)
    centres = (torch.arange(24.0) + 0.5) / 2 - 0.5
    expected = 2 * centres[:, None] - 3 * centres[None, :]
    resized = resize_positions(table, 576).view(24, 24)
    torch.testing.assert_close(resized[4:-4, 4:-4], expected[4:-4, 4:-4], atol=1e-4, rtol=0)
    assert torch.equal(resize_positions(table, 144), table)


def save_toy(folder: Path) -> None:
    engine = build("fsdp", toy_networks(DENOISE)["denoiser"])
    for shard in engine.shards("weight"):
        shard.tensor.mul_(1.5)
    engine.written()
    ema = Ema({"decay_9": ConstantDecay(0.9)})
    ema.attach(engine)
    for shard in ema.shards():
        shard.tensor.mul_(2)
    save_run(CheckpointPolicy(asynchronous=False).build(folder), Record(step=5), engine, ema)


def init_toy(path: Path, ema: str | None, depth: int) -> tuple[Report, dict, dict[str, int]]:
    with torch.device("meta"):
        network = Denoiser(depth=depth)
    engine = build("zero3" if dist.get_world_size() == 2 else "fsdp", network)
    (report,) = InitFrom(str(path), ema).apply(engine)
    return report, held(engine), engine.steps_taken()


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("ema", [None, "decay_9"])
def test_weights_or_an_average_of_a_checkpoint_start_another_run(tmp_path, world, ema):
    ranks(2).run(save_toy, tmp_path)
    path = tmp_path / "step_00000005"
    answers = ranks(world).run(init_toy, path, ema, 3)
    report, _, steps = answers[0]
    assert report.complete and steps == {"main": 0}
    parts = [parts for _, parts, _ in answers]
    loaded = join(parts, "weight")
    for name, value in load_weights(path, "denoiser", ema).items():
        assert torch.equal(loaded[f"denoiser.{name}"], value)
    assert all(not moment.any() for moment in join(parts, "exp_avg").values())


def test_a_shallower_or_deeper_network_takes_what_it_can(tmp_path):
    ranks(2).run(save_toy, tmp_path)
    path = tmp_path / "step_00000005"
    report = ranks(1).run(init_toy, path, None, 2)[0][0]
    assert report.unexpected and all(name.startswith("blocks.2.") for name in report.unexpected) and not report.missing
    report = ranks(1).run(init_toy, path, None, 4)[0][0]
    assert report.missing and all(name.startswith("blocks.3.") for name in report.missing) and not report.unexpected


def refusals(checkpoint: Path, component: Path) -> list[str]:
    engine = build("fsdp", toy_networks(DENOISE)["denoiser"])
    messages = []
    for source in (
        InitFrom(str(checkpoint.parent / "nowhere")),
        InitFrom(str(checkpoint), networks={"denoiser": "unet"}),
        InitFrom(str(checkpoint), networks={"unet": "denoiser"}),
        InitFrom(str(checkpoint), ema="0.5"),
        InitFrom(str(component)),
        InitFrom(str(component), ema="decay_9"),
    ):
        try:
            source.apply(engine)
            messages.append("")
        except (ValueError, CheckpointError) as error:
            messages.append(str(error))
    return messages


def test_sources_that_cannot_be_are_refused(tmp_path, theirs):
    ranks(2).run(save_toy, tmp_path)
    (messages,) = ranks(1).run(refusals, tmp_path / "step_00000005", theirs[1])
    expected = [
        "neither a checkpoint",
        "fits nothing of denoiser",
        "trainable are denoiser",
        "fits nothing",
        "counterpart",
        "averages",
    ]
    assert all(part in message for part, message in zip(expected, messages, strict=True)), messages


@pytest.mark.parametrize(
    "positions", [["++model.learned_positions=true"], ["++model.position_scale=2.0"]], ids=["learned", "fixed"]
)
def test_a_run_that_starts_from_another_resumes_bit_for_bit_without_it(tmp_path, positions):
    """Resized positions included: what `init_from` changes is in checkpoints, and what is not follows from the config.
    The source is gone when the run resumes."""
    write_tars(tmp_path / "scenes", 40, seed=0)
    common = [f"data.sources.scenes.shards={tmp_path}/scenes", "schedule.warmup=0", "schedule.lr=1e-2"]
    common += ["data.holdout=0.2", "validation.every=4"]
    train_on(1, tmp_path, "name=source", *common, "++model.learned_positions=true", "steps=2")
    source = tmp_path / "runs" / "source" / "checkpoints" / "step_00000002"
    starting = [*common, *positions, f"init_from={source}", "model.pos_embed_max_size=12"]
    straight = train_on(2, tmp_path, "name=straight", *starting)
    train_on(2, tmp_path, "name=stopped", *starting, "steps=2")
    shutil.rmtree(tmp_path / "runs" / "source")
    resumed = train_on(2, tmp_path, "name=stopped", *starting)
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in resumed] == [row[key] for row in straight]
    assert resumed[-1]["val/loss"] == straight[-1]["val/loss"]
    ours, theirs = (
        load_weights(tmp_path / "runs" / name / "checkpoints" / "step_00000004", "denoiser")
        for name in ("stopped", "straight")
    )
    assert ("positions.table" in ours) == (positions == ["++model.learned_positions=true"])
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
