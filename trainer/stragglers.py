"""Which rank the others wait for.

Ranks take their steps in lockstep: measured by the clock, all are as slow as the slowest. But torch notes when a rank
enters a collective, and nobody leaves it before the last one has come. What a rank has waited for others is thus known
from the moments at which all of them entered, and the rest of its time is its own.
"""

import json
import statistics
import time

import torch
import torch.distributed as dist

from trainer.distributed import collectives, flight_record


class Stragglers:
    """Looks at the collectives since the last `row`, or since `restart`.

    On a GPU the moments are those at which the host enqueues a collective: seen are slow hosts and slow data. A GPU
    that computes slowly holds its host up only at the end of each step.

    Args:
        device: on which ranks compare their times.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self.restart()

    def restart(self) -> None:
        """Forget the collectives so far: those of a checkpoint or of validation are no step's."""
        self._before = collectives()

    def row(self) -> dict[str, float | int]:
        """`slowest_rank` and `slowest_over_median`, its own time by the ranks' median; collective. Empty for one rank,
        and where torch keeps no record."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return {}
        entered = _entered(collectives() - self._before)
        count = torch.tensor(len(entered), device=self._device)
        dist.all_reduce(count, dist.ReduceOp.MIN)
        # All ranks leave that at once, whatever their clocks say: from here on, seconds are counted from this moment.
        now = time.time()
        kept = int(count)
        if kept < 2:
            return {}
        own = torch.tensor(entered[-kept:], dtype=torch.float64, device=self._device) - now
        last = own.clone()
        dist.all_reduce(last, dist.ReduceOp.MAX)
        # From when a collective let everyone go to when this rank entered the next one; at once, if it did not wait.
        spent = (own[1:] - last[:-1]).clamp(min=0).sum()
        spent_by = [torch.zeros_like(spent) for _ in range(dist.get_world_size())]
        dist.all_gather(spent_by, spent)
        times = [float(seconds) for seconds in spent_by]
        median = statistics.median(times)
        if median <= 0:
            return {}
        return {"slowest_rank": times.index(max(times)), "slowest_over_median": max(times) / median}


def _entered(count: int) -> list[float]:
    """When this rank entered its last `count` collectives, or as many of them as torch remembers: Unix time."""
    entries = json.loads(flight_record() or b"{}").get("entries", [])
    times = [entry["time_created_ns"] / 1e9 for entry in entries if not entry["is_p2p"]]
    return times[max(0, len(times) - count) :]
