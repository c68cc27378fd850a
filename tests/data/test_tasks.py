"""Tasks are real spawned processes here, and so are their deaths."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from data.tasks import Task, Tasks, run_tasks

ROOT = Path(__file__).parents[2]
LINES = 50_000


def collect(items: list[int], task: Task) -> tuple[int, list[int], str | None]:
    own = list(task.own(items))
    task.advance(len(own), {"torn": 1})
    return os.getpid(), own, os.environ.get("OMP_NUM_THREADS")


def use_duckdb(task: Task) -> None:
    import duckdb

    assert duckdb.sql("SELECT 1").fetchall() == [(1,)]
    for step in range(LINES):
        print(f"task {task.index} did {step}")


def fail(kind: type[Exception], marker: Path, task: Task) -> None:
    if task.index == 1:
        raise kind("shard 7 is broken")
    marker.write_text(str(os.getpid()))
    time.sleep(60)


def kill_itself(task: Task) -> None:
    if task.index == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def wait_long(folder: Path, task: Task) -> None:
    (folder / f"{os.getpid()}.pid").touch()
    time.sleep(60)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(condition, seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return met


def test_tasks_share_the_items_among_processes_of_one_thread_each(capfd):
    results = run_tasks(partial(collect, list(range(10))), Tasks(3), [4, 3, 3], "count")
    assert [own for _, own, _ in results] == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]
    assert len({pid for pid, _, _ in results} | {os.getpid()}) == 4
    assert {threads for _, _, threads in results} == {"1"}
    shown = capfd.readouterr().err
    assert "10.0/10.0" in shown and "errors=3" in shown


def test_what_tasks_print_is_seen_in_whole_lines_and_nothing_else(capfd, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    run_tasks(use_duckdb, Tasks(2), [1, 1], "query")
    shown = capfd.readouterr()
    assert Counter(shown.out.splitlines()) == Counter(f"task {i} did {step}" for i in (0, 1) for step in range(LINES))
    assert "leaked" not in shown.err


def test_a_task_of_an_array_runs_here_and_takes_its_own_items():
    [(pid, own, _)] = run_tasks(partial(collect, list(range(10))), Tasks(3, task=1), [4, 3, 3], "count")
    assert (pid, own) == (os.getpid(), [1, 4, 7])


@pytest.mark.parametrize("kind", [ValueError, FileNotFoundError, KeyError])
def test_what_a_task_raises_is_raised_here_and_ends_the_others(tmp_path, kind):
    expected = {ValueError: ValueError, FileNotFoundError: OSError, KeyError: RuntimeError}[kind]
    started = time.monotonic()
    with pytest.raises(expected, match="shard 7 is broken"):
        run_tasks(partial(fail, kind, tmp_path / "marker"), Tasks(2), [1, 1], "fail")
    assert time.monotonic() - started < 30
    assert not (tmp_path / "marker").exists() or not alive(int((tmp_path / "marker").read_text()))


def test_a_killed_task_is_told_of():
    with pytest.raises(ChildProcessError, match="task 0 of 2 ended by signal 9"):
        run_tasks(kill_itself, Tasks(2), [1, 1], "kill")


def test_tasks_end_with_a_parent_that_was_killed(tmp_path):
    code = (
        "from functools import partial; from pathlib import Path; from data.tasks import Tasks, run_tasks;"
        "from tests.data.test_tasks import wait_long;"
        f"run_tasks(partial(wait_long, Path({str(tmp_path)!r})), Tasks(2), [1, 1], 'wait')"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert until(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
    children = [int(path.stem) for path in tmp_path.glob("*.pid")]
    assert all(alive(pid) for pid in children)
    parent.kill()
    parent.wait()
    assert until(lambda: not any(alive(pid) for pid in children), seconds=10)


@pytest.mark.parametrize("given", [{"tasks": 0}, {"tasks": 2, "task": 2}, {"tasks": 2, "task": -1}])
def test_tasks_that_cannot_be_are_refused(given):
    with pytest.raises(ValueError, match=r"cluster\.task"):
        Tasks(**given)
