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


@pytest.mark.timeout(300)
def test_secrets_of_the_command_line_are_in_nothing_that_a_run_writes(tmp_path):
    write_tars(tmp_path / "scenes", 24, seed=0)
    (tar,) = (tmp_path / "scenes").glob("*.tar")
    done = subprocess.run(
        [
            *(sys.executable, "-P", "-m", "tools.cli", "train", *SMALL, "steps=1", f"runs={tmp_path}/runs", "name=run"),
            *("log.wandb={project: p, mode: offline}", "data.allow_pipe=true", f"data.cache_folder={tmp_path}/cache"),
            "data.storage_options={s3: {key: me, secret: PLANTED-1}}",
            f"data.sources.scenes.shards=pipe:cat {tar} # PLANTED-2",
            f"data.manifest_folder={tmp_path}/manifests",
        ],
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert {"config.yaml", "report.html", "wandb.json"} <= {path.name for path in files}
    assert any(path.suffix == ".wandb" for path in files)
    assert b"PLANTED" not in done.stdout + done.stderr
    assert [path for path in files if b"PLANTED" in path.read_bytes()] == []
    config = OmegaConf.load(tmp_path / "runs" / "run" / "config.yaml")
    assert config.data.sources.scenes.shards == "pipe:cat ..."


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
