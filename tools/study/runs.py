"""The runs of a study, composed as `millrace train` would compose them, and how far each of them is."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import yaml
from omegaconf import OmegaConf

from conf.compose import compose
from conf.errors import ConfigError
from conf.schema import check, defaults
from conf.secrets import without_secrets
from data.run_directory import read_jsonl, saved_step
from slurm.chain import Chain
from tools.study.cost import Cost, cost_of
from tools.study.design import Point, Study
from tools.study.pool import Command
from tools.study.results import Result
from tools.study.sheet import Table, figures
from tools.study.stages import Evaluation
from tools.submitted import CHAIN
from trainer.config import Config, preflight

EVALUATION = "evaluation.jsonl"
State = Literal["finished", "begun", "new"]
# Keys that may differ between a run and what it would be composed of now: they do not change what it ends with.
_FREE = ("runs", "cluster", "log", "checkpoint", "samples", "device", "threads", "hang_timeout", "rehearse")


@dataclass(frozen=True)
class StudyRun:
    """A run of a study.

    Args:
        point: where it stands.
        overrides: what `millrace train` is given.
        folder: of the run.
        config: composed and checked.
        cost: of the whole run.
    """

    point: Point
    overrides: list[str]
    folder: Path
    config: Any
    cost: Cost

    @property
    def command(self) -> Command:
        """That starts it, or goes on with it."""
        return Command(self.point.name, ["train", *self.overrides], self.folder / "logs" / "study.log")

    @property
    def steps_taken(self) -> int:
        """Steps that the run has logged."""
        rows = self.rows()
        return int(rows[-1]["step"]) if rows else 0

    def rows(self) -> list[dict[str, Any]]:
        """Of its metrics.jsonl so far."""
        metrics = self.folder / "metrics.jsonl"
        return read_jsonl(metrics) if metrics.exists() else []

    @property
    def state(self) -> State:
        """A run is finished when its last step is logged and, unless its checkpoints were removed, saved."""
        if not (self.folder / "config.yaml").exists():
            return "new"
        saved = saved_step(self.folder) == self.config.steps
        removed = not any((self.folder / "checkpoints").glob("step_*"))
        return "finished" if self.steps_taken == self.config.steps and (saved or removed) else "begun"

    def evaluation(self) -> list[dict[str, Any]]:
        """Rows of its evaluation; none before there was one."""
        file = self.folder / EVALUATION
        return read_jsonl(file) if file.exists() else []

    def told(self, reason: str | None = None) -> str:
        """How far the run is, in words; of one that failed, why: by `reason`, or by what SLURM's jobs have noted."""
        state = self.state
        if state == "finished":
            return state
        ends = [row for row in Chain(self.folder / CHAIN).rows() if row["event"] in ("ended", "given up")]
        reason = reason or (ends[-1].get("reason") if ends else None)
        if reason:
            return f"failed: {reason}"
        return "not started" if state == "new" else f"{self.steps_taken} of {self.config.steps} steps taken"

    def result(self, study: Study, reason: str | None = None) -> Result:
        """The run's row.

        Args:
            study: that it belongs to.
            reason: why it failed, where it did.
        """
        rows, settings = self.rows(), self.evaluation()
        values: dict[str, float] = {
            "parameters": self.cost.parameters,
            "steps": self.config.steps,
            "samples": self.cost.samples,
            "flops": self.cost.flops,
        }
        values |= {name: float(OmegaConf.select(self.config, key)) for name, key in study.settings.items()}
        if rows:
            values["hours"] = hours_of(rows)
        values |= {name: value for name, measure in study.measure.items() if (value := measure.of(rows)) is not None}
        if study.evaluate is not None and settings:
            values |= {name: fmean(row[name] for row in settings) for name in study.evaluate.columns()}
        at = self.point
        return Result(at.name, at.labels, at.seed, at.held_out, self.told(reason), self.folder, values, settings)


def hours_of(rows: Sequence[Mapping[str, Any]]) -> float:
    """Hours spent on training, told from the rows' speeds: without validation, sampling and checkpoints."""
    seconds, before = 0.0, 0
    for row in rows:
        if row.get("samples_per_s"):
            seconds += (row["samples"] - before) / row["samples_per_s"]
        before = row["samples"]
    return seconds / 3600


def evaluate_run(folder: Path, evaluation: Evaluation) -> None:
    """Evaluate the run in a folder; its rows appear all at once."""
    scratch = (folder / EVALUATION).with_suffix(".tmp")
    scratch.write_text("".join(json.dumps(row) + "\n" for row in evaluation.evaluate(folder)))
    scratch.replace(folder / EVALUATION)


