"""What a run logs, read back."""

import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from data.run_directory import RunDirectory, read_jsonl
from tests.data.wandb_files import records
from trainer.tracking import Tracker

REPOSITORY = Path(__file__).parents[2]


def test_rows_are_json_whatever_the_numbers_and_only_the_main_rank_writes(tmp_path):
    directory = RunDirectory(str(tmp_path), "run")
    for is_main in (False, True):
        with Tracker(directory, {}, 3, 0, None, is_main) as tracker:
            tracker.log({"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "lr": 0.1})
            tracker.advance(1)
    (row,) = read_jsonl(directory.metrics)
    assert row == {"step": 1, "loss": None, "grad_norm": None, "lr": 0.1}
    assert not directory.wandb.exists()


PRELUDE = """
import logging, sys
from pathlib import Path
from PIL import Image
from data.run_directory import RunDirectory
from data.tracking import WandbConfig
from trainer.tracking import Tracker
logging.basicConfig(level=logging.INFO)
directory = RunDirectory(sys.argv[1], "run")
def tracker(start, mode="auto"):
    return Tracker(directory, {"seed": 3}, 9, start, WandbConfig(project="p", mode=mode), is_main=True)
def take(tracker, *steps):
    for step in steps:
        tracker.log({"step": step, "loss": 10.0 + step, "loss_by_t/0": None})
        tracker.advance(step)
"""


def python(code: str, folder: Path, status: int = 0, **variables: str) -> str:
    """Run code as a user does who never heard of W&B, at a terminal where it could ask; everything it wrote."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB") and k != "NETRC"}
    environment |= {"HOME": str(folder), "PYTHONPATH": str(REPOSITORY), **variables}
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))  # a bar of no width could hide what is glued to it
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", PRELUDE + code, str(folder)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            start_new_session=True,
        )
        os.close(theirs)
        output = b""
        try:
            while block := os.read(ours, 65536):
                output += block
        except OSError:  # how Linux tells that the other end is closed
            pass
        assert process.wait(60) == status, output.decode()
    finally:
        os.close(ours)
    return output.decode().replace("\r\n", "\n")


@pytest.mark.timeout(120)
def test_wandb_keeps_every_row_of_a_run_that_went_back_and_was_resumed_and_asks_nothing(tmp_path):
    python("with tracker(0) as t: take(t, 1, 2, 3, 4); take(t, 3, 4)  # rolled back to 2", tmp_path)
    image = "Image.new('RGB', (2, 2)).save('{0}/i.png'); t.log_image('samples', Path('{0}/i.png'), 4); take(t, 5)"
    python(f"with tracker(3) as t: take(t, 4); {image.format(tmp_path)}", tmp_path)
    starts = records(tmp_path / "run")
    assert len(starts) == 2
    assert len({one["run"]["run_id"] for start in starts for one in start if one["type"] == "run"}) == 1
    for start in starts:
        (metric,) = (one["metric"] for one in start if one["type"] == "metric")
        assert (metric["glob_name"], metric["step_metric"]) == ("*", "step")
    history = [one["history"] for start in starts for one in start if one["type"] == "history"]
    rows = [(row["item"]["step"], row["item"].get("loss")) for row in history]
    assert rows == [(1, 11), (2, 12), (3, 13), (4, 14), (3, 13), (4, 14), (4, 14), (4, None), (5, 15)]
    assert history[-2]["item"]["samples._type"] == "image-file"
    # W&B drops a row whose own step is not larger than all before, in any file of the run.
    assert [row["step"]["num"] for row in history] == list(range(1, 10))


@pytest.mark.timeout(120)
def test_online_without_a_login_is_refused_and_not_asked_for(tmp_path):
    output = python("tracker(0, 'online')", tmp_path, status=1)
    assert "ConfigError: W&B's mode is online, and this machine is not logged in" in output


@pytest.mark.timeout(120)
def test_a_logged_in_machine_that_cannot_reach_wandb_writes_offline(tmp_path):
    nobody = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "a" * 40, "WANDB_INIT_TIMEOUT": "3"}
    output = python("with tracker(0) as t: take(t, 1)", tmp_path, **nobody)
    assert "W&B does not answer" in output
    assert [one["history"]["item"]["loss"] for one in records(tmp_path / "run")[-1] if one["type"] == "history"] == [11]
    assert "CommError" in python("tracker(0, 'online')", tmp_path, status=1, **nobody)


@pytest.mark.timeout(120)
def test_a_log_line_and_an_error_stand_beside_the_bar_and_wandb_is_told_of_the_failure(tmp_path):
    code = "with tracker(0) as t: take(t, 1); logging.warning('a warning'); take(t, 2); raise ValueError('went wrong')"
    lines = python(code, tmp_path, status=1).split("\n")
    lines = [line.split("\r")[-1].replace("\x1b[A", "").strip() for line in lines]
    assert "WARNING:root:a warning" in lines
    assert "Traceback (most recent call last):" in lines
    assert records(tmp_path / "run")[0][-1]["exit"]["exit_code"] == 1
