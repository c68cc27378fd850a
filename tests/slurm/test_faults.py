"""Runs that are disturbed end by themselves, with the losses of one that was not."""

import re
from pathlib import Path

import pytest

from tests.slurm.lab import Lab, wait_for
from tests.slurm.submitting import Submitted, command
from tests.trainer.jobs import train_on

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

STEPS = 24
SLOW = ["objective._target_=tests.trainer.faulty.Slow", f"steps={STEPS}", "checkpoint.every=5"]


@pytest.fixture(scope="module")
def undisturbed(folder) -> list[float]:
    rows = train_on(
        2, folder, f"data.sources.scenes.shards={folder}/scenes", "name=alone", *SLOW, "+objective.seconds=0.0"
    )
    return [row["loss"] for row in rows]


@pytest.fixture(autouse=True)
def whole(lab):
    """Every node is idle before a test."""
    yield
    lab.run("scancel", "--user=root")
    idle = ("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D")
    wait_for(lambda: lab.run(*idle).strip() == str(lab.nodes), 60, lab.log)


def submitted(lab: Lab, folder: Path, name: str, *overrides: str, pace: float = 0.2) -> Submitted:
    """A run of two nodes, a rank on each; `pace` in seconds for each of a step's two passes."""
    return Submitted(lab, folder, name, "cluster.nodes=2", *SLOW, f"+objective.seconds={pace}", *overrides)


def nodes_of(run: Submitted) -> list[int]:
    started = [row for row in run.chain() if row["event"] == "started"]
    return [int(node.removeprefix("node")) for node in started[-1]["nodes"]]


def outcomes(run: Submitted) -> list[str]:
    return [row["outcome"] for row in run.chain() if row["event"] == "ended"]


def test_a_run_whose_time_is_up_saves_and_is_queued_again(lab, folder, undisturbed):
    # SLURM warns up to half a minute early.
    run = submitted(lab, folder, "limit", "cluster.time=2", "cluster.signal_lead=30", "checkpoint.every=1000", pace=1.8)
    assert run.wait() == "COMPLETED", run.told()
    assert run.losses() == undisturbed
    *limits, last = outcomes(run)
    assert set(limits) == {"time limit"} and last == "finished"


def test_a_preempted_run_saves_and_goes_on_after_the_other_job(lab, folder, undisturbed):
    run = submitted(lab, folder, "preempted", "cluster.partition=low", "checkpoint.every=1000")
    run.wait_for_rows(4)
    lab.run("sbatch", "--exclusive", "--nodes=4", "--partition=main", "--output=/dev/null", "--wrap=srun sleep 1")
    assert run.wait() == "COMPLETED", run.told()
    assert run.losses() == undisturbed
    assert outcomes(run) == ["preempted", "finished"]


def test_a_run_that_an_operator_requeues_goes_on(lab, folder, undisturbed):
    run = submitted(lab, folder, "requeued")
    run.wait_for_rows(7)
    lab.run("scontrol", "requeue", run.job)
    assert run.wait() == "COMPLETED", run.told()
    assert run.losses() == undisturbed
    assert outcomes(run) == ["stopped", "finished"]


@pytest.mark.parametrize("which", ["first", "second"])
def test_a_run_whose_node_dies_goes_on_elsewhere(lab, folder, undisturbed, which):
    run = submitted(lab, folder, f"killed_{which}")
    run.wait_for_rows(7)
    lost = nodes_of(run)[0 if which == "first" else 1]
    lab.kill_node(lost)
    try:
        assert run.wait() == "COMPLETED", run.told()
        assert lost not in nodes_of(run)
    finally:
        lab.start_slurmd(lost)
    assert run.losses() == undisturbed


def test_a_run_whose_link_is_cut_goes_on_elsewhere(lab, folder, undisturbed):
    run = submitted(lab, folder, "cut")
    run.wait_for_rows(7)
    lost = nodes_of(run)[1]
    lab.cut(lost)
    try:
        assert run.wait() == "COMPLETED", run.told()
        assert lost not in nodes_of(run)
    finally:
        lab.mend(lost)
    assert run.losses() == undisturbed


def test_a_run_goes_on_with_fewer_nodes_where_no_more_are_left(lab, folder, undisturbed):
    run = submitted(lab, folder, "fewer", "cluster.min_nodes=1", "cluster.health=false")
    run.wait_for_rows(7)
    for node in (2, 3, 4):  # of which only the first is the run's
        lab.kill_node(node)
        lab.run("scontrol", "update", f"nodename=node{node}", "state=down", "reason=killed")
    try:
        assert run.wait() == "COMPLETED", run.told()
    finally:
        for node in (2, 3, 4):
            lab.start_slurmd(node)
    assert [len(row["nodes"]) for row in run.chain() if row["event"] == "started"] == [2, 1]
    assert run.losses() == pytest.approx(undisturbed, rel=1e-5)


def test_a_rank_that_hangs_is_named_and_the_run_goes_on(lab, folder, tmp_path, undisturbed):
    hangs = ["objective._target_=tests.trainer.faulty.HangsOnceAt", "+objective.steps=[7]", "+objective.lane=2"]
    run = Submitted(
        *(lab, folder, "hangs", "cluster.nodes=2", *hangs, f"+objective.marker={tmp_path}/hung", f"steps={STEPS}"),
        *("checkpoint.every=5", "hang_timeout=5.0", "cluster.health=false"),
    )
    assert run.wait() == "COMPLETED", run.told()
    reason = next(row["reason"] for row in run.chain() if row["event"] == "ended")
    assert "hang after step 7: waiting for rank 1 on node2" in reason
    assert run.losses() == undisturbed


def test_a_cancelled_run_saves_and_is_not_queued_again(lab, folder):
    run = submitted(lab, folder, "cancelled", "cluster.health=false", pace=1.5)
    run.wait_for_rows(3)
    assert "works on" in command(lab, "train", *run.overrides).stderr  # by a second job
    shown = command(lab, "jobs", f"runs={folder}/runs").stdout
    cells = re.search(
        rf"^cancelled +{run.job} +1 +(\d+)/{STEPS} +(\S+) +(?:\d+m )?\d+s .*running$", shown, re.MULTILINE
    )
    assert cells, shown
    assert cells[2] == f"{run.losses()[int(cells[1]) - 1]:.4g}"
    assert f"job {run.job} ends" in command(lab, "cancel", "cancelled", f"runs={folder}/runs").stdout
    assert run.wait() == "CANCELLED", run.told()
    wait_for(lambda: "ended" in run.events(), 120, run.told)
    assert run.events() == ["started", "cancelled", "ended"]
    shown = command(lab, "jobs", f"runs={folder}/runs").stdout
    assert any("cancelled" in line.split()[0] and line.endswith("cancelled") for line in shown.splitlines()), shown
    assert "received SIGTERM" in command(lab, "logs", "cancelled", f"runs={folder}/runs", "lines=200").stdout
