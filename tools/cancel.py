"""The `cancel` job: ends a submitted run for good."""

from dataclasses import dataclass
from typing import Any

from slurm.queue import cancel, entries
from tools.submitted import named


@dataclass
class Config:
    """conf/cancel.yaml."""

    run: str
    runs: str


def run(config: Any) -> None:
    """Note in the jobs' histories that they are not to be queued again, then end them."""
    for job in named(config.runs, config.run):
        known = entries(job.elements)
        if all(entry.ended for entry in known.values()):
            print(f"{config.run}: job {job.id} has ended already")
            continue
        for chain, element in zip(job.chains(), job.elements, strict=True):
            if element in known and not known[element].ended:
                chain.add("cancelled", element)
        cancel(job.id)
        print(f"{config.run}: job {job.id} ends")
