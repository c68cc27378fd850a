"""What jobs tell of themselves while they run as users run them: metrics.jsonl and W&B's files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from shard_files import picture, write_tar
from wandb_files import history, identity, records

from data.run_directory import read_jsonl

ROOT = Path(__file__).parents[2]


def millrace(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """A command whose runs are in `folder`."""
    return subprocess.run(
        [sys.executable, "-P", "-m", "tools.cli", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"},
    )


def write_shards(folder: Path, shards: int, size: int = 10) -> Path:
    """Pictures, of which the first of each shard is cut short."""
    for s in range(shards):
        members = [(f"{s}-{i}.jpg", picture(40 + i, 30, seed=i)) for i in range(size)]
        members[0] = members[0][0], members[0][1][: len(members[0][1]) // 2]
        write_tar(folder / f"{s:05d}.tar", members)
    return folder


@pytest.mark.timeout(300)
def test_a_job_and_its_resumption_are_one_run_with_rows_tables_and_contact_sheets(tmp_path):
    shards = write_shards(tmp_path / "shards", 3)
    command = ["curate", f"shards={shards}", "filter=[sharpness,duplicates]", "name=photos", "cluster.tasks=2"]
    first = millrace(tmp_path, *command)
    assert first.returncode == 0, first.stderr
    write_tar(shards / "00003.tar", [(f"3-{i}.jpg", picture(40, 30, seed=i)) for i in range(10)])
    again = millrace(tmp_path, *command, f"report={tmp_path}/page", "funnel.where=sharpness > quantile(0.5)")
    assert again.returncode == 0, again.stderr
    run = tmp_path / "runs" / "photos"
    rows = read_jsonl(run / "metrics.jsonl")
    assert [row["samples"] for row in rows if row["job"] == "duplicates"][-1] == 40
    scoring = [row for row in rows if row["job"] == "curate"]
    for row in scoring:
        reasons = {key: value for key, value in row.items() if key.startswith("errors/")}
        assert row["errors"] == sum(reasons.values()) and reasons.keys() <= {
            "errors/sharpness: undecodable picture",
            "errors/perceptual_hash: undecodable picture",
        }
    ends = [row for row in scoring if row["samples"] == row["total"]]
    assert [(row["samples"], row["errors"]) for row in ends] == [(30, 6), (40, 6)]
    starts = records(run)
    assert len(starts) == 2 and identity(starts)[1:] == ("photos", "")
    logged = [row for start in starts for row in history(start)]
    assert [row["samples"] for row in logged if row.get("job")] == [row["samples"] for row in rows]
    assert {"filters._type": "table-file", "samples": 30}.items() <= logged[len(history(starts[0])) - 2].items()
    shown = {name for row in history(starts[1]) for name, value in row.items() if value in ("image-file", "table-file")}
    assert shown >= {
        *("filters._type", "errors._type", "report/funnel._type"),
        *("report/histogram_1._type", "report/kept_1._type", "report/dropped_1._type", "report/duplicates_1._type"),
    }
    (funnel,) = run.glob("wandb/offline-run-*/files/media/table/report/funnel_*.table.json")
    assert json.loads(funnel.read_text())["data"][0][0] == "sharpness > quantile(0.5)"


@pytest.mark.timeout(300)
def test_tasks_of_an_array_are_runs_of_a_group_that_share_no_file(tmp_path):
    shards = write_shards(tmp_path / "shards", 4)
    command = ["pack", f"data.sources.s.shards={shards}", f"out={tmp_path}/out", "samples_per_shard=10", "name=packed"]
    identities = set()
    for task in range(2):
        done = millrace(tmp_path, *command, "cluster.tasks=2", f"cluster.task={task}", "max_errors=0.5")
        assert done.returncode == 0, done.stderr
        run = tmp_path / "runs" / "packed" / f"task_{task}"
        assert OmegaConf.load(run / "config.yaml").cluster.task == task
        assert read_jsonl(run / "metrics.jsonl")[-1]["samples"] == 20
        identities.add(identity(records(run)))
    assert {one[1:] for one in identities} == {("packed task_0", "packed"), ("packed task_1", "packed")}
    assert len({one[0] for one in identities}) == 2
    assert not (tmp_path / "runs" / "packed" / "metrics.jsonl").exists()
    last = millrace(tmp_path, *command, "max_errors=0.5", "log.wandb=null")
    assert last.returncode == 0, last.stderr
    (row,) = read_jsonl(tmp_path / "runs" / "packed" / "metrics.jsonl")
    assert (row["samples"], row["samples_per_s"], row["errors/failed_to_resize"]) == (40, 0.0, 4)
