"""What a run tells of itself: rows in its metrics.jsonl, and the same in W&B, where pictures and tables go too."""

import io
import json
import logging
import math
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args

from PIL import Image

from conf.errors import ConfigError
from conf.secrets import without_secrets
from data.run_directory import RunDirectory, check_name

log = logging.getLogger(__name__)

WandbMode = Literal["auto", "online", "offline", "disabled"]


@dataclass(frozen=True)
class WandbConfig:
    """`log.wandb` of a job's config.

    Args:
        project, entity, group, tags: as W&B has them.
        mode: "auto" is online where this machine is logged in and W&B answers, else offline: nothing is ever asked for.
    """

    project: str = "millrace"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    mode: WandbMode = "auto"


@dataclass(frozen=True)
class LogConfig:
    """`log` of a job that trains nothing."""

    wandb: WandbConfig | None = field(default_factory=WandbConfig)


class RunLog:
    """Appends rows to a run's metrics.jsonl, and gives them to W&B. A context manager, whose end closes everything.

    Args:
        directory: of the run.
        config: of the run, for W&B; without secrets.
        wandb: for W&B; None leaves it out.
        axis: the key, in every row, that W&B draws plots over.
        name: of the run in W&B; that of its folder if None.

    Raises:
        ConfigError: W&B is to be online, and this machine is not logged in; $WANDB_MODE is no mode.
    """

    def __init__(
        self,
        directory: RunDirectory,
        config: dict[str, Any],
        wandb: WandbConfig | None,
        axis: str = "step",
        name: str | None = None,
    ) -> None:
        self._metrics, self._axis = directory.metrics, axis
        self._wandb = None if wandb is None else _Wandb(directory, config, wandb, axis, name or directory.path.name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._wandb is not None:
            self._wandb.close(failed=kind is not None)

    def log(self, row: Mapping[str, Any]) -> None:
        """Write a row of numbers; it holds the axis."""
        with self._metrics.open("a") as file:
            finite = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in row.items()}
            file.write(json.dumps(finite) + "\n")
        if self._wandb is not None:
            self._wandb.log({k: v for k, v in row.items() if v is not None})

    def log_image(self, name: str, picture: Path | bytes, at: int, caption: str | None = None) -> None:
        """Show a picture, of a file or encoded, in W&B, at a place of the axis."""
        if self._wandb is not None:
            import wandb

            shown = Image.open(io.BytesIO(picture)) if isinstance(picture, bytes) else str(picture)
            self._wandb.log({name: wandb.Image(shown, caption=caption), self._axis: at})

    def log_table(self, name: str, header: Sequence[str], rows: Sequence[Sequence[Any]], at: int) -> None:
        """Show a table in W&B, at a place of the axis."""
        if self._wandb is not None:
            import wandb

            table = wandb.Table(columns=list(header), data=[list(row) for row in rows])
            self._wandb.log({name: table, self._axis: at})


def job_log(config: Any, part: str | None = None) -> RunLog:
    """The log of a job that trains nothing, over the samples that are done, in its run directory, whose config it
    writes.

    Args:
        config: of the job; has `name`, `runs` and `log.wandb`.
        part: of a run that has several: it gets a folder in that of the run, and a W&B run of its own, grouped by the
            run's name.

    Raises:
        ConfigError: see `RunLog`; or the folder cannot be made.
    """
    from omegaconf import OmegaConf

    check_name(config.name)
    directory = RunDirectory(config.runs, config.name if part is None else f"{config.name}/{part}")
    plain: dict[str, Any] = without_secrets(OmegaConf.to_container(config))
    directory.write_config(plain)
    wandb = None if config.log.wandb is None else WandbConfig(**config.log.wandb)
    if part is None:
        return RunLog(directory, plain, wandb, "samples")
    if wandb is not None:
        wandb = replace(wandb, group=wandb.group or config.name)
    return RunLog(directory, plain, wandb, "samples", f"{config.name} {part}")


class _Wandb:
    """One W&B run for the life of a run directory, however often the run is resumed.

    W&B drops what is logged at an internal step that is not larger than the last one's. A run that goes back to a
    checkpoint logs steps again, so the internal step merely counts what was logged, in `wandb.json` beside the run's
    identity, and plots are drawn over the rows' own `axis`.
    """

    def __init__(
        self, directory: RunDirectory, config: dict[str, Any], settings: WandbConfig, axis: str, name: str
    ) -> None:
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
                name=name,
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
            self._run = start(resolved(settings.mode))
        except wandb.errors.CommError as error:
            if settings.mode != "auto":
                raise
            log.warning("W&B does not answer, and is written offline from here on: %s", error)
            wandb.teardown()
            self._run = start("offline")
        self._run.define_metric("*", step_metric=axis)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))

    def log(self, row: Mapping[str, Any]) -> None:
        """Log a row, which holds the axis."""
        self._logged += 1
        # Before W&B has it: a number that a crash leaves out is harmless, one given twice loses a row.
        scratch = self._file.with_suffix(".tmp")
        scratch.write_text(json.dumps({"id": self._id, "logged": self._logged}))
        scratch.replace(self._file)
        self._run.log(dict(row), step=self._logged)


def resolved(mode: str) -> str:
    """ "auto" becomes "online" or "offline"; WANDB_MODE decides where it is set.

    Raises:
        ConfigError: "online" without a login, for which W&B would ask; $WANDB_MODE is no mode.
    """
    import wandb

    if mode == "auto":
        mode = os.environ.get("WANDB_MODE", "auto")
        if mode not in get_args(WandbMode):
            raise ConfigError(f"WANDB_MODE={mode!r} in the environment: one of {', '.join(get_args(WandbMode))}")
    if mode not in ("auto", "online"):
        return mode
    wandb.setup(wandb.Settings(silent=True))
    if wandb.login(prompt=False, verify=False):
        return "online"
    if mode == "online":
        raise ConfigError("W&B's mode is online, and this machine is not logged in: run `wandb login`, or choose auto")
    return "offline"
