"""The `logs` job: the last lines of what a submitted run wrote."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt, PositiveInt

from conf.errors import ConfigError
from slurm.step import log_of
from tools.submitted import Job, named


@dataclass
class Config:
    """conf/logs.yaml."""

    run: str
    runs: str
    task: NonNegativeInt
    element: NonNegativeInt | None
    lines: PositiveInt


def run(config: Any) -> None:
    """Print, for each job of the run, what its batch script and its task have written last."""
    jobs = named(config.runs, config.run)
    names = dict.fromkeys(job.folder.relative_to(config.runs).as_posix() for job in jobs)
    if len(names) > 1:
        raise ConfigError(f"run={config.run} is a study: name one of its runs, {', '.join(names)}")
    for job in jobs:
        for path in _files(job, config.task, config.element or 0):
            print(f"==> {path}")
            if not path.exists():
                print("(nothing is written there)")
            else:
                # As bytes: a carriage return ends no line, so that of a progress bar what a terminal shows is left.
                lines = path.read_bytes().decode(errors="replace").rstrip().split("\n")[-config.lines :]
                print("\n".join(line.rstrip("\r").rpartition("\r")[2] for line in lines))


def _files(job: Job, task: int, element: int) -> Iterator[Path]:
    in_array = len(job.elements) > 1
    yield job.kept / "submitit" / (f"{job.id}_{element}_0_log.out" if in_array else f"{job.id}_0_log.out")
    part = f"element_{element}" if "elements" in job.row else "rest" if "after" in job.row else ""
    yield log_of(job.kept / "logs" / part, str(task))
