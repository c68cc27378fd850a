"""What a user types that nobody else should read is in no byte that a run writes or prints."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from conf.secrets import without_secrets
from tests.trainer.jobs import SMALL
from tools.demo.scenes import write_tars

WITH_DATA = [
    "data.allow_pipe=true",
    "data.cache_folder=FOLDER/cache",
    "data.storage_options={s3: {key: me, secret: PLANTED-1}}",
    "data.sources.scenes.shards=pipe:cat TAR # PLANTED-2",
    "data.manifest_folder=FOLDER/manifests",
]
JOBS = {
    "train": [*SMALL, "steps=1", *WITH_DATA],
    "encode": [
        *SMALL,
        *WITH_DATA,
        "first_stage=kl_tiny",
        "encode.conditions=false",
        "data.encoded=once",
        "data.crop=center",
    ],
    "pack": ["out=FOLDER/packed", *WITH_DATA],
    "curate": [
        "filter=[sharpness]",
        "store.allow_pipe=true",
        "store.storage_options={s3: {key: me, secret: PLANTED-1}}",
        "shards=pipe:cat TAR # PLANTED-2",
        "manifest_folder=FOLDER/manifests",
        "report=FOLDER/runs/page",
        "funnel.where=sharpness > quantile(0.5)",
    ],
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("job", JOBS)
def test_secrets_of_the_command_line_are_in_nothing_that_a_run_writes(tmp_path, job):
    write_tars(tmp_path / "scenes", 24, seed=0)
    (tar,) = (tmp_path / "scenes").glob("*.tar")
    done = subprocess.run(
        [
            *(sys.executable, "-P", "-m", "tools.cli", job, f"runs={tmp_path}/runs", "name=run"),
            *(override.replace("FOLDER", str(tmp_path)).replace("TAR", str(tar)) for override in JOBS[job]),
            "log.wandb={project: p, mode: offline}",
        ],
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert {"config.yaml", "metrics.jsonl", "wandb.json"} <= {path.name for path in files}
    assert any(path.suffix == ".wandb" for path in files)
    assert b"PLANTED" not in done.stdout + done.stderr
    assert [path for path in files if b"PLANTED" in path.read_bytes()] == []
    (written,) = (path for path in files if path.name == "config.yaml" and "wandb" not in path.parts)
    config = OmegaConf.load(written)
    assert (config.shards if job == "curate" else config.data.sources.scenes.shards) == "pipe:cat ..."


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("pipe:curl -H 'Authorization: Bearer hunter2' https://x/a.tar", "pipe:curl ..."),
        ("pipe:TOKEN=hunter2 curl https://x/a.tar", "pipe:..."),
        ("pipe:", "pipe:..."),
    ],
)
def test_a_pipe_command_is_told_down_to_its_program(command, shown):
    assert without_secrets({"shards": [command]}) == {"shards": [shown]}
