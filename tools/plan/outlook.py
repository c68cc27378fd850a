"""From an estimate and a device to time, cost and a verdict; as text and as plain values."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tools.plan.estimate import Estimate

_GIB = 1 << 30
# What each kind of bytes is, in the order of the text.
_KINDS = {
    "weights": "weights, in the compute type",
    "masters": "weights, float32",
    "gradients": "gradients, float32",
    "moments": "optimizer moments, float32",
    "averages": "averages (EMA), float32",
    "frozen": "frozen networks",
    "gathered": "gathered weights, buffers of collectives",
    "activations": "activations (compiled blocks keep less)",
    "batch": "samples",
}


@dataclass(frozen=True)
class Outlook:
    """An estimate on some device.

    Args:
        estimate: of the run.
        device: name of the device.
        memory: bytes of it.
        headroom: share of it that stays free.
        peak_flops: FLOP/s of it.
        mfu: share of these that the run reaches.
        sample_bytes: of a sample in storage.
        assumed: whether these are assumed.
        price: of a GPU for an hour.
        advice: what to change where it does not fit.
    """

    estimate: Estimate
    device: str
    memory: int
    headroom: float
    peak_flops: float
    mfu: float
    sample_bytes: float
    assumed: bool
    price: float | None
    advice: Sequence[str]

    @property
    def fits(self) -> bool:
        """Whether it fits."""
        return self.estimate.fits(self.memory, self.headroom)

    @property
    def step_seconds(self) -> float:
        """A step's time; 0 where the objective counts no FLOPs."""
        return self.estimate.model_flops / (self.mfu * self.peak_flops * self.estimate.ranks)

    @property
    def hours(self) -> float:
        """The run's time, of training alone."""
        return self.step_seconds * self.estimate.steps / 3600

    @property
    def samples_per_second(self) -> float:
        """All ranks together."""
        return self.estimate.batch / self.step_seconds if self.step_seconds else 0.0

    def plain(self) -> dict[str, Any]:
        """Everything as values that JSON takes."""
        values = asdict(self) | {"fits": self.fits, "bytes_per_rank": self.estimate.bytes_per_rank}
        values["estimate"]["bucket"] = str(self.estimate.bucket)
        gpu_hours = self.hours * self.estimate.ranks
        return values | {
            "step_seconds": self.step_seconds,
            "samples_per_second": self.samples_per_second,
            "read_bytes_per_second": self.samples_per_second * self.sample_bytes,
            "hours": self.hours,
            "gpu_hours": gpu_hours,
            "cost": gpu_hours * self.price if self.price is not None else None,
        }

    def __str__(self) -> str:
        known = self.estimate
        lines = [
            f"{known.name}: {known.ranks} ranks on {self.device}, a batch of {known.batch} ({known.passes} x"
            f" {known.pass_size} a rank), all at the largest shape, {known.bucket}",
            "",
            f"{'parameters':<44}{'trained':>16}{'frozen':>16}",
            *(f"  {name:<42}{counts[0]:>16,}{counts[1]:>16,}" for name, counts in known.parameters.items()),
            "",
            f"{'memory of a rank at its peak':<44}{'GiB':>16}",
            *(f"  {what:<42}{known.bytes[kind] / _GIB:>16.2f}" for kind, what in _KINDS.items() if kind in known.bytes),
            f"  {'together':<42}{known.bytes_per_rank / _GIB:>16.2f}",
            *(f"  on the host: {_KINDS[kind]:<29}{size / _GIB:>16.2f}" for kind, size in known.host_bytes.items()),
            "",
            self._verdict(),
            *(f"  {advice}" for advice in self.advice),
            "",
            "a step",
            f"  {'FLOPs of the formulas':<42}{known.model_flops:>16.3g}",
            f"  {'FLOPs counted: recomputation, encoders too':<42}{known.executed_flops:>16.3g}",
            *(f"  {name + ': a rank receives, GB':<42}{size / 1e9:>16.2f}" for name, size in known.traffic.items()),
        ]
        return "\n".join([*lines, *self._time()])

    def _verdict(self) -> str:
        held, room = self.estimate.bytes_per_rank / _GIB, (1 - self.headroom) * self.memory / _GIB
        total = self.memory / _GIB
        words = f"{held:.1f} GiB of {room:.1f} ({total:.0f} GiB less {self.headroom:.0%} for what cannot be told)"
        return f"fits: {words}" if self.fits else f"does not fit: {words}; what may help:"

    def _time(self) -> list[str]:
        if not self.step_seconds:
            return ["", "the objective counts no FLOPs: no times"]
        plain = self.plain()
        lines = [
            f"  {f'seconds at {self.mfu:.0%} MFU':<42}{self.step_seconds:>16.3g}",
            f"  {'samples/s':<42}{self.samples_per_second:>16,.0f}",
            f"  {'MB/s from storage':<42}{plain['read_bytes_per_second'] / 1e6:>16,.0f}"
            f"   ({self.sample_bytes / 1e3:,.0f} kB a sample, {'assumed' if self.assumed else 'by the manifests'})",
            "",
            f"the run: {self.estimate.steps:,} steps, validation, saving and waiting not counted",
            f"  {'hours':<42}{self.hours:>16,.1f}",
            f"  {'GPU-hours':<42}{plain['gpu_hours']:>16,.0f}",
        ]
        return lines + ([f"  {'cost':<42}{plain['cost']:>16,.0f}"] if self.price is not None else [])


def table(rows: Sequence[tuple[str, Outlook | str]]) -> str:
    """A line for each experiment: its figures, or why it cannot be."""
    heads = ("experiment", "trained", "ranks", "GiB/rank", "fits", "EFLOP/step", "s/step", "samples/s", "GPU-hours")
    cells = [(name, *_cells(outlook)) if isinstance(outlook, Outlook) else (name, outlook) for name, outlook in rows]
    whole = [heads, *(row for row in cells if len(row) == len(heads))]
    widths = [max(len(row[i]) for row in whole) for i in range(len(heads))]
    widths[0] = max(widths[0], *(len(row[0]) for row in cells))
    lines = []
    for row in [heads, *cells]:
        first, *others = row
        aligned = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=False)]
        lines.append("  ".join([first.ljust(widths[0]), *(aligned if len(row) == len(heads) else others)]))
    return "\n".join(lines)


def _cells(outlook: Outlook) -> tuple[str, ...]:
    known = outlook.estimate
    trained = sum(counts[0] for counts in known.parameters.values())
    return (
        f"{trained / 1e9:.2f} B" if trained > 1e9 else f"{trained / 1e6:.2f} M",
        str(known.ranks),
        f"{known.bytes_per_rank / _GIB:.1f}",
        "yes" if outlook.fits else "no",
        f"{known.model_flops / 1e18:.3g}",
        f"{outlook.step_seconds:.3g}",
        f"{outlook.samples_per_second:,.0f}",
        f"{outlook.hours * known.ranks:,.0f}",
    )
