"""Where a run of any job writes: `runs/<name>/{config.yaml, metrics.jsonl, keys.jsonl, checkpoints/, ...}`."""

import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from conf.errors import ConfigError

log = logging.getLogger(__name__)

# How long ranks whose launcher was killed may take to save and leave, before a command that goes on gives up.
_PATIENCE_S = 300.0


class RunDirectory:
    """The paths of a run. Creating it makes the folder.

    Raises:
        ConfigError: the folder cannot be made.
    """

    def __init__(self, runs: str, name: str):
        self.path = Path(runs) / name
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.keys = self.path / "keys.jsonl"
        self.quarantine = self.path / "quarantine.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.samples = self.path / "samples"
        self.wandb = self.path / "wandb.json"
        self.report = self.path / "report.html"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"runs={runs}: cannot make the folder {self.path}: {error.strerror}") from error

    def write_config(self, config: dict[str, Any]) -> None:
        """Write the composed config, whose secrets are masked."""
        import yaml

        self.config.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))

    @contextmanager
    def alone(self, patience: float = _PATIENCE_S) -> Iterator[None]:
        """Be the one process that writes the run; of its ranks, the first. Waits for one that is still there: ranks
        whose launcher was killed save before they leave.

        Raises:
            ConfigError: a process of this machine works on the run for longer. One of another machine, which may have
                been lost, is only told of.
        """
        with (self.path / ".lock").open("a+") as file:
            deadline, told = time.monotonic() + patience, False
            while holder := _holder(file):
                if not told:
                    log.warning("%s: waiting for process %s to end, which works on it", self.path, holder)
                    told = True
                if time.monotonic() > deadline:
                    words = f"process {holder} works on {self.path}"
                    if holder.endswith(f" on {socket.gethostname()}"):
                        raise ConfigError(f"{words}: end it, or give this run another name=")
                    log.warning("%s, or has been lost: going on without it", words)
                    break
                time.sleep(0.2)
            yield

    def rewind(self, step: int) -> None:
        """Drop the metrics that an interrupted run wrote beyond the step that it resumes from: no step stands twice."""
        if self.metrics.exists():
            kept = [line for line, row in _rows(self.metrics) if row.get("step", 0) <= step]
            scratch = self.metrics.with_suffix(".tmp")
            scratch.write_text("".join(kept))
            scratch.replace(self.metrics)


def _holder(file: IO[str]) -> str:
    """The process that holds the file's lock; "" where it is ours now, or the file system knows no locks.

    A record lock, which ends with the process and not with the last of its forks.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        return file.read().strip() or "(unknown)"
    except OSError:
        return ""
    file.truncate(0)
    file.write(f"{os.getpid()} on {socket.gethostname()}")
    file.flush()
    return ""


def check_name(name: str) -> None:
    """Refuse a run's name that is no folder within `runs`.

    Raises:
        ConfigError: it is empty, absolute, or holds "..".
    """
    path = Path(name)
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise ConfigError(f"name={name!r} is no folder within `runs`: give the run a name such as name=first")


def saved_step(path: Path) -> int:
    """The steps that the newest committed checkpoint of the run at `path` holds; 0 without one."""
    committed = path.glob("checkpoints/step_*/committed.json")
    return max((int(file.parent.name.removeprefix("step_")) for file in committed), default=0)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a .jsonl file; a last line cut short by a crash is left out."""
    return [row for _, row in _rows(path)]


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for line in path.read_text().splitlines(keepends=True):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and line.endswith("\n"):
            yield line, row
