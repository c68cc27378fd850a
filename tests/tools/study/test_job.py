"""Whole studies, whose runs are real `millrace train` processes of a few steps."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from pyarrow import parquet

from data.run_directory import read_jsonl, saved_step
from tests.trainer.jobs import SMALL
from tools import cli
from tools.demo.scenes import write_tars


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    write_tars(folder / "scenes", 60, seed=0)
    return folder


def arguments(folder: Path, name: str, *overrides: str) -> list[str]:
    """`millrace study grid_small`, two of its runs and those very small, on the folder's scenes."""
    data = [f"data.sources.scenes.shards={folder}/scenes", f"data.cache_folder={folder}/cache", "data.holdout=0.2"]
    small = [o for o in SMALL if not o.startswith(("model.num_attention_heads", "validation", "conditioner"))]
    validated = ["validation.every=2", "validation.samples=8", "checkpoint.every=2"]
    base = _list(["conditioner=none", *small, *data, *validated])
    return [
        *("study", "study=grid_small", f"study.name={name}", f"runs={folder}/runs", "study.prepare=null"),
        *(f"study.base={base}", "+study.leave_out=[{lr: [high]}]", *overrides),
    ]


def _list(overrides: list[str]) -> str:
    """A list of overrides, as Hydra has it on a command line."""
    return "[" + ",".join("'" + override.replace("'", "\\'") + "'" for override in overrides) + "]"


def test_a_mistake_in_any_run_is_told_before_one_starts(folder, capsys):
    assert cli.execute(arguments(folder, "mistaken", "study.axes.width.w64=['model.num_atention_heads=2']")) == 2
    sentence = capsys.readouterr().err
    assert "run w64_low_seed0" in sentence and "'model.num_atention_heads'" in sentence
    assert not (folder / "runs" / "mistaken").exists()


def test_what_it_would_cost_is_told_without_starting_anything(folder, capsys):
    assert cli.execute(arguments(folder, "dry", "dry_run=true", "flops_per_s=1e9")) == 0
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [line[0].strip("| ") for line in lines if len(line) > 5] == [
        *("run", "---", "w32_low_seed0", "w64_low_seed0", "total"),
    ]
    assert not (folder / "runs" / "dry").exists()


def test_runs_are_made_once_and_those_that_fail_are_listed_with_reasons(folder, capsys):
    gone = "study.axes.width.w64=['data.sources.scenes.shards=/nowhere']"
    assert cli.execute(arguments(folder, "pair", gone, "parallel=2", "study.seeds=[3]")) == 0
    out = capsys.readouterr().out
    study = folder / "runs" / "pair"
    table = parquet.read_table(study / "results.parquet").to_pylist()
    good, bad = table
    rows = read_jsonl(study / "w32_low_seed3" / "metrics.jsonl")
    assert (good["run"], good["state"], good["axis.width"], good["seed"]) == ("w32_low_seed3", "finished", "w32", 3)
    assert good["loss"] == rows[-1]["val/loss"] and (good["steps"], good["samples"]) == (4, 32)
    assert bad["state"].startswith("failed: exit status 1") and "/nowhere" in bad["state"]
    assert "1 of 2 runs are finished." in out and "w64_low_seed3: failed" in out
    assert "/nowhere" in (study / "report" / "report.md").read_text()
    assert r"\toprule" in (study / "report" / "tables" / "runs.tex").read_text()

    # Again: the finished run is not redone.
    before = (study / "w32_low_seed3" / "metrics.jsonl").stat().st_mtime_ns
    assert cli.execute(arguments(folder, "pair", gone, "study.seeds=[3]")) == 0
    assert "w32_low_seed3:" not in capsys.readouterr().out
    assert (study / "w32_low_seed3" / "metrics.jsonl").stat().st_mtime_ns == before

    # A study that has become another does not take the old runs for its own.
    assert cli.execute(arguments(folder, "pair", gone, "study.seeds=[3]", "overrides=steps=6 data.log_keys=true")) == 2
    assert "steps=4, but the study has 6 now" in capsys.readouterr().err


@pytest.mark.slow
def test_a_study_stopped_or_killed_in_mid_run_goes_on_where_it_was(folder):
    command = arguments(
        folder, "killed", "parallel=2", "overrides=steps=60 checkpoint.every=100000 validation.every=30"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    start = [sys.executable, "-P", "-m", "tools.cli", *command]
    runs = [folder / "runs" / "killed" / name for name in ("w32_low_seed0", "w64_low_seed0")]
    quiet: dict = {"env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}

    # Asked to stop, it ends when its runs have saved.
    study = psutil.Popen(start, **quiet)
    _wait(lambda: all((run / "metrics.jsonl").exists() for run in runs))
    study.send_signal(signal.SIGTERM)
    assert study.wait(600) == 130
    stopped = [saved_step(run) for run in runs]
    assert stopped == [_step(run) for run in runs] and max(stopped) < 40

    study = psutil.Popen(start, **quiet)
    _wait(lambda: all(_step(run) > step for run, step in zip(runs, stopped, strict=True)))
    children = study.children(recursive=True)
    trainers = [child for child in children if "train" in child.cmdline()]
    assert len(trainers) == 2

    # A run that is killed is started again within the study; when the study itself is killed, its runs save and leave.
    trainers[0].kill()
    _wait(lambda: len([c for c in study.children() if c.pid != trainers[0].pid and c.is_running()]) == 2)
    study.send_signal(signal.SIGKILL)
    study.wait()
    _, alive = psutil.wait_procs(children, timeout=600)
    assert not alive

    assert subprocess.run(start, env=environment, capture_output=True, text=True).returncode == 0
    for run in runs:
        assert [row["step"] for row in read_jsonl(run / "metrics.jsonl")] == list(range(1, 61))
    state = json.loads((folder / "runs" / "killed" / "analysis.json").read_text())["runs"]["verdicts"]
    assert state == ["2 of 2 runs are finished."]


def _step(run: Path) -> int:
    return read_jsonl(run / "metrics.jsonl")[-1]["step"]


def _wait(condition) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline, "it did not come about within ten minutes"
        time.sleep(0.1)