def compose_runs(study: Study, runs: str, overrides: Sequence[str] = (), here: bool = True) -> list[StudyRun]:
    """Compose every run, and check it as `millrace train` would, before any starts.

    Args:
        runs: folder of runs; the study's lie in `<runs>/<study>/`.
        overrides: further ones of every run, above all of the study's own.
        here: whether they are to be made on this machine: then its devices must be those that they ask for.

    Raises:
        ConfigError: a mistake in a run, which the sentence names; or a folder that holds a run of another
            configuration.
    """
    folder = Path(runs) / study.name
    return [_compose_run(study, point, folder, overrides, here) for point in study.points()]


def _compose_run(study: Study, point: Point, folder: Path, further: Sequence[str], here: bool) -> StudyRun:
    # The group first: a study may turn W&B off.
    overrides = [f"log.wandb.group={study.name}", *point.overrides, *further, f"runs={folder}", f"name={point.name}"]
    try:
        config = compose("train", overrides)
        check(config, Config)
        preflight(config if here else OmegaConf.merge(config, {"device": "auto"}), config.cluster.get("processes", 1))
        cost = cost_of(config)
        _check_settings(study, config)
    except ConfigError as error:
        raise ConfigError(f"run {point.name}: {error}") from error
    run = StudyRun(point, overrides, folder / point.name, config, cost)
    _check_same(run)
    return run


def _check_settings(study: Study, config: Any) -> None:
    for name, key in study.settings.items():
        value = OmegaConf.select(config, key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"study.settings.{name} names {key!r}, which is {value!r}: it takes keys of numbers")


def _check_same(run: StudyRun) -> None:
    """Whether the run that lies in the folder is the one that would be started now."""
    path = run.folder / "config.yaml"
    if not path.exists():
        return
    now = without_secrets(OmegaConf.to_container(run.config))
    differing = next(_differences(yaml.safe_load(path.read_text()), _plain(now), _usual(), ""), None)
    if differing is not None:
        key, there, here = differing
        raise ConfigError(
            f"run {run.point.name}: {run.folder} holds a run with {key}={there}, but the study has {here} now: remove"
            " the folder, or give the study another name=."
        )


def _differences(there: Any, here: Any, usual: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """Keys that differ between two configurations. One that is in one of them alone, new or gone since the other was
    written, has its default in the other: its constructor's, or else the one in `usual`, the job's own configuration.
    """
    if isinstance(there, dict) and isinstance(here, dict):
        usual = usual if isinstance(usual, dict) and usual.get("_target_") == here.get("_target_") else {}
        known = usual | (_plain(defaults(here["_target_"], path)) if "_target_" in here else {})
        for key in [*there, *(key for key in here if key not in there)]:
            if path or key not in _FREE:
                one, other = (side[key] if key in side else known.get(key) for side in (there, here))
                yield from _differences(one, other, usual.get(key), f"{path}.{key}" if path else key)
    elif there != here and not (_is_nothing(there) and _is_nothing(here)):
        yield path, there, here


@cache
def _usual() -> Any:
    """The configuration of `millrace train` without overrides."""
    return _plain(OmegaConf.to_container(compose("train", [], missing="null")))


def _plain(value: Any) -> Any:
    """As a file holds it."""
    return json.loads(json.dumps(value, default=repr))


def _is_nothing(value: Any) -> bool:
    return value is None or value == {} or value == []


def forecast(runs: Sequence[StudyRun], flops_per_s: float | None) -> Table:
    """What the runs cost: parameters, FLOPs and hours.

    Args:
        flops_per_s: that a run reaches. None takes the speed of those runs that have been on their way.
    """
    if flops_per_s is None:
        flops_per_s = _measured_speed(runs)
    rows: list[list[object]] = []
    for run in runs:
        cost = run.cost
        told = [run.point.name, run.state, figures(cost.parameters), run.config.steps, figures(cost.samples)]
        rows.append([*told, figures(cost.flops, 3), _hours(cost.flops, flops_per_s)])
    total = sum(run.cost.flops for run in runs)
    rows.append(["total", "", "", "", "", figures(total, 3), _hours(total, flops_per_s)])
    header = ["run", "state", "parameters", "steps", "samples", "FLOPs", "hours"]
    return Table("forecast", f"{len(runs)} runs.", header, rows)


def _measured_speed(runs: Sequence[StudyRun]) -> float | None:
    """FLOPs per second, over all that the runs have logged."""
    flops, hours = 0.0, 0.0
    for run in runs:
        if (rows := run.rows()) and rows[-1]["step"]:
            flops += run.cost.flops * rows[-1]["step"] / run.config.steps
            hours += hours_of(rows)
    return flops / (3600 * hours) if hours else None


def _hours(flops: float, flops_per_s: float | None) -> str:
    return figures(flops / flops_per_s / 3600, 3) if flops_per_s else "?"
