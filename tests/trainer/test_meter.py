"""The numbers of a row, against sums over all samples of all ranks."""

import time

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.trainer.ranks import ranks
from trainer.engines.base import StepResult
from trainer.meter import TIMESTEP_BINS, Meter
from trainer.objectives.base import Losses, Phase

PHASES = (Phase("generator", ("g",)), Phase("discriminator", ("d",)))
CPU = torch.device("cpu")


def samples_of(rank: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Losses and times of a rank's pass; one bin is nobody's, and 1.0 belongs to the last."""
    rng = np.random.default_rng(10 * rank + step)
    t = rng.uniform(0, 0.3, 5) if rank == 0 else rng.uniform(0.5, 1.0, 5)
    t[-1] = 0.0 if rank == 0 else 1.0
    return rng.normal(size=5).astype(np.float32), t.astype(np.float32)


def metered_row() -> dict:
    rank = dist.get_rank()
    meter = Meter(PHASES, global_batch=10, device=CPU)
    meter.flops_per_sample, meter.peak_flops = 6.0, 3.0
    for step in range(3):
        losses, t = (torch.from_numpy(values) for values in samples_of(rank, step))
        # What is logged may depend on what a rank was served.
        logs = {"accuracy": losses.abs()} if rank == 1 else {"margin": losses + 1, "accuracy": losses.abs()}
        meter.add_losses(PHASES[0], Losses(losses, t, logs))
        meter.add_losses(PHASES[1], Losses(-losses))
        for phase in PHASES:
            meter.add_step(phase, lr=0.1 * (step + 1), result=StepResult(grad_norm=float(step), skipped=False))
    meter.add_wait(1000.0)
    row = meter.row(3)
    assert meter.steps == 0
    row_after = meter.row(4)
    nothing = {f"{prefix}{name}": None for prefix in ("", "discriminator/") for name in ("loss", "grad_norm", "lr")}
    assert row_after | nothing == row_after, "the next row begins anew, and lacks no key"
    return row


def test_a_row_averages_over_all_samples_of_all_ranks_whatever_each_logged():
    first, second = ranks(2).run(metered_row)
    parts = [samples_of(rank, step) for rank in (0, 1) for step in range(3)]
    losses, times = (np.concatenate(values) for values in zip(*parts, strict=True))
    alone = np.concatenate([samples_of(0, s)[0] for s in range(3)])
    bins = np.minimum((times * TIMESTEP_BINS).astype(int), TIMESTEP_BINS - 1)
    wanted = {
        "loss": losses.mean(),
        "discriminator/loss": -losses.mean(),
        "generator/accuracy": np.abs(losses).mean(),
        "generator/margin": alone.mean() + 1,
        "grad_norm": 1.0,
        "discriminator/grad_norm": 1.0,
        "lr": 0.3,
    }
    wanted |= {f"loss_by_t/{i}": losses[bins == i].mean() if (bins == i).any() else None for i in range(TIMESTEP_BINS)}
    assert None in wanted.values()
    for row in (first, second):
        for name, value in wanted.items():
            assert row[name] == (None if value is None else pytest.approx(value, rel=1e-6)), name
        assert row["mfu"] == pytest.approx(2 * row["samples_per_s"])
    assert list(first) == list(second)
    assert first["data_wait"] == second["data_wait"] > 1


def test_a_pause_does_not_count_as_training():
    meter = Meter(PHASES, global_batch=10, device=CPU)
    meter.add_step(PHASES[0], 0.1, StepResult(1.0, skipped=False))
    with meter.pause():
        time.sleep(0.5)
    assert meter.row(1)["samples_per_s"] > 10 / 0.4
    meter.add_step(PHASES[0], 0.1, StepResult(1.0, skipped=False))
    time.sleep(0.5)
    assert meter.row(2)["samples_per_s"] <= 10 / 0.5
