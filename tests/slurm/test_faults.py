"""Runs that are disturbed end by themselves, with the losses of one that was not."""

from pathlib import Path

import pytest

from tests.slurm.lab import Lab, wait_for
from tests.slurm.submitting import Submitted
from tests.trainer.jobs import train_on
from tools.demo.scenes import write_tars

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

STEPS = 24
SLOW = ["objective._target_=tests.trainer.faulty.Slow", f"steps={STEPS}", "checkpoint.every=5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    write_tars(folder / "scenes", 60, seed=0)
    return folder


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
    run = submitted(lab, folder, "limit", "cluster.time=1", "cluster.signal_lead=20", "checkpoint.every=1000", pace=1.0)
    assert run.wait() == "COMPLETED", run.told()
    assert run.losses() == undisturbed
    assert outcomes(run) == ["time limit", "finished"]


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
