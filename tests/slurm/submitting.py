"""A small training run, submitted to the lab as a user would."""

import os
import subprocess
import sys
from pathlib import Path

from data.run_directory import read_jsonl
from slurm.chain import Chain
from tests.slurm.lab import Lab, wait_for
from tests.trainer.jobs import SMALL

ROOT = Path(__file__).parents[2]
# Of a node: no GPU, a core for each rank.
NODES = ["cluster=slurm", "cluster.gpus_per_node=0", "cluster.cpus_per_rank=1"]


def command(lab: Lab, job: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Run `millrace <job> <overrides>` where SLURM's commands find the lab."""
    return subprocess.run(
        [sys.executable, "-P", "-m", "tools.cli", job, *overrides],
        env={**os.environ, **lab.environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )


class Submitted:
    """A run of tests.trainer.jobs on the scenes in `folder`."""

    def __init__(self, lab: Lab, folder: Path, name: str, *overrides: str):
        self.lab = lab
        self.folder = folder / "runs" / name
        data = [f"data.sources.scenes.shards={folder}/scenes", f"data.cache_folder={folder}/cache"]
        self.overrides = [*SMALL, *data, f"name={name}", f"runs={folder}/runs", *NODES, *overrides]
        self.done = command(lab, "train", *self.overrides)
        assert self.done.returncode == 0, self.done.stderr
        self.job = next(row["job"] for row in self.chain() if row["event"] == "submitted")

    def chain(self) -> list[dict]:
        return Chain(self.folder / "slurm.jsonl").rows()

    def events(self) -> list[str]:
        return [row["event"] for row in self.chain() if row["event"] != "submitted"]

    def rows(self) -> list[dict]:
        metrics = self.folder / "metrics.jsonl"
        return read_jsonl(metrics) if metrics.exists() else []

    def losses(self) -> list[float]:
        return [row["loss"] for row in self.rows()]

    def wait_for_rows(self, count: int) -> None:
        wait_for(lambda: len(self.rows()) >= count, 300, self.told)

    def wait(self, seconds: float = 500) -> str:
        """Until the job has left the queue; how it ended."""
        wait_for(
            lambda: self.lab.state(self.job) in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"), seconds, self.told
        )
        return self.lab.state(self.job)

    def told(self) -> str:
        """All that was written, for a test that fails."""
        files = [*self.folder.glob("slurm/*/submitit/*.out"), *self.folder.glob("slurm/*/logs/**/*.log")]
        texts = [f"--- {file.name}\n{file.read_text()[-2000:]}" for file in files]
        return "\n".join([*map(str, self.chain()), *texts, self.lab.run("squeue", "-t", "all"), self.lab.log()])
