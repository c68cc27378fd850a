"""What happens after which step."""

import time

import torch

from data.run_directory import RunDirectory, read_jsonl
from trainer.callbacks import Every, Log, due
from trainer.engines.base import StepResult
from trainer.meter import Meter
from trainer.objectives.base import Losses, Phase
from trainer.tracking import Tracker

PHASE = Phase("denoise", ("denoiser",))


def test_due_at_multiples_and_at_the_end():
    assert [step for step in range(1, 11) if due(step, 4, 10)] == [4, 8, 10]
    assert not any(due(step, None, 10) for step in range(1, 11))


def test_a_row_every_so_often_and_where_validation_happens(tmp_path):
    directory = RunDirectory(str(tmp_path), "run")
    meter = Meter((PHASE,), global_batch=2, device=torch.device("cpu"))
    updates = {"denoise": 0}

    def validate() -> dict[str, float]:
        time.sleep(0.3)
        return {"val/loss": 7.0}

    with Tracker(directory, {}, 7, 0, None, is_main=True) as tracker:
        log = Log(meter, tracker, lambda: updates, 7, 3, validate, validate_every=5)
        for step in range(1, 8):
            meter.add_losses(PHASE, Losses(torch.full((2,), float(step))))
            meter.add_step(PHASE, 0.1, StepResult(1.0, skipped=step == 2))
            updates["denoise"] += step != 2
            log.after_step(step)
    rows = read_jsonl(directory.metrics)
    assert [row["step"] for row in rows] == [3, 5, 6, 7]
    assert [row["loss"] for row in rows] == [2.0, 4.5, 6.0, 7.0], "each the mean since the row before"
    assert [row.get("val/loss") for row in rows] == [None, 7.0, None, 7.0]
    assert [row["skipped_steps"] for row in rows] == [1, 1, 1, 1]
    assert [row["samples"] for row in rows] == [4, 8, 10, 12], "of the steps that updated weights"
    assert rows[2]["samples_per_s"] > 2 / 0.3, "validation's time is not training's"


def test_every_acts_when_due_outside_the_meters_clock():
    meter = Meter((PHASE,), global_batch=1, device=torch.device("cpu"))
    acted: list[int] = []

    def act(step: int) -> None:
        acted.append(step)
        time.sleep(0.1)

    callback = Every(act, 4, 10, meter)
    for step in range(1, 11):
        meter.add_step(PHASE, 0.1, StepResult(1.0, skipped=False))
        callback.after_step(step)
    assert acted == [4, 8, 10]
    assert meter.row(10)["samples_per_s"] > 10 / 0.3
