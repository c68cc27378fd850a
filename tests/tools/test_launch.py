"""A run of two ranks is stopped through its launcher: by signals, by Ctrl-C, by kill -9; nothing lost, nobody left."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from data.run_directory import read_jsonl
from tests.trainer.jobs import SMALL
from tools.demo.scenes import write_tars

STEPS = 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    write_tars(folder / "scenes", 120, seed=0, per_shard=60)
    return folder


def command(folder: Path, name: str, *overrides: str) -> list[str]:
    return [
        *(sys.executable, "-P", "-m", "tools.cli", "train", *SMALL, f"name={name}", f"runs={folder}/runs"),
        *(f"data.sources.scenes.shards={folder}/scenes", f"data.cache_folder={folder}/cache", "data.workers=1"),
        *("cluster.processes=2", f"steps={STEPS}", "checkpoint.every=100000", *overrides),
    ]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}


class Launched:
    """A launcher that runs; what it started is killed at the end."""

    def __init__(self, folder: Path, name: str, *overrides: str):
        self.folder = folder / "runs" / name
        self.output = folder / f"{name}.{time.monotonic_ns()}.txt"
        with self.output.open("w") as file:
            self.process = psutil.Popen(
                command(folder, name, *overrides),
                stdout=file,
                stderr=file,
                env=environment(),
                start_new_session=True,
            )
        self.family: list[psutil.Process] = []

    def wait_for_rows(self, rows: int) -> None:
        """Until so many steps are logged. Notes who belongs to the run by then."""
        deadline = time.monotonic() + 600
        while len(self.rows()) < rows:
            assert self.process.poll() is None and time.monotonic() < deadline, self.output.read_text()[-3000:]
            time.sleep(0.02)
        self.family = self.process.children(recursive=True)
        assert len(self.family) >= 4, "two ranks and their workers"

    def rows(self) -> list[dict]:
        metrics = self.folder / "metrics.jsonl"
        return read_jsonl(metrics) if metrics.exists() else []

    def ends(self) -> int:
        """Wait for the exit status; nobody of the family may survive."""
        status = self.process.wait(600)
        assert not psutil.wait_procs(self.family, timeout=20)[1]
        return status

    def checkpoints(self) -> list[int]:
        return sorted(int(path.parent.name[5:]) for path in self.folder.glob("checkpoints/step_*/committed.json"))


@pytest.fixture
def launched(folder) -> Iterator[Callable[..., Launched]]:
    started: list[Launched] = []

    def launch(name: str, *overrides: str) -> Launched:
        started.append(Launched(folder, name, *overrides))
        return started[-1]

    yield launch
    for run in started:
        for process in [*run.family, run.process]:
            if process.is_running():
                process.kill()


@pytest.fixture(scope="module")
def undisturbed(folder) -> list[float]:
    subprocess.run(command(folder, "undisturbed"), env=environment(), check=True, capture_output=True, timeout=600)
    return [row["loss"] for row in read_jsonl(folder / "runs" / "undisturbed" / "metrics.jsonl")]


@pytest.mark.slow
def test_a_signal_lets_the_ranks_save_and_the_run_goes_on_as_if_undisturbed(launched, undisturbed):
    for number in (signal.SIGUSR1, signal.SIGTERM):
        run = launched("stopped")
        before = len(run.rows())
        run.wait_for_rows(before + 3)
        run.process.send_signal(number)
        if number == signal.SIGTERM:  # SLURM sends it to everyone: the launcher, the ranks, and their workers
            for process in run.family:
                process.send_signal(number)
        assert run.ends() == 0, run.output.read_text()[-3000:]
        assert before + 3 <= len(run.rows()) < STEPS
        assert run.checkpoints()[-1] == len(run.rows())
        assert "Traceback" not in run.output.read_text()
    again = launched("stopped")
    assert again.process.wait(600) == 0
    assert [row["loss"] for row in again.rows()] == undisturbed


@pytest.mark.slow
def test_ctrl_c_saves_and_a_second_one_ends_all_at_once(launched):
    # A step that never ends, as soon as one has been taken: only the second Ctrl-C can help.
    run = launched("impatient", "objective._target_=tests.trainer.faulty.StuckAt", "+objective.steps=[3]")
    run.wait_for_rows(3)
    run.process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert run.process.poll() is None
    started = time.monotonic()
    run.process.send_signal(signal.SIGINT)
    assert run.ends() == 130
    assert time.monotonic() - started < 15
    assert run.output.read_text().rstrip().endswith("millrace: interrupted")


def test_ranks_save_and_leave_when_their_launcher_is_killed(launched):
    run = launched("orphaned")
    run.wait_for_rows(5)
    run.process.kill()
    run.ends()
    assert run.checkpoints() == [len(run.rows())]
    assert len(run.rows()) < STEPS


@pytest.mark.slow
def test_a_rank_that_fails_while_stopping_is_told_and_not_started_again(launched):
    run = launched("failing", "cluster.restarts=3")
    run.wait_for_rows(5)
    (run.folder / "checkpoints").mkdir(exist_ok=True)
    (run.folder / "checkpoints").rename(run.folder / "moved")
    (run.folder / "checkpoints").write_text("in the way")
    run.process.send_signal(signal.SIGTERM)
    assert run.ends() == 1
    sentence = run.output.read_text().rstrip().splitlines()[-1]
    assert sentence.startswith("millrace: asked to stop by SIGTERM, rank ") and "checkpoint" in sentence


def test_the_command_ends_with_the_status_of_the_rank_that_failed(folder):
    def status(name: str, *overrides: str) -> int:
        done = subprocess.run(
            command(folder, name, *overrides), env=environment(), capture_output=True, text=True, timeout=600
        )
        last = done.stderr.rstrip().splitlines()[-1]
        assert last.startswith("millrace: rank ") and "Traceback" not in last
        assert last.count("MILLRACE_TRACEBACK") == (done.returncode == 1)
        return done.returncode

    # What only the ranks find out.
    assert status("data", f"data.sources.scenes.shards={folder}/nowhere") == 1


@pytest.mark.slow
def test_a_rank_that_fails_is_started_again_as_often_as_asked(launched, tmp_path):
    fails = ["objective._target_=tests.trainer.faulty.FailsOnceAt", "+objective.steps=[3]"]
    run = launched("restarted", "cluster.restarts=1", *fails, f"+objective.marker={tmp_path}/failed", "steps=5")
    assert run.process.wait(600) == 0, run.output.read_text()[-3000:]
    assert "failed on purpose; starting again" in run.output.read_text()
    assert [row["step"] for row in run.rows()] == [1, 2, 3, 4, 5]
