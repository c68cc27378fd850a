"""Steps without an update: skipped one by one, or rolled back and passed over, a run ends up the same."""

import shutil
from pathlib import Path

import pytest

from tests.trainer.jobs import train_on
from tools.demo.scenes import write_tars
from trainer.checkpoint import load_weights

STEPS = 14
BAD = [7, 8, 9]
RUN = [
    "objective._target_=tests.trainer.faulty.NotFiniteAt",
    f"+objective.steps={BAD}",
    f"steps={STEPS}",
    "checkpoint.every=4",
    "checkpoint.keep_last=null",
    "ema=constant",
    "ema.every=4",  # 8 is a step that is passed over
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("loop")
    write_tars(folder / "scenes", 120, seed=0, per_shard=60)
    return folder


def train(folder: Path, name: str, *overrides: str) -> list[dict]:
    return train_on(2, folder, f"name={name}", f"data.sources.scenes.shards={folder}/scenes", *RUN, *overrides)


@pytest.fixture(scope="module")
def one_by_one(folder) -> list[dict]:
    """Patience enough: each bad step is skipped as it comes."""
    return train(folder, "one_by_one", "patience=10")


@pytest.fixture(scope="module")
def passed_over(folder, one_by_one) -> list[dict]:
    """Rolled back from step 10 to 4, and the bad steps passed over."""
    return train(folder, "passed_over", "patience=3")


def curve(rows: list[dict]) -> list[tuple]:
    return [(row["step"], row.get("loss"), row.get("grad_norm"), row["skipped_steps"]) for row in rows]


def assert_same_end(folder: Path, one: str, other: str) -> None:
    paths = [folder / "runs" / name / "checkpoints" / f"step_{STEPS:08d}" for name in (one, other)]
    for ema in (None, "decay_9999"):
        ours, theirs = (load_weights(path, "denoiser", ema=ema) for path in paths)
        assert all(ours[name].equal(theirs[name]) for name in theirs), ema


def test_passing_over_is_the_same_as_skipping_one_by_one(folder, one_by_one, passed_over):
    good = [row for row in curve(one_by_one) if row[0] - 1 not in BAD]
    assert [row for row in curve(passed_over) if row[0] - 1 not in BAD] == good
    assert [row["skipped_steps"] for row in passed_over] == [0] * 7 + [1, 2, 3] + [3] * 4
    assert [row["step"] for row in passed_over if row["loss"] is None] == [step + 1 for step in BAD]
    assert_same_end(folder, "passed_over", "one_by_one")


def test_a_checkpoint_that_is_due_at_a_passed_over_step_is_there_and_resumes_the_same(folder, passed_over):
    run = folder / "runs" / "passed_over"
    shutil.copytree(run, folder / "runs" / "resumed")
    saved = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert saved == [f"step_{step:08d}" for step in (4, 8, 12, 14)]
    for step in (12, 14):
        shutil.rmtree(folder / "runs" / "resumed" / "checkpoints" / f"step_{step:08d}")
    assert curve(train(folder, "resumed", "patience=3")) == curve(passed_over)
    assert_same_end(folder, "resumed", "passed_over")
