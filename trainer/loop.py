"""The training loop: fetch, phases, step, callbacks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from data.batch import Batch
from trainer.engines.base import Engine
from trainer.meter import Meter
from trainer.objectives.base import Objective, Phase


class Loader(Protocol):
    """Serves this rank's lanes."""

    def step(self, step: int) -> list[Batch]:
        """The slices of `step`, in lane order; any step may follow any other."""


class Callback(Protocol):
    """Something that happens between steps, the same on every rank."""

    def after_step(self, step: int) -> None:
        """Called when `step` steps have been taken."""


@dataclass
class Run:
    """What the loop turns over.

    Args:
        steps: length of the run.
        global_batch: samples in a step, over all ranks.
        arrange: slices of a step -> passes; must give every rank the same number of passes.
        learning_rate: of a phase at a step, counted from 0.
        meter: collects losses and norms for the log.
        callbacks: after each step, in this order.
        patience: so many steps in a row without a finite gradient are rolled back.
        roll_back: given those steps, restores the last checkpoint, notes that they are to be skipped from now on, and
            returns the step to go on from.
        stopping: whether all ranks are to stop after this step (a signal was received).
        skipped_steps: steps to pass over. They go by like steps whose gradient was not finite: without an update, but
            with callbacks (averages take the unchanged weights in, checkpoints and validation that are due happen).
        bad_steps: those without a finite gradient up to now, in a row. While there are any, nothing should be saved:
            a roll-back goes to before them.
    """

    objective: Objective
    engine: Engine
    loader: Loader
    steps: int
    global_batch: int
    arrange: Callable[[list[Batch]], list[Batch]]
    learning_rate: Callable[[Phase, int], float]
    meter: Meter
    callbacks: Sequence[Callback]
    patience: int
    roll_back: Callable[[list[int]], int]
    stopping: Callable[[], bool]
    skipped_steps: set[int] = field(default_factory=set)
    bad_steps: list[int] = field(default_factory=list)


def fit(run: Run, step: int) -> int:
    """Train from `step` to the end, or until asked to stop. Returns the number of steps taken."""
    while step < run.steps:
        if step not in run.skipped_steps:
            run.bad_steps = [] if take_step(run, step) else [*run.bad_steps, step]
        step += 1
        if len(run.bad_steps) >= run.patience:
            step, run.bad_steps = run.roll_back(run.bad_steps), []
            continue
        for callback in run.callbacks:
            callback.after_step(step)
        if run.stopping():
            break
    return step


def take_step(run: Run, step: int) -> bool:
    """All phases of one step that have begun. Returns whether every gradient was finite."""
    passes = run.arrange(run.loader.step(step))
    finite = [take_phase(run, phase, step, passes) for phase in run.objective.phases if step >= phase.start]
    return all(finite)


def take_phase(run: Run, phase: Phase, step: int, passes: Sequence[Batch]) -> bool:
    """One phase of one step: a gradient over all passes and ranks, and an update. Returns whether it was finite."""
    lr = run.learning_rate(phase, step)
    for number, batch in enumerate(passes):
        with run.engine.accumulating(phase, last=number == len(passes) - 1):
            losses = run.objective.losses(phase, run.engine.networks, batch)
            run.engine.backward(phase, losses.per_sample.sum() / run.global_batch)
        run.meter.add_losses(phase, losses)
    result = run.engine.step(phase, lr)
    run.meter.add_step(phase, lr, result)
    return not result.skipped
