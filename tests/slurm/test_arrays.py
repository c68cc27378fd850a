"""Jobs of tasks are arrays, which lose nothing when a node dies, and are followed by what needs all of their work."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.slurm.lab import wait_for
from tests.slurm.submitting import NODES, command
from tests.trainer.jobs import SMALL
from tools.demo.scenes import write_tars
from tools.submitted import named

pytestmark = [pytest.mark.slow, pytest.mark.cluster]


def scores(folder: Path) -> dict[str, dict]:
    return {path.name: pq.read_table(path).to_pydict() for path in sorted(folder.rglob("*.parquet"))}


def test_an_array_of_curation_with_a_node_killed_loses_nothing(lab, tmp_path):
    write_tars(tmp_path / "scenes", 200, seed=0, per_shard=10)
    curate = [f"shards={tmp_path}/scenes", "filter=[sharpness,content_hash]", "log.wandb=null"]
    assert command(lab, "index", f"shards={tmp_path}/scenes").returncode == 0
    here = command(lab, "curate", *curate, f"manifest_folder={tmp_path}/here", f"runs={tmp_path}/runs")
    assert here.returncode == 0, here.stderr
    # More tasks than the lab's arrays may have elements.
    there = [*NODES, "cluster.tasks=12", "cluster.max_parallel=4", f"runs={tmp_path}/runs", "name=scored"]
    done = command(lab, "curate", *curate, f"manifest_folder={tmp_path}/there", *there)
    assert done.returncode == 0, done.stderr
    array, rest = named(f"{tmp_path}/runs", "scored")
    assert len(array.elements) == 8 and f"job {array.id}, then {rest.id}" in done.stdout
    running = ("squeue", "-h", "-t", "running", "-r", "-j", array.id, "-o", "%N")
    wait_for(lambda: lab.run(*running).split(), 60, lab.log)
    lost = int(lab.run(*running).split()[0].removeprefix("node"))
    lab.kill_node(lost)
    lab.run("scontrol", "update", f"nodename=node{lost}", "state=down", "reason=killed")  # seen at once, not in 30 s
    try:
        wait_for(lambda: lab.state(rest.id) in ("COMPLETED", "FAILED", "CANCELLED"), 300, lab.log)
    finally:
        lab.start_slurmd(lost)
    assert lab.state(rest.id) == "COMPLETED", command(lab, "logs", "scored", f"runs={tmp_path}/runs").stdout
    assert scores(tmp_path / "there") == scores(tmp_path / "here")
    shown = command(lab, "jobs", f"runs={tmp_path}/runs").stdout
    assert "8 finished" in shown and "scored" in shown


def test_an_array_of_encoding_gives_the_bytes_of_one_command(lab, tmp_path):
    write_tars(tmp_path / "scenes", 40, seed=0, per_shard=10)
    run = [*SMALL, "first_stage=kl_tiny", "data.crop=center", "encode.conditions=false", "model.in_channels=4"]
    run += [f"data.sources.scenes.shards={tmp_path}/scenes", f"data.cache_folder={tmp_path}", f"runs={tmp_path}/runs"]
    here = command(lab, "encode", *run, "data.encoded=here")
    assert here.returncode == 0, here.stderr
    there = [*NODES, "cluster.tasks=3", "cluster.health=false"]
    done = command(lab, "encode", *run, "data.encoded=there", "name=array", *there)
    assert done.returncode == 0, done.stderr
    array, rest = named(f"{tmp_path}/runs", "array")
    assert len(array.elements) == 3
    wait_for(lambda: lab.state(rest.id) in ("COMPLETED", "FAILED", "CANCELLED"), 300, lab.log)
    told = command(lab, "logs", "array", f"runs={tmp_path}/runs").stdout
    assert lab.state(rest.id) == "COMPLETED" and "4 shards, 40 samples, 0 of them with errors" in told, told
    folders = [tmp_path / "scenes" / f"encoded-{name}" for name in ("here", "there")]
    encoded = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    assert encoded[0] == encoded[1] and len(encoded[0]) == 8
