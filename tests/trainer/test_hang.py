"""A rank that takes no step for too long tells where it is."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.trainer.jobs import SMALL
from tools.demo.scenes import write_tars
from trainer.hang import HangReport


@pytest.mark.timeout(300)
def test_a_step_that_hangs_is_told_with_its_stack_in_the_runs_logs_and_on_stderr(tmp_path):
    write_tars(tmp_path / "scenes", 24, seed=0)
    errors, told = tmp_path / "stderr.txt", tmp_path / "runs" / "run" / "logs" / "hang_of_rank_0.txt"
    with errors.open("w") as file:
        process = subprocess.Popen(
            [
                *(sys.executable, "-P", "-m", "tools.cli", "train", *SMALL, f"runs={tmp_path}/runs", "name=run"),
                *(f"data.sources.scenes.shards={tmp_path}/scenes", f"data.cache_folder={tmp_path}/cache"),
                *("objective._target_=tests.trainer.faulty.StuckAt", "+objective.steps=[1]", "hang_timeout=2.0"),
            ],
            stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        )
    try:
        deadline = time.monotonic() + 200
        while "in fault" not in errors.read_text():
            assert process.poll() is None and time.monotonic() < deadline, errors.read_text()[-3000:]
            time.sleep(0.2)
    finally:
        process.kill()
        process.wait()
    for text in (told.read_text(), errors.read_text()):
        assert "Timeout (0:00:02)!" in text
        assert 'faulty.py"' in text and "in fault" in text and "in take_phase" in text


def test_steps_in_time_are_not_told_and_leave_no_file(tmp_path):
    path = tmp_path / "logs" / "hang.txt"
    with HangReport(2.0, path) as report:
        for step in range(5):
            time.sleep(0.5)
            report.after_step(step)
    assert not path.exists()
    with HangReport(None, path) as report:
        report.after_step(1)
    assert not path.exists()
