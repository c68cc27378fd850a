"""Autoencoders through the whole `train` job: on any ranks and engine, resumed, and as another run's first stage."""

import json
from pathlib import Path

import diffusers
import pytest
import torch

from conf.compose import compose
from conf.schema import build
from data.run_directory import read_jsonl
from models.initialization import initialize
from tests.trainer.jobs import train_on
from tests.trainer.test_experiments import folder  # noqa: F401  (scenes)
from tools import cli
from trainer.checkpoint import load_weights

EXPERIMENT = {"kl": "ldm/autoencoder_kl_f8", "vq": "ldm/autoencoder_vq_f4"}
# A code that is another by a rounding changes all that follows, the more the larger the steps.
RATE = {"kl": 1e-3, "vq": 1e-4}
COMPARED = ("loss", "grad_norm", "discriminate/loss", "discriminate/grad_norm", "autoencode/adaptive_weight")
COMPARED += ("val/loss", "val/psnr", "val/ssim", "val/codebook_use", "val/perplexity")


def train(world: int, folder: Path, name: str, kind: str, *overrides: str) -> list[dict]:  # noqa: F811
    return train_on(
        world,
        folder,
        *(f"experiment={EXPERIMENT[kind]}", "scale=tiny", f"name={name}"),
        *(f"data.sources.scenes.shards={folder}/scenes", "data.holdout=0.2", "objective.adversarial_start=1"),
        *("validation.every=2", "validation.samples=10", "schedule.warmup=0", f"schedule.lr={RATE[kind]}"),
        *overrides,
    )


@pytest.fixture(scope="module")
def alone(folder) -> dict[str, list[dict]]:  # noqa: F811
    return {kind: train(1, folder, f"alone_{kind}", kind) for kind in EXPERIMENT}


@pytest.mark.parametrize(
    ("name", "kind", "layout"),
    [
        ("fsdp_kl", "kl", []),
        ("fsdp_vq", "vq", []),
        ("zero2_kl", "kl", ["engine=deepspeed", "engine.stage=2"]),
        ("zero3_vq", "vq", ["engine=deepspeed", "engine.stage=3"]),
    ],
)
def test_two_ranks_resumed_train_as_one(folder, alone, name, kind, layout):  # noqa: F811
    train(2, folder, name, kind, *layout, "steps=2")
    rows = train(2, folder, name, kind, *layout)
    assert len(rows) == len(alone[kind]) == 4
    compared = 0
    for ours, theirs in zip(rows, alone[kind], strict=True):
        for key in COMPARED:
            assert (key in ours) == (key in theirs), key
            if theirs.get(key) is not None:
                assert ours[key] == pytest.approx(theirs[key], rel=2e-3, abs=1e-6), (key, ours["step"])
                compared += 1
    assert compared >= 2 * 4 + 3 * 3 + 2 * 3
    assert rows[3]["val/psnr"] > rows[1]["val/psnr"] + 0.1
    assert rows[0]["discriminate/loss"] is None and rows[0]["skipped_steps"] == rows[-1]["skipped_steps"] == 0
    components = ["vae", "vae"] if kind == "kl" else ["vqvae", "vqvae"]
    configs = [
        json.loads((folder / "runs" / run / component / "config.json").read_text())
        for run, component in zip((name, f"alone_{kind}"), components, strict=True)
    ]
    assert configs[0].pop("scaling_factor") == pytest.approx(configs[1].pop("scaling_factor"), rel=1e-3)
    assert configs[0] == configs[1]


def test_resumed_is_bit_equal_to_uninterrupted(folder, alone):  # noqa: F811
    train(1, folder, "resumed", "kl", "steps=3", "checkpoint.every=3")
    rows = train(1, folder, "resumed", "kl")
    for ours, theirs in zip(rows, alone["kl"], strict=True):
        assert all(ours[key] == theirs[key] for key in COMPARED if key in ours and "val" not in key)
    file = "vae/diffusion_pytorch_model.safetensors"
    one, other = ((folder / "runs" / name / file).read_bytes() for name in ("resumed", "alone_kl"))
    assert one == other


