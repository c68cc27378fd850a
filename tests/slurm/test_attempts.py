"""What becomes of a job whose time is up, before a SLURM that warns it at once, without a cluster."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from slurm.attempt import GivenUpError, attempt
from slurm.chain import Chain
from slurm.resources import Resources
from slurm.work import Progress, Work

ROOT = Path(__file__).parents[2]


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """SLURM's commands: `srun` is told that time is up, and its ranks leave."""
    scripts = {
        "srun": "kill -USR1 $PPID; sleep 0.5",
        "squeue": "echo '7|RUNNING|None|node1|0:20'",
        "scontrol": "case $1 in show) echo node1;; *) true;; esac",
        "sinfo": "echo 'node1 idle'",
    }
    for name, line in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name, value in {"JOB_ID": "7", "JOB_NODELIST": "node1", "JOB_PARTITION": "main"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    earlier = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    yield
    for number, handler in earlier.items():
        signal.signal(number, handler)


def started(folder: Path, progress: Callable[[], Progress] | None) -> list[str]:
    """One start of a job; the words for how all of them so far ended."""
    told = OmegaConf.load(ROOT / "conf" / "cluster" / "slurm.yaml")
    resources = Resources(**OmegaConf.to_container(told) | {"health": False, "gpus_per_node": 0, "attempts": 3})
    chain = Chain(folder / "chain.jsonl")
    attempt(Work("job", [["-c", ""]], folder / "logs", chain, resources, [1], progress))
    return [row["outcome"] for row in chain.rows() if row["event"] == "ended"]


def test_a_job_whose_time_is_up_again_and_again_goes_on_as_long_as_it_comes_further(slurm, tmp_path):
    done = iter(range(1000))
    for start in range(1, 6):
        assert started(tmp_path, lambda: Progress(next(done), None)) == ["time limit"] * start
    assert [row["event"] for row in Chain(tmp_path / "chain.jsonl").rows()] == ["started", "ended", "requeued"] * 5


def test_a_job_whose_time_is_up_before_it_comes_any_further_is_given_up(slurm, tmp_path):
    for _ in range(2):
        started(tmp_path, lambda: Progress(40, None))
    with pytest.raises(GivenUpError, match="3 starts made no progress beyond 40; the last: time limit"):
        started(tmp_path, lambda: Progress(40, None))
