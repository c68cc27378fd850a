"""Starts the ranks of a job on this machine, through torch's elastic launcher.

Under an existing `torchrun` or SLURM task nothing is started: the command joins as the rank it already is.
"""

import os
import sys
from pathlib import Path

from omegaconf import DictConfig

from conf.errors import ConfigError

_SENTENCE = "millrace: "


def wants_ranks(config: DictConfig) -> bool:
    """Whether the job asks for more than one process and is not already one of them."""
    if config.get("cluster", {}).get("processes", 1) <= 1:
        return False
    from trainer.distributed import read_environment

    return read_environment(os.environ) is None


def launch(job: str, overrides: list[str], config: DictConfig) -> None:
    """Run the same command as `cluster.processes` ranks; their output also lands in the run directory's `logs/`.

    Raises:
        ConfigError: a rank failed; the sentence names it and its log.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    processes: int = config.cluster.processes
    logs = run_directory(config) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    # One thread pool per rank: the machine's cores are shared, and a fixed count keeps sums bit-equal between runs.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=config.cluster.restarts,
        monitor_interval=0.2,
        # Every rank writes its log; rank 0 also speaks here.
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=Std.ALL, tee={0: Std.ALL}),
    )
    # -P keeps the caller's folder off the import path: it may well hold a folder named "data" or "models".
    command = ["-P", "-m", "tools.cli", job, *overrides]
    try:
        elastic_launch(settings, sys.executable)(*command)
    except ChildFailedError as error:
        rank, _ = error.get_first_failure()
        raise ConfigError(
            f"rank {rank} of {job!r} failed{_last_words(logs, rank)}; its whole output is under {logs}."
        ) from error


def run_directory(config: DictConfig) -> Path:
    """Where a job of this config writes."""
    return Path(config.get("runs", "runs")) / str(config.get("name", "job"))


def _last_words(logs: Path, rank: int) -> str:
    """The sentence, or else the last line, that a rank wrote to stderr in the newest start."""
    written = sorted(logs.glob(f"*/attempt_*/{rank}/stderr.log"), key=lambda path: path.stat().st_mtime)
    lines = written[-1].read_text(errors="replace").strip().splitlines() if written else []
    sentences = [line.removeprefix(_SENTENCE) for line in lines if line.startswith(_SENTENCE)]
    words = (sentences or lines)[-1:]
    return f": {words[0].rstrip('.')}" if words else ""
