"""`millrace train` as users run it: one run on any ranks, engine and workers; killed and resumed; never a pickle."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.run_directory import read_jsonl
from tools.demo.scenes import write_tars
from trainer.checkpoint import load_weights

STEPS = 20
COMMON = [
    "scale=tiny",
    "data.holdout=0.1",
    "data.log_keys=true",
    "log.wandb=null",
    f"steps={STEPS}",
    "samples.every=null",
    "model.qk_norm=rms_norm",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Scenes, and a text encoder trained once for all runs."""
    folder = tmp_path_factory.mktemp("train")
    write_tars(folder / "scenes", 240, seed=0, per_shard=90)
    return folder


def command(folder: Path, name: str, *overrides: str) -> list[str]:
    return [
        *(sys.executable, "-P", "-m", "tools.cli", "train", *COMMON),
        f"name={name}",
        f"runs={folder}/runs",
        f"data.sources.scenes.shards={folder}/scenes",
        f"data.cache_folder={folder}/cache",
        f"conditioner.folder={folder}/text_encoder",
        *overrides,
    ]


def start(folder: Path, name: str, *overrides: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(
        command(folder, name, *overrides),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )


def train(folder: Path, name: str, *overrides: str) -> list[dict]:
    """Run to the end; the rows of metrics.jsonl."""
    process = start(folder, name, *overrides)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output[-4000:]
    return read_jsonl(folder / "runs" / name / "metrics.jsonl")


@pytest.fixture(scope="module")
def reference(folder) -> list[dict]:
    """One process, FSDP, no workers."""
    return train(folder, "reference")


def assert_same_curve(rows: list[dict], reference: list[dict]) -> None:
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for ours, theirs in zip(rows, reference, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4), f"step {ours['step']}"
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3), f"step {ours['step']}"
    last, wanted = rows[-1], reference[-1]
    assert last["val/loss"] == pytest.approx(wanted["val/loss"], rel=1e-4)


def keys(folder: Path, name: str) -> list[tuple]:
    rows = read_jsonl(folder / "runs" / name / "keys.jsonl")
    return [(row["step"], row["lane"], tuple(row["keys"])) for row in rows]


def weights_equal(folder: Path, one: str, two: str) -> bool:
    paths = [folder / "runs" / name / "checkpoints" / f"step_{STEPS:08d}" for name in (one, two)]
    for ema in (None, "decay_9999"):
        ours, theirs = (load_weights(path, "denoiser", ema=ema) for path in paths)
        assert ours.keys() == theirs.keys()
        if not all(ours[name].equal(theirs[name]) for name in ours):
            return False
    return True


def test_a_run_shows_what_it_did(folder, reference):
    run = folder / "runs" / "reference"
    assert {"config.yaml", "metrics.jsonl", "keys.jsonl", "checkpoints", "report.html"} <= {
        p.name for p in run.iterdir()
    }
    row = reference[-1]
    for key in ("loss", "grad_norm", "lr", "samples", "samples_per_s", "data_wait", "peak_memory_bytes", "val/loss"):
        assert isinstance(row[key], int | float), key
    assert row["samples"] == STEPS * 8
    assert sum(row.get(f"val/loss_by_t/{i}", 0) for i in range(8)) / 8 == pytest.approx(row["val/loss"])
    assert len(keys(folder, "reference")) == STEPS * 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["cluster.processes=2", "data.workers=2"],
        ["cluster.processes=4"],
        ["cluster.processes=4", "engine=hsdp"],
        ["pass_size=1"],
        ["cluster.processes=2", "engine=deepspeed", "engine.stage=1", "data.workers=2"],
        ["cluster.processes=4", "engine=deepspeed", "engine.stage=2"],
        ["cluster.processes=2", "engine=deepspeed", "engine.stage=3"],
    ],
    ids=" ".join,
)
def test_the_same_run_on_any_layout_has_the_same_losses(folder, reference, overrides):
    name = "_".join(overrides).replace("=", "-")
    assert_same_curve(train(folder, name, *overrides), reference)
    assert keys(folder, name) == keys(folder, "reference")


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_is_bit_equal(folder):
    layout = ["cluster.processes=2", "checkpoint.every=3", "data.workers=1"]
    train(folder, "undisturbed", *layout)
    rng = random.Random(0)
    kills = 0
    for _ in range(4):
        process = start(folder, "killed", *layout)
        metrics = folder / "runs" / "killed" / "metrics.jsonl"
        lines = metrics.read_text().count("\n") if metrics.exists() else 0
        deadline = time.monotonic() + 120
        # Let it take a few steps beyond where it was, then kill every process of the run at once.
        goal = lines + rng.randint(1, 6)
        while process.poll() is None and time.monotonic() < deadline:
            if (
                metrics.exists()
                and metrics.read_text().count("\n") != lines
                and (metrics.read_text().count("\n") >= goal)
            ):
                break
            time.sleep(0.02)
        if process.poll() is not None:
            break
        time.sleep(rng.random() * 0.3)
        os.killpg(process.pid, signal.SIGKILL)
        _kill_ranks("name=killed")
        process.wait()
        kills += 1
    rows = train(folder, "killed", *layout)
    assert kills >= 2
    undisturbed = read_jsonl(folder / "runs" / "undisturbed" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["loss"] for row in rows] == [row["loss"] for row in undisturbed]
    assert rows[-1]["val/loss"] == undisturbed[-1]["val/loss"]
    assert keys(folder, "killed") == keys(folder, "undisturbed")
    assert weights_equal(folder, "killed", "undisturbed")


