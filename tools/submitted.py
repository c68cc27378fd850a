"""What has been submitted, and how it goes: `slurm.jsonl` in the run directories, and SLURM's queue."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.errors import ConfigError
from data.run_directory import read_jsonl
from slurm.chain import Chain
from slurm.queue import Entry

CHAIN = "slurm.jsonl"


@dataclass(frozen=True)
class Job:
    """The newest job of a run directory, or one that follows it.

    Args:
        folder: of the run.
        row: of its submission.
        rows: of its history: of a job of ranks.
    """

    folder: Path
    row: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def id(self) -> str:
        """In SLURM's queue; of an element of an array `17_3`."""
        return str(self.row["job"])

    @property
    def number(self) -> int:
        """That SLURM counts jobs by: those that follow others have larger ones."""
        return int(self.id.partition("_")[0])

    @property
    def kept(self) -> Path:
        """Where the submission's own files lie."""
        return self.folder / "slurm" / self.row["kept"]

    @property
    def elements(self) -> list[str]:
        """Ids of an array's elements; without an array, the job's own."""
        count = self.row.get("elements", 1)
        return [f"{self.id}_{i}" for i in range(count)] if count > 1 else [self.id]

    def chains(self) -> list[Chain]:
        """The history of each element."""
        if "elements" in self.row:
            return [Chain(self.kept / f"element_{i}.jsonl") for i in range(self.row["elements"])]
        return [Chain(self.kept / "rest.jsonl")] if "after" in self.row else [Chain(self.folder / CHAIN)]


def jobs_of(folder: Path) -> list[Job]:
    """What was last submitted for a run directory: a job, or an array and what follows it; empty without any."""
    rows = Chain(folder / CHAIN).rows()
    submitted = [row for row in rows if row["event"] == "submitted"]
    if not submitted:
        return []
    newest = [row for row in submitted if row["kept"] == submitted[-1]["kept"]]
    return [Job(folder, row, [r for r in rows if r["job"] == str(row["job"])]) for row in newest]


def named(runs: str, name: str) -> list[Job]:
    """Those of a run by its name, or of all runs of a study by its.

    Raises:
        ConfigError: nothing of that name was submitted.
    """
    folder = Path(runs) / name
    jobs = jobs_of(folder) or [job for chain in sorted(folder.glob(f"*/{CHAIN}")) for job in jobs_of(chain.parent)]
    if not jobs:
        raise ConfigError(f"run={name}: nothing in {Path(runs) / name} was submitted (millrace jobs lists what was)")
    return jobs


def state_of(chain: Chain, job: str, entry: Entry | None) -> str:
    """One word or two for how a job, or an element of an array, stands; with a reason where there is one."""
    rows = [row for row in chain.rows() if row["job"] == job and row["event"] != "submitted"]
    last = rows[-1] if rows else {"event": ""}
    if last.get("outcome") == "finished":
        return "finished"
    if last["event"] == "given up":
        return f"given up: {last['reason']}"
    if entry is not None and not entry.ended:
        waits = entry.state == "PENDING" and entry.reason not in ("", "None")
        return f"pending: {entry.reason}" if waits else entry.state.lower()
    if any(row["event"] == "cancelled" for row in rows):
        return "cancelled"
    if entry is not None:
        return entry.state.lower()
    return f"{last['outcome']}: {last['reason']}" if "outcome" in last else "unknown to SLURM"


def last_row(folder: Path) -> dict[str, Any]:
    """The newest row of a run's metrics with a loss; empty without one."""
    metrics = folder / "metrics.jsonl"
    rows = read_jsonl(metrics) if metrics.exists() else []
    return next((row for row in reversed(rows) if row.get("loss") is not None), {})
