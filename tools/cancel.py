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
    # Those that follow others first: they would start.
    jobs = sorted(named(config.runs, config.run), key=lambda job: job.number, reverse=True)
    known = entries(element for job in jobs for element in job.elements)
    for job in jobs:
        name = job.folder.relative_to(config.runs)
        if all(known[element].ended for element in job.elements if element in known):
            print(f"{name}: job {job.id} has ended already")
            continue
        for chain, element in zip(job.chains(), job.elements, strict=True):
            if element in known and not known[element].ended:
                chain.add("cancelled", element)
        cancel(job.id)
        print(f"{name}: job {job.id} ends")
