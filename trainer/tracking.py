"""Where a training run's numbers and pictures go: its log, on the main rank, and a progress bar."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from data.run_directory import RunDirectory
from data.tracking import RunLog, WandbConfig


class Tracker:
    """Writes rows on the main rank; does nothing on the others. A context manager, whose end closes everything.

    Args:
        directory: of the run.
        config: of the run, for W&B; without secrets.
        steps: length of the run, for the progress bar.
        start: the step that the run goes on from.
        wandb: for W&B; None leaves it out.
        is_main: whether this rank writes.

    Raises:
        ConfigError: W&B is to be online, and this machine is not logged in; $WANDB_MODE is no mode.
    """

    def __init__(
        self,
        directory: RunDirectory,
        config: dict[str, Any],
        steps: int,
        start: int,
        wandb: WandbConfig | None,
        is_main: bool,
    ):
        self._log: RunLog | None = None
        self._bar: Any = None
        self._open = ExitStack()
        if not is_main:
            return
        from tqdm import tqdm
        from tqdm.contrib.logging import logging_redirect_tqdm

        self._log = self._open.enter_context(RunLog(directory, config, wandb))
        self._bar = self._open.enter_context(
            tqdm(total=steps, initial=start, desc=directory.path.name, unit="step", dynamic_ncols=True)
        )
        self._open.enter_context(logging_redirect_tqdm())  # a log's line goes above the bar, not into it

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, traceback)

    def advance(self, step: int) -> None:
        """Move the progress bar to `step` steps taken."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def log(self, row: Mapping[str, Any]) -> None:
        """Write a row of numbers; it holds "step"."""
        if self._log is None:
            return
        self._log.log(row)
        shown = {k: f"{row[k]:.4g}" for k in ("loss", "val/loss", "samples_per_s") if row.get(k) is not None}
        self._bar.set_postfix(shown, refresh=False)

    def log_image(self, name: str, path: Path, step: int) -> None:
        """Show a picture in W&B."""
        if self._log is not None:
            self._log.log_image(name, path, step)
