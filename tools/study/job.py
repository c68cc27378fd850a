"""The `study` job: compose all runs, run those that are not finished, then the analyses and the report."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from conf.errors import ConfigError
from conf.schema import build
from data.run_directory import check_name
from tools.study.analyses.base import TooFewRuns
from tools.study.design import Study
from tools.study.pool import Outcome, Pool
from tools.study.prediction import fix_predictions
from tools.study.report import log_to_wandb, overview, write_report
from tools.study.results import Result
from tools.study.runs import StudyRun, compose_runs, hours_of
from tools.study.sheet import Sheet, Table, figures

Stage = Literal["all", "runs", "prediction", "held_out", "analysis"]


@dataclass
class Config:
    """conf/study.yaml, whose comments explain the keys."""

    study: Study
    name: str
    runs: str
    overrides: str
    stage: Stage
    parallel: PositiveInt
    restarts: NonNegativeInt
    dry_run: bool
    flops_per_s: PositiveFloat | None


def run(config: Any) -> None:
    """Run the study of this config, or the part of it that `stage` names."""
    study: Study = build(config.study)
    check_name(study.name)
    _check_analyses(study)
    runs = compose_runs(study, config.runs, shlex.split(config.overrides))
    if config.dry_run:
        print(forecast(runs, config.flops_per_s).markdown())
        return
    folder = Path(config.runs) / study.name
    folder.mkdir(parents=True, exist_ok=True)
    if study.prepare is not None and config.stage != "analysis":
        study.prepare.prepare(folder)
    reasons: dict[str, str] = {}
    fitted = [run for run in runs if not run.point.held_out]
    held_out = [run for run in runs if run.point.held_out]
    if config.stage in ("all", "runs"):
        reasons |= start(fitted, config)
    if held_out and config.stage in ("all", "prediction"):
        predicted = fix_predictions(
            study.analyses, folder, _results(study, fitted, reasons), _results(study, held_out, {})
        )
        print(f"predictions are fixed in {predicted}", flush=True)
    if held_out and config.stage in ("all", "held_out"):
        reasons |= start(held_out, config)
    if config.stage in ("all", "analysis"):
        if study.evaluate is not None:
            for run in runs:
                run.evaluate(study.evaluate)
        results = _results(study, runs, reasons)
        sheets = analyse(study, folder, results)
        page = write_report(study.name, folder, results, sheets)
        log_to_wandb(runs[0].config, study.name, results, sheets)
        print("\n".join(sentence for sheet in sheets for sentence in sheet.verdicts))
        print(f"\n  report      {page}\n  table       {folder / 'results.parquet'}")


def start(runs: Sequence[StudyRun], config: Any) -> dict[str, str]:
    """Run those that are not finished, here; the reasons of those that failed, by name."""
    waiting = [run for run in runs if run.state != "finished"]
    print(f"{len(runs) - len(waiting)} of {len(runs)} runs are finished", flush=True)
    count = len(waiting)
    done = 0

    def tell(outcome: Outcome) -> None:
        nonlocal done
        done += 1
        how = f"failed: {outcome.reason}" if outcome.reason else f"{outcome.seconds:.0f} s"
        print(f"[{done}/{count}] {outcome.command.name}: {how}", flush=True)

    pool = Pool(config.parallel, config.restarts, tell)
    commands = [run.command for run in waiting]
    outcomes = pool.run(commands)
    return {outcome.command.name: outcome.reason for outcome in outcomes if outcome.reason}


def analyse(study: Study, folder: Path, results: Sequence[Result]) -> list[Sheet]:
    """A sheet for the runs and one for each analysis."""
    finished = [result for result in results if result.finished]
    sheets = [overview(results, folder)]
    for name, analysis in study.analyses.items():
        sheet = Sheet(name, folder)
        try:
            analysis.report(finished, sheet)
        except TooFewRuns as error:
            sheet.verdict(f"{name}: {error}.")
        sheets.append(sheet)
    return sheets


def forecast(runs: Sequence[StudyRun], flops_per_s: float | None) -> Table:
    """What the runs cost: parameters, FLOPs and hours.

    Args:
        flops_per_s: that a run reaches. None takes the speed of those runs that have been on their way.
    """
    if flops_per_s is None:
        flops_per_s = _measured_speed(runs)
    rows, total_flops = [], sum(run.cost.flops for run in runs)
    for run in runs:
        cost = run.cost
        rows.append(
            [
                *(run.point.name, run.state, figures(cost.parameters), run.config.steps, figures(cost.samples)),
                *(figures(cost.flops, 3), _hours(cost.flops, flops_per_s)),
            ]
        )
    rows.append(["total", "", "", "", "", figures(total_flops, 3), _hours(total_flops, flops_per_s)])
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


def _results(study: Study, runs: Sequence[StudyRun], reasons: dict[str, str]) -> list[Result]:
    return [run.result(study, reasons.get(run.point.name)) for run in runs]


def _check_analyses(study: Study) -> None:
    for name, analysis in study.analyses.items():
        try:
            analysis.check(study.entries(), study.columns())
        except ValueError as error:
            raise ConfigError(f"study.analyses.{name}: {error}") from error
