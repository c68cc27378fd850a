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
