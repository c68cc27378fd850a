"""A run that takes no step for too long names the rank that holds it up, and ends."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.trainer.jobs import SMALL
from tools.demo.scenes import write_tars
from trainer.distributed import World
from trainer.hang import Answer, HangWatch, verdict


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_a_rank_that_sleeps_is_named_and_the_run_ends(tmp_path):
    write_tars(tmp_path / "scenes", 24, seed=0)
    logs = tmp_path / "runs" / "run" / "logs"
    done = subprocess.run(
        [
            *(sys.executable, "-P", "-m", "tools.cli", "train", *SMALL, f"runs={tmp_path}/runs", "name=run"),
            *(f"data.sources.scenes.shards={tmp_path}/scenes", f"data.cache_folder={tmp_path}/cache"),
            *("objective._target_=tests.trainer.faulty.HangsOnceAt", "+objective.steps=[1]", "+objective.lane=2"),
            *(f"+objective.marker={tmp_path}/hung", "hang_timeout=4.0", "cluster.processes=2"),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        timeout=250,
    )
    assert done.returncode == 1, done.stderr
    sentence = done.stderr.rstrip().splitlines()[-1]
    assert "hang after step 1: waiting for rank 1 on " in sentence  # lane 2 of 4 is rank 1's
    stacks = [(logs / f"hang_of_rank_{rank}.txt").read_text() for rank in (0, 1)]
    assert all("Timeout (0:00:04)!" in text and "in take_phase" in text for text in stacks)
    asleep = re.compile(r'first\):\n  File "[^"]*faulty\.py"')
    assert asleep.search(stacks[1]) and not asleep.search(stacks[0])
    records = [json.loads((logs / f"hang_of_rank_{rank}.json").read_text())["entries"] for rank in (0, 1)]
    assert len(records[0]) > len(records[1]) > 0


@pytest.mark.timeout(300)
def test_a_run_of_one_process_that_hangs_tells_where(tmp_path):
    write_tars(tmp_path / "scenes", 24, seed=0)
    done = subprocess.run(
        [
            *(sys.executable, "-P", "-m", "tools.cli", "train", *SMALL, f"runs={tmp_path}/runs", "name=run"),
            *(f"data.sources.scenes.shards={tmp_path}/scenes", f"data.cache_folder={tmp_path}/cache"),
            *("objective._target_=tests.trainer.faulty.StuckAt", "+objective.steps=[1]", "hang_timeout=2.0"),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        timeout=250,
    )
    assert done.returncode == 1
    assert 'faulty.py"' in done.stderr and "in fault" in done.stderr and "in take_phase" in done.stderr
    assert done.stderr.rstrip().splitlines()[-1].startswith("millrace: hang after step 1")


def test_the_rank_with_fewer_collectives_is_behind_and_one_that_does_not_answer_is_told():
    ahead, behind = Answer("a", 7, 40), Answer("b", 7, 38)
    assert verdict({0: ahead, 1: behind, 2: ahead}, 3).startswith("hang after step 7: waiting for rank 1 on b, in 38 ")
    assert verdict({0: ahead, 2: ahead}, 3) == "hang after step 7: no answer from rank 1"
    assert "the network" in verdict({0: ahead, 1: ahead}, 2)


def test_steps_in_time_and_beats_are_no_hang_and_leave_no_file(tmp_path):
    world = World(0, 1, 0, torch.device("cpu"), launched=False)
    with HangWatch(6.0, tmp_path / "logs", world) as watch:
        for step in range(7):
            time.sleep(1.0)
            watch.after_step(step) if step < 3 else watch.beat()
    assert not list((tmp_path / "logs").iterdir())
    with HangWatch(None, tmp_path / "nowhere", world) as watch:
        watch.after_step(1)
    watch.beat()  # the clock stands
    assert not (tmp_path / "nowhere").exists()