def _kill_ranks(marker: str) -> None:
    """Ranks have sessions of their own under torch's launcher: kill -9 whatever runs with that argument."""
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and marker in (entry / "cmdline").read_text().split("\0"):
                os.kill(int(entry.name), signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue


@pytest.mark.slow
def test_resumes_on_another_world_size_and_the_other_engine(folder, reference):
    stops = [
        ("8", ["cluster.processes=2"]),
        ("14", ["cluster.processes=4", "engine=deepspeed", "engine.stage=3"]),
        ("17", ["cluster.processes=2", "engine=deepspeed", "engine.stage=1"]),
        (str(STEPS), []),
    ]
    for steps, layout in stops:
        rows = train(folder, "wandering", *layout, f"steps={steps}")
    assert_same_curve(rows, reference)
    assert keys(folder, "wandering") == keys(folder, "reference")
    paths = [folder / "runs" / n / "checkpoints" / f"step_{STEPS:08d}" for n in ("wandering", "reference")]
    for ema in (None, "decay_9999"):
        ours, theirs = (load_weights(path, "denoiser", ema=ema) for path in paths)
        for name, weight in theirs.items():
            assert (ours[name] - weight).abs().max() <= 2e-4 * max(1.0, float(weight.abs().max())), (ema, name)


def test_sigterm_saves_and_a_changed_plan_refuses_to_resume(folder):
    process = start(folder, "stopped", "steps=4000", "checkpoint.every=100000")
    metrics = folder / "runs" / "stopped" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output
    taken = read_jsonl(metrics)[-1]["step"]
    saved = sorted((folder / "runs" / "stopped" / "checkpoints").glob("step_*"))
    assert int(saved[-1].name.removeprefix("step_")) >= taken
    refused = start(folder, "stopped", "steps=4000", "lanes=2")
    output, _ = refused.communicate(timeout=200)
    assert refused.returncode != 0
    assert "data.replan=true" in output and "lanes: 4 -> 2" in output
    assert train(folder, "stopped", f"steps={taken + 5}", "lanes=2", "data.replan=true")[-1]["step"] == taken + 5


def test_no_secret_reaches_the_config_or_the_log(folder):
    options = "{s3: {key: hunter2, secret: hunter2, client_kwargs: {headers: {Authorization: Bearer hunter2}}}}"
    train(folder, "secret", "steps=1", f"data.storage_options={options}", "validation.every=null")
    for path in (folder / "runs" / "secret").rglob("*"):
        if path.is_file():
            assert b"hunter2" not in path.read_bytes(), path


def test_the_dry_run_writes_a_contact_sheet_and_stops(folder):
    process = start(folder, "dry", "dry_run=true")
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output
    assert (folder / "runs" / "dry" / "contact_sheet.png").stat().st_size > 1000
    assert not (folder / "runs" / "dry" / "checkpoints").exists()


def not_finite_at(*steps: int) -> list[str]:
    return [
        "objective._target_=tests.trainer.faulty.NotFiniteAt",
        f"+objective.steps=[{','.join(map(str, steps))}]",
        "cluster.processes=2",
    ]


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_skipped_and_counted_by_all_ranks(folder, reference):
    rows = train(folder, "one_bad", *not_finite_at(3), "patience=2", "steps=6")
    assert [row["skipped_steps"] for row in rows] == [0, 0, 0, 1, 1, 1]
    assert [row["loss"] for row in rows[:3]] == pytest.approx([row["loss"] for row in reference[:3]], rel=1e-4)
    assert all(row["loss"] == row["loss"] for row in rows[4:])


@pytest.mark.slow
def test_a_run_of_bad_steps_rolls_back_and_passes_over_them(folder):
    rows = train(folder, "rolled_back", *not_finite_at(7, 8, 9), "patience=3", "steps=14", "checkpoint.every=5")
    # Passed over, a step is one without losses and an update; what happens between steps happens all the same.
    assert [row["step"] for row in rows] == list(range(1, 15))
    assert [row["step"] for row in rows if row["loss"] is None] == [8, 9, 10]
    assert [row["skipped_steps"] for row in rows] == [0] * 7 + [1, 2, 3, 3, 3, 3, 3]
    record = json.loads((folder / "runs/rolled_back/checkpoints/step_00000014/checkpoint.json").read_text())
    assert record["skipped_steps"] == [7, 8, 9]
    # Resumed from there, they stay skipped.
    assert train(folder, "rolled_back", *not_finite_at(7, 8, 9), "steps=16")[-1]["step"] == 16
    # A checkpoint that falls among them is not taken.
    assert (
        train(folder, "amid", *not_finite_at(3, 4, 5), "patience=3", "steps=8", "checkpoint.every=1")[-1]["step"] == 8
    )
    assert [step for step, lane, _ in keys(folder, "rolled_back") if lane == 0] == [*range(7), *range(10, 16)]


def test_without_a_checkpoint_to_go_back_to_it_says_so(folder):
    process = start(folder, "hopeless", *not_finite_at(0, 1, 2), "patience=3")
    output, _ = process.communicate(timeout=200)
    assert process.returncode != 0
    assert "3 steps in a row (0 to 2) had no finite gradient" in output
