"""The history of a job over all its starts: a JSON line for everything that happened to it.

`event` is one of
    submitted   `job`, and `elements` of an array
    started     on `nodes`, as attempt `attempt`, with `progress` made before
    ended       `outcome` (finished, failed, unhealthy, time limit, preempted, stopped), `reason`
    requeued    without the nodes `excluded`
    given up    `reason`
    cancelled   by the user
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Chain:
    """The file of one job, or of one element of an array."""

    path: Path

    def add(self, event: str, job: str, **what: Any) -> None:
        """Append a row."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        row = {"time": round(time.time(), 3), "event": event, "job": job} | what
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self, job: str | None = None) -> list[dict[str, Any]]:
        """All rows, or those of one job; a last line cut short is left out."""
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("}\n")]
        return [row for row in rows if job is None or row["job"] == job]
