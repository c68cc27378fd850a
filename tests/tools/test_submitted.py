"""`jobs`, `logs` and `cancel` of runs in every state, before a squeue that says what each test wants it to."""

import json
import os
import time
from pathlib import Path

import pytest

from slurm.chain import Chain
from tools import cli


class Cluster:
    """Run directories, and the queue that SLURM's commands tell of."""

    def __init__(self, folder: Path):
        self.folder, self.runs = folder, folder / "runs"
        (folder / "bin").mkdir()
        self.queue("")
        self._script("scancel", f'echo "$@" >> {folder}/cancelled')
        self._script("sacct", "exit 1")  # no accounts are kept

    def _script(self, name: str, line: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)

    def queue(self, text: str) -> None:
        """What squeue prints: id, state, reason, nodes, time left."""
        (self.folder / "queue").write_text(text)
        self._script("squeue", f"cat {self.folder}/queue")

    def submitted(self, name: str, job: str, kept: str = "first", **more: object) -> Chain:
        """A run's job; its history."""
        chain = Chain(self.runs / name / "slurm.jsonl")
        chain.add("submitted", job, kind=more.pop("kind", "train"), kept=kept, **more)
        return chain

    @property
    def cancelled(self) -> list[str]:
        file = self.folder / "cancelled"
        return file.read_text().split() if file.exists() else []

    def metrics(self, name: str, *rows: dict) -> None:
        (self.runs / name / "slurm" / "first").mkdir(parents=True)
        (self.runs / name / "slurm" / "first" / "config.yaml").write_text("steps: 100\nbatch: 8\n")
        (self.runs / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> Cluster:
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    return Cluster(tmp_path)


def told(capsys, *arguments: str) -> dict[str, list[str]]:
    """The table of `millrace jobs`: cells by run, two spaces between them."""
    assert cli.execute(["jobs", *arguments]) == 0
    heads, *rows = capsys.readouterr().out.splitlines()
    starts = [heads.index(word) for word in heads.split()]
    spans = list(zip(starts, [*starts[1:], None], strict=True))
    cells = [[row[start:end].strip() for start, end in spans] for row in rows]
    return {name: others for name, *others in cells}


def test_a_run_shows_its_starts_step_loss_time_left_and_who_is_slow(cluster, capsys):
    chain = cluster.submitted("first", "7")
    chain.add("started", "7", attempt=1, nodes=["node1"], progress=0)
    row = {"loss": 0.51234, "samples_per_s": 4.0, "slowest_rank": 3, "slowest_over_median": 1.52}
    cluster.metrics("first", row | {"step": 10}, row | {"step": 20}, {"step": 30, "loss": None})
    cluster.queue("7|RUNNING|None|node1|1:00:00\n")
    # 80 steps of 8 samples are left.
    assert told(capsys, f"runs={cluster.runs}") == {
        "first": ["7", "1", "20/100", "0.5123", "2m 40s", "rank 3 1.5x", "running"]
    }
    cluster.queue("7|PENDING|BeginTime||INVALID\n")
    chain.add("ended", "7", outcome="preempted", reason="SIGUSR1")
    assert told(capsys, f"runs={cluster.runs}")["first"][-1] == "pending: BeginTime"
    cluster.queue("")  # SLURM has forgotten it
    assert told(capsys, f"runs={cluster.runs}")["first"][4:] == ["", "rank 3 1.5x", "preempted: SIGUSR1"]


def test_states_are_told_with_reasons(cluster, capsys):
    cluster.submitted("done", "1").add("ended", "1", outcome="finished", reason="")
    cluster.submitted("hopeless", "2").add("given up", "2", reason="3 starts made no progress")
    stopped = cluster.submitted("stopped", "3")
    stopped.add("cancelled", "3")
    stopped.add("ended", "3", outcome="stopped", reason="SIGTERM")
    cluster.submitted("lost", "4")
    cluster.submitted("by_hand", "5").add("started", "5", attempt=1, nodes=["node1"], progress=0)
    cluster.queue("3|CANCELLED|None||INVALID\n5|CANCELLED|None||INVALID\n")
    states = {name: cells[-1] for name, cells in told(capsys, f"runs={cluster.runs}").items()}
    assert states == {
        "by_hand": "cancelled",
        "done": "finished",
        "hopeless": "given up: 3 starts made no progress",
        "lost": "unknown to SLURM",
        "stopped": "cancelled",
    }


def test_an_array_counts_its_elements_and_only_the_newest_submission_counts(cluster, capsys):
    cluster.submitted("scored", "3", "older", kind="curate", elements=2)
    cluster.submitted("scored", "8", "first", kind="curate", elements=3)
    cluster.submitted("scored", "9", "first", kind="curate", after="8")
    Chain(cluster.runs / "scored/slurm/first/element_1.jsonl").add("ended", "8_1", outcome="finished", reason="")
    cluster.queue("8_0|RUNNING|None|node1|9:00\n8_2|RUNNING|None|node2|9:00\n9|PENDING|Dependency||INVALID\n")
    assert cli.execute(["jobs", f"runs={cluster.runs}"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [" ".join(line.split()) for line in lines] == [
        "scored 8 0 2 running, 1 finished",
        "scored 9 0 pending: Dependency",
    ]


def test_runs_that_ended_long_ago_are_left_out_unless_all_are_asked_for(cluster, capsys):
    chain = cluster.submitted("old", "1")
    row = chain.rows()[0] | {"time": time.time() - 2 * 86400}
    chain.path.write_text(json.dumps(row) + "\n")
    assert told(capsys, f"runs={cluster.runs}") == {}
    assert list(told(capsys, f"runs={cluster.runs}", "all=true")) == ["old"]
    cluster.queue("1|RUNNING|None|node1|1:00:00\n")
    assert list(told(capsys, f"runs={cluster.runs}")) == ["old"]


def test_logs_are_those_of_the_batch_script_and_of_a_task(cluster, capsys):
    kept = cluster.submitted("first", "7").path.parent / "slurm" / "first"
    (kept / "submitit").mkdir(parents=True)
    (kept / "logs").mkdir()
    (kept / "submitit" / "7_0_log.out").write_text("batch\n")
    (kept / "logs" / "task_1.log").write_text("one\ntwo\n 10%\r 20%\r 30%\nfour\n 1%\r 2%")
    assert cli.execute(["logs", "first", f"runs={cluster.runs}", "task=1", "lines=3"]) == 0
    expected = [f"==> {kept}/submitit/7_0_log.out", "batch", f"==> {kept}/logs/task_1.log", " 30%", "four", " 2%"]
    assert capsys.readouterr().out.splitlines() == expected
    assert cli.execute(["logs", "first", f"runs={cluster.runs}"]) == 0
    assert "(nothing is written there)" in capsys.readouterr().out
    assert cli.execute(["logs", "second", f"runs={cluster.runs}"]) == 2
    assert "run=second: nothing in" in capsys.readouterr().err


def test_an_array_is_cancelled_last_job_first_and_what_has_ended_stays(cluster, capsys):
    cluster.submitted("scored", "8", kind="curate", elements=2)
    cluster.submitted("scored", "9", kind="curate", after="8")
    cluster.queue("8_0|RUNNING|None|node1|9:00\n8_1|COMPLETED|None|node2|0:00\n9|PENDING|Dependency||INVALID\n")
    assert cli.execute(["cancel", "scored", f"runs={cluster.runs}"]) == 0
    assert capsys.readouterr().out == "scored: job 9 ends\nscored: job 8 ends\n"
    assert cluster.cancelled == ["9", "8"]
    noted = {path.stem: [row["event"] for row in Chain(path).rows()] for path in cluster.runs.rglob("first/*.jsonl")}
    assert noted == {"element_0": ["cancelled"], "rest": ["cancelled"]}
    cluster.queue("8_0|CANCELLED|None||INVALID\n8_1|COMPLETED|None|node2|0:00\n9|CANCELLED|None||INVALID\n")
    assert cli.execute(["cancel", "scored", f"runs={cluster.runs}"]) == 0
    assert "job 8 has ended already" in capsys.readouterr().out and cluster.cancelled == ["9", "8"]
