"""A sweep of eight on a real SLURM, two at a time, and its analysis by dependency."""

import json
import re

import pytest

from slurm.chain import Chain
from tests.slurm.lab import wait_for
from tests.slurm.submitting import NODES, command
from tests.tools.study.test_job import arguments
from tools.demo.scenes import write_tars


@pytest.mark.slow
@pytest.mark.cluster
def test_a_sweep_of_eight_two_at_a_time_then_its_analysis(lab, tmp_path):
    write_tars(tmp_path / "scenes", 60, seed=0)
    job, *overrides = arguments(tmp_path, "sweep", "study.seeds=[0,1]", "cluster.max_parallel=2", *NODES)
    # All four combinations; one of them finds no data.
    overrides = [o for o in overrides if not o.startswith("+study.leave_out")]
    overrides.append("study.axes.lr.high=['data.sources.scenes.shards=/nowhere']")
    overrides.append("cluster.attempts=1")
    done = command(lab, job, *overrides)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "sweep"
    analysis = Chain(folder / "analysis" / "slurm.jsonl").rows()[0]["job"]
    most = 0

    def ended() -> bool:
        nonlocal most
        running = lab.run("squeue", "-h", "-r", "-t", "running", "-o", "%i").split()
        most = max(most, len([element for element in running if element != analysis]))
        return lab.state(analysis) in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")

    wait_for(ended, 400, lab.log)
    assert lab.state(analysis) == "COMPLETED", lab.log()
    assert most == 2
    found = json.loads((folder / "analysis.json").read_text())
    assert found["runs"]["verdicts"] == ["4 of 8 runs are finished."]
    report = (folder / "report" / "report.md").read_text()
    for name in (f"w{width}_high_seed{seed}" for width in (32, 64) for seed in (0, 1)):
        assert re.search(rf"\| {name} \| failed: .*/nowhere", report)
    metrics = [folder / f"w{width}_low_seed{seed}" / "metrics.jsonl" for width in (32, 64) for seed in (0, 1)]
    assert all(file.exists() for file in metrics)


LAW = (
    "+study.analyses.law={_target_: tools.study.analyses.scaling.ScalingLaw, loss: loss, of: [samples], replicates: 50}"
)


def held_out_study(folder, name: str, *overrides: str) -> list[str]:
    """Three lengths of a run, and a longer one that is predicted from them."""
    job, *small = arguments(folder, name, *NODES, "cluster.attempts=1")
    small = [o for o in small if not o.startswith("+study.leave_out")]
    lengths = [f"+study.axes.length.s{n}=['steps={n}']" for n in (2, 3, 4, 8)]
    axes = ["~study.axes.width", "~study.axes.lr", *lengths, "+study.held_out={length: [s8]}"]
    return [job, *small, *axes, LAW, *overrides]


@pytest.mark.slow
@pytest.mark.cluster
def test_a_held_out_run_starts_after_its_prediction_and_is_judged_by_it(lab, tmp_path):
    write_tars(tmp_path / "scenes", 60, seed=0)
    done = command(lab, *held_out_study(tmp_path, "law"))
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "law"
    stages = {name: Chain(folder / name / "slurm.jsonl") for name in ("s8_seed0", "prediction", "analysis")}
    jobs = {name: chain.rows()[0]["job"] for name, chain in stages.items()}
    assert f"law, held-out runs: job {jobs['s8_seed0']}" in done.stdout
    wait_for(lambda: lab.state(jobs["analysis"]) in ("COMPLETED", "FAILED", "CANCELLED"), 400, lab.log)
    assert lab.state(jobs["analysis"]) == "COMPLETED", lab.log()
    times = {(name, row["event"]): row["time"] for name, chain in stages.items() for row in chain.rows()}
    assert times["prediction", "ended"] < times["s8_seed0", "started"]
    assert times["s8_seed0", "ended"] < times["analysis", "started"]
    prediction = json.loads((folder / "prediction.json").read_text())
    assert prediction["held_out"] == {"s8_seed0": "not started"} and len(prediction["runs"]) == 3
    verdict = json.loads((folder / "analysis.json").read_text())["law"]["verdicts"][-1]
    assert verdict.startswith("Held-out run s8_seed0 was predicted at") and "it ended at" in verdict


@pytest.mark.slow
@pytest.mark.cluster
def test_a_held_out_run_that_cannot_be_predicted_does_not_start_and_the_rest_is_analysed(lab, tmp_path):
    write_tars(tmp_path / "scenes", 60, seed=0)
    fails = "++study.axes.length.s3=['data.sources.scenes.shards=/nowhere']"
    assert command(lab, *held_out_study(tmp_path, "short", fails)).returncode == 0
    folder = tmp_path / "runs" / "short"
    analysis = Chain(folder / "analysis" / "slurm.jsonl").rows()[0]["job"]
    wait_for(lambda: lab.state(analysis) in ("COMPLETED", "FAILED", "CANCELLED"), 400, lab.log)
    assert lab.state(analysis) == "COMPLETED", lab.log()
    assert "cannot be fitted" in Chain(folder / "prediction" / "slurm.jsonl").rows()[-1]["reason"]
    assert not (folder / "s8_seed0" / "metrics.jsonl").exists()
    assert json.loads((folder / "analysis.json").read_text())["runs"]["verdicts"] == ["2 of 4 runs are finished."]


@pytest.mark.slow
@pytest.mark.cluster
def test_a_study_is_cancelled_by_its_name(lab, tmp_path):
    write_tars(tmp_path / "scenes", 60, seed=0)
    slow = "overrides=objective._target_=tests.trainer.faulty.Slow +objective.seconds=1.0"
    assert command(lab, *held_out_study(tmp_path, "stopped", slow)).returncode == 0
    runs = f"runs={tmp_path}/runs"
    assert "is a study" in command(lab, "logs", "stopped", runs).stderr
    done = command(lab, "cancel", "stopped", runs)
    assert done.returncode == 0 and done.stdout.count(" ends") == 6, done.stdout + done.stderr
    wait_for(lambda: not lab.run("squeue", "-h").split(), 60, lab.log)
    shown = command(lab, "jobs", runs).stdout
    assert shown.count("cancelled") == 6, shown
