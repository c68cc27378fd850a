"""What a run resumes from, saved and restored as one: weights, optimiser, averages, plan, skipped steps."""

import logging
from collections.abc import Callable
from typing import Any

from data.plan import Plan, PlanSegments
from trainer.checkpoint import Checkpointer, Record, read_record
from trainer.ema import Ema
from trainer.engines.base import Engine
from trainer.neighbour_models import check_models
from trainer.resume import resume_run, save_run

log = logging.getLogger(__name__)


class RunState:
    """The state of a run at step 0, until `restore` finds a checkpoint.

    Args:
        engine, ema: hold the tensors; the averages are attached.
        checkpointer: of the run.
        plan_from: makes the data plan that begins at a step, from the configuration of now.
        config: kept in checkpoints, to look at.
        replan: whether to follow a new plan where the configuration's is not the checkpoint's.
    """

    def __init__(
        self,
        engine: Engine,
        ema: Ema,
        checkpointer: Checkpointer,
        plan_from: Callable[[int], Plan],
        config: dict[str, Any],
        replan: bool,
    ):
        self.engine, self.ema, self.checkpointer = engine, ema, checkpointer
        self.step = 0
        self.segments = PlanSegments.begin(plan_from)
        self.skipped: set[int] = set()
        self._plan_from, self._config, self._replan = plan_from, config, replan

    def restore(self) -> bool:
        """Take the newest whole checkpoint's state; False, and nothing changes, where there is none. Collective.

        Raises:
            ConfigError: samples have neighbours in a database of another model.
            ValueError: the data plan is another than the checkpoint's, and `replan` is off.
            CheckpointError: the checkpoint does not fit this run.
        """
        path = self.checkpointer.latest().path
        if path is None:
            return False
        check_models(read_record(path).config, self._config)
        record = resume_run(self.checkpointer, path, self.engine, self.ema, verify=False)  # `latest` has verified it
        self.segments = PlanSegments.resume(record.plan["segments"], record.step, self._plan_from, self._replan)
        self.step = record.step
        self.skipped.update(record.skipped_steps)
        log.info("resuming %s", path)
        return True

    def save(self, step: int) -> None:
        """Write the checkpoint after `step` steps. Collective; in the background where the policy says so."""
        self.step = step
        plan = {"fingerprint": self.segments.plan.fingerprint, "segments": self.segments.record}
        record = Record(step, self._config, plan, skipped_steps=sorted(self.skipped))
        save_run(self.checkpointer, record, self.engine, self.ema)

    def roll_back(self, bad: list[int]) -> int:
        """Return to the newest checkpoint, and pass over the steps `bad` from now on. Collective.

        Raises:
            ValueError: there is no checkpoint, or none from before those steps.
        """
        bad_steps = f"{len(bad)} steps in a row ({bad[0]} to {bad[-1]}) had no finite gradient"
        path = self.checkpointer.latest().path
        if path is None:
            raise ValueError(f"{bad_steps}, and there is no checkpoint to go back to: lower the learning rate")
        self.skipped.update(bad)
        record = resume_run(self.checkpointer, path, self.engine, self.ema, verify=False)
        self.step = record.step
        if self.step > bad[0]:
            raise ValueError(
                f"{bad_steps}, and the newest checkpoint, {path}, is from among them: remove it to go on from the one"
                " before, and lower the learning rate"
            )
        log.warning("%s: back to step %d, and past them from now on", bad_steps, self.step)
        return self.step
