"""Jobs of tasks are arrays, which lose nothing when a node dies, and are followed by what needs all of their work."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.data.curation.tiny_models import save_clip
from tests.slurm.lab import Lab, wait_for
from tests.slurm.submitting import NODES, command
from tests.trainer.jobs import SMALL
from tools.demo.scenes import write_tars
from tools.submitted import named

pytestmark = [pytest.mark.slow, pytest.mark.cluster]


def scores(folder: Path) -> dict[str, dict]:
    return {path.name: pq.read_table(path).to_pydict() for path in sorted(folder.rglob("*.parquet"))}


def kill_one(lab: Lab, job: str) -> int:
    """Kill a node on which the job runs; its number."""
    running = ("squeue", "-h", "-t", "running", "-r", "-j", job, "-o", "%N")
    wait_for(lambda: lab.run(*running).split(), 60, lab.log)
    lost = int(lab.run(*running).split()[0].removeprefix("node"))
    lab.kill_node(lost)
    lab.run("scontrol", "update", f"nodename=node{lost}", "state=down", "reason=killed")  # seen at once, not in 30 s
    return lost


def wait_until_ended(lab: Lab, job: str) -> None:
    wait_for(lambda: lab.state(job) in ("COMPLETED", "FAILED", "CANCELLED"), 300, lab.log)


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
    lost = kill_one(lab, array.id)
    try:
        wait_until_ended(lab, rest.id)
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
    wait_until_ended(lab, rest.id)
    told = command(lab, "logs", "array", f"runs={tmp_path}/runs").stdout
    assert lab.state(rest.id) == "COMPLETED" and "4 shards, 40 samples, 0 of them with errors" in told, told
    folders = [tmp_path / "scenes" / f"encoded-{name}" for name in ("here", "there")]
    encoded = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    assert encoded[0] == encoded[1] and len(encoded[0]) == 8


def test_an_array_of_retrieval_with_a_node_killed_gives_the_files_of_one_command(lab, tmp_path):
    """Tasks embed; the last job, which waits for them, builds the index and finds the neighbours."""
    write_tars(tmp_path / "scenes", 120, seed=0, per_shard=10)
    clip = save_clip(tmp_path / "clip")
    assert command(lab, "index", f"shards={tmp_path}/scenes").returncode == 0
    run = [f"shards={tmp_path}/scenes", f"neighbours_of={tmp_path}/scenes", f"embedding.model={clip}", "k=4"]
    run += ["index.kind=ivf_flat", "index.cells=4", f"runs={tmp_path}/runs", "log.wandb=null"]
    here = command(lab, "retrieve", *run, f"database={tmp_path}/here", "column=here")
    assert here.returncode == 0, here.stderr
    there = [*NODES, "cluster.tasks=4", "name=array"]
    done = command(lab, "retrieve", *run, f"database={tmp_path}/there", "column=there", *there)
    assert done.returncode == 0, done.stderr
    array, rest = named(f"{tmp_path}/runs", "array")
    assert len(array.elements) == 4 and f"job {array.id}, then {rest.id}" in done.stdout
    lost = kill_one(lab, array.id)
    try:
        wait_until_ended(lab, rest.id)
    finally:
        lab.start_slurmd(lost)
    told = command(lab, "logs", "array", f"runs={tmp_path}/runs").stdout
    assert lab.state(rest.id) == "COMPLETED" and "120 embeddings of 10 numbers" in told, told
    files = [
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "here", tmp_path / "there")
    ]
    assert files[0] == files[1] and len(files[0]) == 2 * 12 + 2
    columns = [
        [pq.read_table(path)[name].to_pylist() for path in sorted((tmp_path / "scenes").glob(f"*.{name}.parquet"))]
        for name in ("here", "there")
    ]
    assert columns[0] == columns[1] and len(columns[0]) == 12
