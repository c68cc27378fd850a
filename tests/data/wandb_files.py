"""W&B's files, through W&B's own reader."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def records(directory: Path) -> list[list[dict[str, Any]]]:
    """The records of every start of a run that was written offline, in order of starts."""
    files = sorted(directory.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    wandb = Path(sys.executable).parent / "wandb"
    read = [
        subprocess.run([wandb, "leet", "inspect", "--json", file], capture_output=True, text=True, check=True).stdout
        for file in files
    ]
    return [[json.loads(line) for line in text.splitlines()] for text in read]


def history(start: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that were logged in a start."""
    return [one["history"]["item"] for one in start if one["type"] == "history"]


def identity(starts: list[list[dict[str, Any]]]) -> tuple[str, str, str]:
    """Id, name and group of the run, the same in all starts."""
    ((run_id, name, group),) = {
        (one["run"]["run_id"], one["run"]["display_name"], one["run"].get("run_group", ""))
        for start in starts
        for one in start
        if one["type"] == "run"
    }
    return run_id, name, group
