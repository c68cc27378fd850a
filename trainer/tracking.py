"""Where a run's numbers and pictures go: metrics.jsonl always, a progress bar, and W&B."""

import json
import logging
import math
import os
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args

from trainer.run_directory import RunDirectory

log = logging.getLogger(__name__)

WandbMode = Literal["auto", "online", "offline", "disabled"]


@dataclass(frozen=True)
class WandbConfig:
    """`log.wandb` of conf/train.yaml.

    Args:
        project, entity, group, tags: as W&B has them.
        mode: "auto" is online where this machine is logged in and W&B answers, else offline: nothing is ever asked for.
    """

    project: str = "millrace"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    mode: WandbMode = "auto"


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
        ValueError: W&B is to be online, and this machine is not logged in; $WANDB_MODE is no mode.
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
        self._directory = directory
        self._wandb: _Wandb | None = None
        self._bar: Any = None
        self._open = ExitStack()
        if not is_main:
            return
        from tqdm import tqdm
        from tqdm.contrib.logging import logging_redirect_tqdm

        if wandb is not None:
            self._wandb = self._open.enter_context(_Wandb(directory, config, wandb))
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
        if self._bar is None:
            return
        with self._directory.metrics.open("a") as file:
            finite = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in row.items()}
            file.write(json.dumps(finite) + "\n")
        shown = {k: f"{row[k]:.4g}" for k in ("loss", "val/loss", "samples_per_s") if row.get(k) is not None}
        self._bar.set_postfix(shown, refresh=False)
        if self._wandb is not None:
            self._wandb.log({k: v for k, v in row.items() if v is not None})

    def log_image(self, name: str, path: Path, step: int) -> None:
        """Show a picture in W&B."""
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Image(str(path)), "step": step})


class _Wandb:
    """One W&B run for the life of a run directory, however often the run is resumed.

    W&B drops what is logged at an internal step that is not larger than the last one's. A run that goes back to a
    checkpoint logs steps again, so the internal step merely counts what was logged, in `wandb.json` beside the run's
    identity, and plots are drawn over the rows' own "step".
    """

    def __init__(self, directory: RunDirectory, config: dict[str, Any], settings: WandbConfig):
        import wandb

        logging.getLogger("wandb").setLevel(logging.ERROR)
        self._file = directory.wandb
        self._id, self._logged = uuid.uuid4().hex, 0
        if self._file.exists():
            known = json.loads(self._file.read_text())
            self._id, self._logged = known["id"], known["logged"]

        def start(mode: Any) -> Any:
            return wandb.init(
                dir=str(directory.path),
                name=directory.path.name,
                id=self._id,
                resume="allow" if mode == "online" else None,
                config=config,
                allow_val_change=True,
                mode=mode,
                project=settings.project,
                entity=settings.entity,
                group=settings.group,
                tags=list(settings.tags),
                # W&B's metadata holds the command line, and that may hold a secret which `config` has masked.
                settings=wandb.Settings(silent=True, console="off", x_save_requirements=False, x_disable_meta=True),
            )

        try:
            self._run = start(_resolved(settings.mode))
        except wandb.errors.CommError as error:
            if settings.mode != "auto":
                raise
            log.warning("W&B does not answer, and is written offline from here on: %s", error)
            wandb.teardown()
            self._run = start("offline")
        self._run.define_metric("*", step_metric="step")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._run.finish(exit_code=int(kind is not None))

    def log(self, row: Mapping[str, Any]) -> None:
        """Log a row, which holds "step"."""
        self._logged += 1
        # Before W&B has it: a number that a crash leaves out is harmless, one given twice loses a row.
        scratch = self._file.with_suffix(".tmp")
        scratch.write_text(json.dumps({"id": self._id, "logged": self._logged}))
        scratch.replace(self._file)
        self._run.log(dict(row), step=self._logged)


def _resolved(mode: str) -> str:
    """ "auto" becomes "online" or "offline"; WANDB_MODE decides where it is set.

    Raises:
        ValueError: "online" without a login, for which W&B would ask; $WANDB_MODE is no mode.
    """
    import wandb

    if mode == "auto":
        mode = os.environ.get("WANDB_MODE", "auto")
        if mode not in get_args(WandbMode):
            raise ValueError(f"WANDB_MODE={mode!r} in the environment: one of {', '.join(get_args(WandbMode))}")
    if mode not in ("auto", "online"):
        return mode
    wandb.setup(wandb.Settings(silent=True))
    if wandb.login(prompt=False, verify=False):
        return "online"
    if mode == "online":
        raise ValueError("W&B's mode is online, and this machine is not logged in: run `wandb login`, or choose auto")
    return "offline"
