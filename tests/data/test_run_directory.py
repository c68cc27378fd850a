"""One process at a time works on a run: others wait for it, or are told of it."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from conf.errors import ConfigError
from data.run_directory import RunDirectory

# Works on the run until its standard input ends; a fork of it goes on for longer.
WORKS = """
import os, sys, time
from data.run_directory import RunDirectory
with RunDirectory(sys.argv[1], "run").alone():
    if os.fork() == 0:
        os.close(1)
        time.sleep(600)
    print("works", flush=True)
    sys.stdin.read()
    os._exit(0)
"""


@pytest.fixture
def other(tmp_path) -> Iterator[subprocess.Popen[str]]:
    """A process that works on the run."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", WORKS, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "works\n"
    yield process
    os.killpg(process.pid, 9)
    process.wait()


def test_a_second_process_is_told_of_the_first(tmp_path, other):
    with pytest.raises(ConfigError, match=f"process {other.pid} on .* works on {tmp_path}/run"):
        RunDirectory(str(tmp_path), "run").alone(patience=0).__enter__()


def test_it_waits_for_the_first_to_end_but_not_for_its_forks(tmp_path, other, caplog):
    threading.Timer(0.5, other.stdin.close).start()
    with RunDirectory(str(tmp_path), "run").alone(patience=60):
        assert other.wait() == 0
    assert f"waiting for process {other.pid} on " in caplog.text


def test_one_of_another_machine_may_have_been_lost(tmp_path, other, caplog):
    (tmp_path / "run" / ".lock").write_text("17 on node9")
    with RunDirectory(str(tmp_path), "run").alone(patience=0):
        assert "process 17 on node9 works on" in caplog.text and "going on without it" in caplog.text


def test_what_a_process_that_has_ended_left_is_no_hindrance(tmp_path, caplog):
    for _ in range(2):
        with RunDirectory(str(tmp_path), "run").alone(patience=0):
            assert (tmp_path / "run" / ".lock").read_text().startswith(f"{os.getpid()} on ")
    assert caplog.text == ""
