"""Collects what a run shows between two lines of its log, without waiting for the device at every step."""

import resource
import sys
import time
from collections import defaultdict

import torch
from torch import Tensor

from trainer.distributed import all_reduce_sum
from trainer.engines.base import StepResult
from trainer.objectives.base import Losses, Phase
from trainer.stragglers import Stragglers

TIMESTEP_BINS = 8
# Of every phase, in every row: null where all steps since the last row were passed over.
_ALWAYS = ("loss", "grad_norm", "lr")


class Meter:
    """Sums of losses, norms and seconds since the last `row`.

    Args:
        phases: of the objective. The first one's loss, learning rate and gradient norm are logged as `loss`, `lr` and
            `grad_norm`; those of others under `<phase>/`.
        global_batch: samples in a step.
        device: of this rank.
    """

    def __init__(self, phases: tuple[Phase, ...], global_batch: int, device: torch.device):
        self.phases = phases
        self.global_batch = global_batch
        self.device = device
        self._stragglers = Stragglers(device)
        self.flops_per_sample: float | None = None
        """Counted FLOPs of training on one sample; None where they are not known, and `mfu` is left out."""
        self.peak_flops: float | None = None
        """Of all ranks' devices together, FLOP/s; None where it is not known."""
        self.restart()

    def add_losses(self, phase: Phase, losses: Losses) -> None:
        """Add a pass's losses."""
        prefix = self._prefix(phase)
        self._add(f"{prefix}loss", losses.per_sample.detach())
        for name, values in losses.logs.items():
            self._add(f"{phase.name}/{name}", values.detach())
        if losses.t is not None:
            self._add_bins(f"{prefix}loss_by_t", losses.per_sample.detach(), losses.t)

    def add_step(self, phase: Phase, lr: float, result: StepResult) -> None:
        """Add the outcome of a phase's update; its norm is already one for all ranks."""
        prefix = self._prefix(phase)
        self._norms[f"{prefix}grad_norm"].append(result.grad_norm)
        self._last[f"{prefix}lr"] = lr
        self._steps += phase is self.phases[0]

    def add_wait(self, seconds: float) -> None:
        """Add time that the loop waited for data."""
        self._waited += seconds

    @property
    def steps(self) -> int:
        """Steps since the last row."""
        return self._steps

    def row(self, step: int) -> dict[str, float | int | None]:
        """The averages over all ranks since the last row; collective, and starts the next one."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elapsed = time.perf_counter() - self._since
        stragglers = self._stragglers.row()
        sums = {f"sum:{name}": float(v) for name, v in self._sums.items()}
        counts = {f"n:{name}": float(v) for name, v in self._counts.items()}
        totals = all_reduce_sum({"data_wait": self._waited, "elapsed": elapsed} | sums | counts, self.device)
        samples = self._steps * self.global_batch
        rate = samples / elapsed
        row: dict[str, float | int | None] = {"step": step}
        row |= {f"{self._prefix(phase)}{name}": None for phase in self.phases for name in _ALWAYS}
        for name in [key.removeprefix("n:") for key in totals if key.startswith("n:")]:
            row[name] = totals[f"sum:{name}"] / totals[f"n:{name}"] if totals[f"n:{name}"] else None
        row |= {name: sum(values) / len(values) for name, values in self._norms.items()}
        row |= self._last
        row |= {
            "samples_per_s": rate,
            "data_wait": totals["data_wait"] / totals["elapsed"],
            "peak_memory_bytes": peak_memory_bytes(self.device),
        }
        if self.flops_per_sample and self.peak_flops:
            row["mfu"] = rate * self.flops_per_sample / self.peak_flops
        row |= stragglers
        self.restart()
        return row

    def restart(self) -> None:
        """Forget everything since the last row; the clock starts now."""
        self._sums: dict[str, float | Tensor] = defaultdict(float)
        self._counts: dict[str, int | Tensor] = defaultdict(int)
        self._norms: dict[str, list[float]] = defaultdict(list)
        self._last: dict[str, float] = {}
        self._steps = 0
        self._waited = 0.0
        self._stragglers.restart()
        self._since = time.perf_counter()

    def pause(self) -> "Pause":
        """Around validation, sampling and checkpoints: time that does not count as training."""
        return Pause(self)

    def _prefix(self, phase: Phase) -> str:
        return "" if phase is self.phases[0] else f"{phase.name}/"

    def _add(self, name: str, values: Tensor) -> None:
        self._sums[name] = self._sums[name] + values.double().sum()
        self._counts[name] += values.numel()

    def _add_bins(self, name: str, values: Tensor, t: Tensor) -> None:
        bins = (t * TIMESTEP_BINS).long().clamp(0, TIMESTEP_BINS - 1)
        sums = torch.zeros(TIMESTEP_BINS, dtype=torch.float64, device=values.device)
        sums.index_add_(0, bins, values.double())
        counts = torch.bincount(bins, minlength=TIMESTEP_BINS)
        for i in range(TIMESTEP_BINS):
            self._sums[f"{name}/{i}"] = self._sums[f"{name}/{i}"] + sums[i]
            self._counts[f"{name}/{i}"] = self._counts[f"{name}/{i}"] + counts[i]


class Pause:
    """Stops a meter's clock while it is entered."""

    def __init__(self, meter: Meter):
        self._meter = meter

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._meter._since += time.perf_counter() - self._start
        self._meter._stragglers.restart()


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this rank has held so far: of its GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
