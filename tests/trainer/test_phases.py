"""An objective of two phases, that knows nothing of diffusion, through the whole `train` job."""

from pathlib import Path

import pytest
import torch

from conf.errors import ConfigError
from models.initialization import initialize
from tests.trainer.jobs import train_on
from tests.trainer.toys import ADVERSARIAL, Adversarial, Discriminator, ValidatedAdversarial
from tools import cli
from tools.demo.scenes import write_tars
from trainer.checkpoint import load_weights
from trainer.objectives.base import DrawsPictures, Validates
from trainer.phases import build_by_phase

OBJECTIVE = [
    "~objective",
    "+objective._target_=tests.trainer.toys.ValidatedAdversarial",
    "networks.generator._target_=tests.trainer.toys.Generator",
    "networks.discriminator._target_=tests.trainer.toys.Discriminator",
    "buckets._target_=data.buckets.BucketList",
    "buckets.sizes=[[6,6]]",
    *("data.holdout=0.2", "validation.every=2", "validation.samples=10"),
]
BY_PHASE = [
    *("optimizer=by_phase", "+optimizer@optimizer.generator=adamw", "+optimizer@optimizer.discriminator=adamw"),
    *("schedule=by_phase", "+schedule@schedule.generator=constant", "+schedule@schedule.discriminator=constant"),
    *("schedule.generator.warmup=0", "schedule.discriminator.warmup=0"),
]
ADAMW = {"_target_": "trainer.engines.optimizer.AdamW"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("phases")
    write_tars(folder / "scenes", 60, seed=0)
    return folder


def train(world: int, folder: Path, name: str, *overrides: str) -> list[dict]:
    return train_on(
        world, folder, f"data.sources.scenes.shards={folder}/scenes", f"name={name}", *OBJECTIVE, *overrides
    )


@pytest.fixture(scope="module")
def alone(folder) -> list[dict]:
    return train(1, folder, "alone")


@pytest.mark.parametrize(("name", "layout"), [("fsdp", []), ("zero2", ["engine=deepspeed", "engine.stage=2"])])
def test_two_phases_train_and_validate_on_any_layout(folder, alone, name, layout):
    train(2, folder, name, *layout, "steps=2")
    rows = train(2, folder, name, *layout)  # resumed
    assert [row["step"] for row in rows] == [row["step"] for row in alone] == [1, 2, 3, 4]
    for ours, theirs in zip(rows, alone, strict=True):
        for key in ("loss", "grad_norm", "generator/loss", "generator/grad_norm", "val/loss", "val/squared"):
            assert (key in ours) == (key in theirs)
            if key in ours:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-3), (key, ours["step"])
    assert "val/squared" in rows[1] and "val/squared" in rows[3] and "val/squared" not in rows[0]


def test_each_phase_has_its_own_optimizer_and_schedule(folder, alone):
    own = ["schedule.discriminator.lr=0", "schedule.generator.lr=1e-3", "optimizer.generator.max_grad_norm=0.01"]
    rows = train(1, folder, "own", *BY_PHASE, *own)
    assert rows[-1]["lr"] == 0 and rows[-1]["generator/lr"] == 1e-3
    path = folder / "runs" / "own" / "checkpoints" / "step_00000004"
    start = initialize(Discriminator(), 0, "discriminator").state_dict()
    stayed = load_weights(path, "discriminator")
    assert stayed and all(torch.equal(weight, start[name]) for name, weight in stayed.items())
    assert rows[-1]["generator/loss"] != alone[-1]["generator/loss"]


def test_wrong_phases_are_refused_in_a_sentence():
    for given, says in (
        ({"generator": ADAMW, "critic": ADAMW}, "optimizer is given for generator, critic"),
        ({"generator": ADAMW}, "phases are discriminator, generator"),
        ({}, "no phase"),
        ({"generator": ADAMW, "discriminator": {"eps": 1.0}}, "optimizer.discriminator has no _target_"),
    ):
        with pytest.raises(ConfigError, match=says):
            build_by_phase(given, ADVERSARIAL, "optimizer")
    one, two = build_by_phase(ADAMW | {"eps": 0.5}, ADVERSARIAL, "optimizer").values()
    assert one.eps == two.eps == 0.5


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (["samples.every=1"], "draws no pictures of prompts: set samples.every=null"),
        (["objective._target_=tests.trainer.toys.Adversarial"], "Adversarial has no validation loss"),
        (["~networks.discriminator"], "networks.discriminator is missing"),
        (["networks.teacher._target_=tests.trainer.toys.Generator"], "networks.teacher is not used"),
        (["networks.denoiser._target_=tests.trainer.toys.Generator"], "networks.denoiser is described twice"),
        (["pass_size=1"], "pass_size=1: with its scope, 'slice'"),
    ],
)
def test_what_the_objective_cannot_do_is_told_before_the_start(folder, capsys, wrong, says):
    from tests.trainer.jobs import SMALL

    places = [f"runs={folder}/runs", f"data.cache_folder={folder}/cache", f"data.sources.scenes.shards={folder}/scenes"]
    assert cli.execute(["train", "name=wrong", *SMALL, *places, *OBJECTIVE, *wrong]) != 0
    assert says in capsys.readouterr().err
    assert not (folder / "runs" / "wrong" / "metrics.jsonl").exists()


def test_what_an_objective_can_do_is_told_by_its_methods():
    assert isinstance(ValidatedAdversarial(), Validates) and not isinstance(Adversarial(), Validates)
    assert not isinstance(ValidatedAdversarial(), DrawsPictures)
