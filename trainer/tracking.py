"""Where a run's numbers and pictures go: metrics.jsonl always, a progress bar, and W&B."""

import json
import logging
import math
import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.run_directory import RunDirectory


class Tracker:
    """Writes rows on the main rank; does nothing on the others.

    Args:
        directory: of the run.
        config: of the run, for W&B; without secrets.
        steps: length of the run, for the progress bar.
        start: the step that the run goes on from.
        wandb: project, entity, group, tags and mode for W&B; None leaves it out. The mode "auto" is online where
            this machine is logged in, else offline: nothing is ever asked for.
        is_main: whether this rank writes.
    """

    def __init__(
        self,
        directory: RunDirectory,
        config: dict[str, Any],
        steps: int,
        start: int,
        wandb: Mapping[str, Any] | None,
        is_main: bool,
    ):
        self._directory = directory
        self._wandb: Any = None
        self._bar: Any = None
        if not is_main:
            return
        from tqdm import tqdm

        self._bar = tqdm(total=steps, initial=start, desc=directory.path.name, unit="step", dynamic_ncols=True)
        if wandb is not None:
            self._wandb = _start_wandb(directory, config, wandb)

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
            self._wandb.log({k: v for k, v in row.items() if v is not None}, step=row["step"])

    def log_image(self, name: str, path: Path, step: int) -> None:
        """Show a picture in W&B."""
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        """Flush everything."""
        if self._bar is not None:
            self._bar.close()
        if self._wandb is not None:
            self._wandb.finish()


def _start_wandb(directory: RunDirectory, config: dict[str, Any], settings: Mapping[str, Any]) -> Any:
    import wandb

    logging.getLogger("wandb").setLevel(logging.ERROR)
    options = dict(settings)
    mode = options.pop("mode", "auto")
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "offline")
    return wandb.init(
        dir=str(directory.path),
        name=directory.path.name,
        # The folder is the identity: a resumed run goes on in the same W&B run.
        id=_run_id(directory.path),
        resume="allow" if mode == "online" else None,
        config=config,
        mode=mode,
        settings=wandb.Settings(silent=True, console="off", x_save_requirements=False),
        **options,
    )


def _logged_in() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False


def _run_id(path: Path) -> str:
    import hashlib

    return hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
