"""The `jobs` job: a table of what was submitted."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slurm.queue import Entry, entries
from tools.submitted import CHAIN, Job, jobs_of, last_row, state_of

_RECENT_S = 24 * 3600.0
_HEADER = ("run", "job", "starts", "step", "loss", "left", "slowest", "state")
_STRAGGLES = 1.1


@dataclass
class Config:
    """conf/jobs.yaml."""

    runs: str
    all: bool


def run(config: Any) -> None:
    """Print the table."""
    chains = sorted([*Path(config.runs).glob(f"*/{CHAIN}"), *Path(config.runs).glob(f"*/*/{CHAIN}")])
    jobs = [job for chain in chains for job in jobs_of(chain.parent)]
    known = entries(element for job in jobs for element in job.elements)
    shown = [job for job in jobs if config.all or _recent(job) or any(_goes_on(known.get(e)) for e in job.elements)]
    print(table([_HEADER, *(_row(job, Path(config.runs), known) for job in shown)]))


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, each as wide as its longest entry."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _row(job: Job, runs: Path, known: Mapping[str, Entry]) -> tuple[str, ...]:
    chains = job.chains()
    elements = list(zip(chains, job.elements, strict=True))
    states = [state_of(chain, element, known.get(element)) for chain, element in elements]
    starts = sum(row["event"] == "started" for chain, element in elements for row in chain.rows(element))
    name = job.folder.relative_to(runs).as_posix()
    if len(states) > 1:
        counts = Counter(state.partition(":")[0] for state in states)
        state = ", ".join(f"{count} {word}" for word, count in counts.most_common())
        return name, job.id, str(starts), "", "", "", "", state
    row = last_row(job.folder) if job.row["kind"] == "train" else {}
    return name, job.id, str(starts), *_progress(job, row, _goes_on(known.get(job.id))), states[0]


def _progress(job: Job, row: Mapping[str, Any], goes_on: bool) -> tuple[str, str, str, str]:
    """Step, loss, the time that is left to a run that goes on, and the rank that the others wait for."""
    if not row:
        return "", "", "", ""
    from omegaconf import OmegaConf

    config: Any = OmegaConf.load(job.kept / "config.yaml")
    seconds = (config.steps - row["step"]) * config.batch / row["samples_per_s"]
    ratio = row.get("slowest_over_median", 1.0)
    slowest = f"rank {row['slowest_rank']} {ratio:.2g}x" if ratio > _STRAGGLES else ""
    return f"{row['step']}/{config.steps}", f"{row['loss']:.4g}", duration(seconds) if goes_on else "", slowest


def duration(seconds: float) -> str:
    """Two units of it: 3d 4h, 2h 05m, 7m 12s, 9s."""
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d {hours}h"
    if hours:
        return f"{hours}h {minutes:02}m"
    return f"{minutes}m {whole % 60:02}s" if minutes else f"{whole}s"


def _recent(job: Job) -> bool:
    return max(row["time"] for row in job.rows) > time.time() - _RECENT_S


def _goes_on(entry: Entry | None) -> bool:
    return entry is not None and not entry.ended