def test_a_finished_run_is_another_runs_first_stage(folder, alone):  # noqa: F811
    run = folder / "runs" / "alone_kl"
    theirs = diffusers.AutoencoderKL.from_pretrained(run / "vae")
    weights = load_weights(run / "checkpoints" / "step_00000004", "autoencoder")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in theirs.state_dict().items())

    stage_of = ["scale=tiny", "first_stage=kl_f8", f"first_stage.folder={run}"]
    config = compose("train", stage_of)
    with torch.device("meta"):
        stage = build(config.first_stage)
    stage = initialize(stage.to_empty(device="cpu"), seed=0)
    assert stage.scaling_factor == theirs.config.scaling_factor
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    expected = theirs.encode(images).latent_dist.mean * theirs.config.scaling_factor
    assert torch.allclose(stage.encode(images), expected, atol=1e-5)

    source = f"data.sources.scenes.shards={folder}/scenes"
    rows = train_on(1, folder, "name=diffusion", *stage_of, source, "steps=2")
    assert rows[-1]["loss"] > 0
    other = train_on(1, folder, "name=random", "scale=tiny", "first_stage=kl_f8", source, "steps=2")
    assert rows[-1]["loss"] != other[-1]["loss"]


def test_vq_first_stages_too(folder, alone):  # noqa: F811
    stage_of = ["scale=tiny", "first_stage=vq_f4", f"first_stage.folder={folder}/runs/alone_vq"]
    rows = train_on(1, folder, "name=vq", *stage_of, f"data.sources.scenes.shards={folder}/scenes", "steps=2")
    assert rows[-1]["loss"] > 0


@pytest.mark.parametrize("kind", EXPERIMENT)
def test_a_finished_run_is_exported_and_its_reconstructions_are_measured(folder, alone, kind, tmp_path):  # noqa: F811
    run, cls = folder / "runs" / f"alone_{kind}", diffusers.AutoencoderKL if kind == "kl" else diffusers.VQModel
    own = run / ("vae" if kind == "kl" else "vqvae")
    assert cli.execute(["export", f"source={run}", f"out={tmp_path}/out"]) == 0
    ours, theirs = (cls.from_pretrained(path) for path in (tmp_path / "out", own))
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())
    assert ours.config.scaling_factor == theirs.config.scaling_factor

    command = ["evaluate", f"source={run}", "reconstructions=true", f"reference={folder}/scenes", f"runs={tmp_path}"]
    command += ["metric=[fid,psnr]", "features=random_stand_in", "features.num_features=4", "log.wandb=null"]
    assert cli.execute([*command, f"cache_folder={folder}/cache", "height=32", "width=32"]) == 0
    (row,) = json.loads((tmp_path / "evaluate" / "evaluation.json").read_text())
    assert row["rfid_random_stand_in"] > 0 and row["psnr"] > 1 and row["samples"] > 10


def test_prompts_are_refused_before_the_start(folder, capsys):  # noqa: F811
    arguments = ["train", "experiment=ldm/autoencoder_kl_f8", "scale=tiny", f"runs={folder}/runs", "name=prompts"]
    assert cli.execute([*arguments, f"data.sources.a.shards={folder}/scenes", "samples.prompts=[a circle]"]) != 0
    assert "Autoencoding draws no prompts" in capsys.readouterr().err
    assert not (folder / "runs" / "prompts" / "metrics.jsonl").exists()


def test_the_report_says_that_lpips_was_a_stand_in(folder, alone):  # noqa: F811
    page = (folder / "runs" / "alone_kl" / "report.html").read_text()
    assert "A stand-in: lpips: distances of a random VGG-16" in page
    rows = read_jsonl(folder / "runs" / "alone_kl" / "metrics.jsonl")
    assert "val/random_features" in rows[-1] and "val/lpips" not in rows[-1]
