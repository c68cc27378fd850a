"""What happens between steps. Each is collective: every rank calls it at the same steps."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from trainer.ema import Ema
from trainer.meter import Meter
from trainer.tracking import Tracker


def due(step: int, every: int | None, last: int) -> bool:
    """Whether something that happens every `every` steps, and after the last one, happens after `step` steps."""
    return every is not None and (step % every == 0 or step == last)


@dataclass
class UpdateEma:
    """Takes each step's weights into the averages."""

    ema: Ema

    def after_step(self, step: int) -> None:
        """See `Callback`."""
        self.ema.update(step)


@dataclass
class Log:
    """Writes a row of averages every so many steps; validation joins the row of its step.

    Args:
        updates: optimiser updates so far, by phase. `samples` counts those that were trained on; steps without an
            update are counted in `skipped_steps`.
        validate: gives the validation's numbers; called every `validate_every` steps.
    """

    meter: Meter
    tracker: Tracker
    updates: Callable[[], Mapping[str, int]]
    steps: int
    every: int
    validate: Callable[[], dict[str, float]] | None = None
    validate_every: int | None = None

    def after_step(self, step: int) -> None:
        """See `Callback`."""
        validating = self.validate is not None and due(step, self.validate_every, self.steps)
        if validating or due(step, self.every, self.steps):
            updates, phases = self.updates(), self.meter.phases
            skipped = max(max(step - phase.start, 0) - updates[phase.name] for phase in phases)
            row: dict[str, Any] = self.meter.row(step)
            row |= {"samples": (step - skipped) * self.meter.global_batch, "skipped_steps": skipped}
            if validating and self.validate is not None:
                with self.meter.pause():
                    row |= self.validate()
            self.tracker.log(row)
        self.tracker.advance(step)


@dataclass
class Every:
    """Does something every so many steps, outside the meter's clock."""

    act: Callable[[int], None]
    every: int | None
    steps: int
    meter: Meter

    def after_step(self, step: int) -> None:
        """See `Callback`."""
        if due(step, self.every, self.steps):
            with self.meter.pause():
                self.act(step)


def averaged(ema: Ema, length: str | None) -> AbstractContextManager[None]:
    """The networks under an average's weights, or under their own for None."""
    return ema.swapped(length) if length else nullcontext()
