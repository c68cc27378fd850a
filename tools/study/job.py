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
from tools.study.evaluation import evaluate, run_commands
from tools.study.pool import Outcome, Pool
from tools.study.prediction import fix_predictions
from tools.study.report import overview, write_report
from tools.study.results import Result
from tools.study.runs import StudyRun, compose_runs, forecast
from tools.study.sheet import Sheet
from trainer.distributed import Cluster

Stage = Literal["all", "runs", "prediction", "held_out", "evaluation", "analysis"]


@dataclass
class Config:
    """conf/study.yaml, whose comments explain the keys."""

    study: Study
    cluster: Cluster
    name: str
    runs: str
    overrides: str
    stage: Stage
    parallel: PositiveInt
    restarts: NonNegativeInt
    dry_run: bool
    flops_per_s: PositiveFloat | None


def submit(overrides: Sequence[str]) -> None:
    """With cluster=slurm: submit the study, and print its jobs."""
    from tools.study.submission import submit_study

    study, submitted = submit_study(overrides)
    print("\n".join(map(str, submitted)))
    print(f"See millrace jobs, millrace logs {study}/<run>, millrace cancel {study}")


def run(config: Any) -> None:
    """Run the study of this config, or the part of it that `stage` names."""
    study, runs = compose_study(config)
    if config.dry_run:
        print(forecast(runs, config.flops_per_s).markdown())
        return
    folder = Path(config.runs) / study.name
    early = [run for run in runs if not run.point.held_out]
    late = [run for run in runs if run.point.held_out]
    reasons: dict[str, str] = {}

    def wanted(stage: Stage) -> bool:
        return config.stage in ("all", stage)

    if config.stage != "analysis":
        prepare(study, folder)
    if wanted("runs"):
        reasons |= start(early, config)
    if late and wanted("prediction"):
        predict(study, folder, early, late)
    if late and wanted("held_out"):
        reasons |= start(late, config)
    if study.evaluate is not None and wanted("evaluation"):
        run_commands(runs, study.evaluate, config.parallel, config.restarts)
    if wanted("analysis"):
        if study.evaluate is not None:
            evaluate(runs, study.evaluate, config.parallel)
        results = [run.result(study, reasons.get(run.point.name)) for run in runs]
        sheets = analyse(study, folder, results)
        page = write_report(study.name, folder, results, sheets, runs[0].config.log.wandb)
        print("\n".join(sentence for sheet in sheets for sentence in sheet.verdicts))
        print(f"\n  report      {page}\n  table       {folder / 'results.parquet'}")


def compose_study(config: Any, here: bool = True) -> tuple[Study, list[StudyRun]]:
    """The study and all its runs, checked.

    Args:
        here: whether the runs are to be made on this machine.

    Raises:
        ConfigError: a mistake in the study, or in any of its runs.
    """
    if config.cluster.processes > 1:
        raise ConfigError(
            "cluster.processes is of a run, not of the study, which starts `parallel` of them:"
            f' overrides="cluster.processes={config.cluster.processes}"'
        )
    study: Study = build(config.study)
    check_name(study.name)
    for name, analysis in study.analyses.items():
        try:
            analysis.check(study.entries(), study.columns())
        except ValueError as error:
            raise ConfigError(f"study.analyses.{name}: {error}") from error
    return study, compose_runs(study, config.runs, shlex.split(config.overrides), here)


def prepare(study: Study, folder: Path) -> None:
    """Make the study's folder, and what its runs share."""
    folder.mkdir(parents=True, exist_ok=True)
    if study.prepare is not None:
        study.prepare.prepare(folder)


def start(runs: Sequence[StudyRun], config: Any) -> dict[str, str]:
    """Run those that are not finished, here; the reasons of those that failed, by name."""
    waiting = [run for run in runs if run.state != "finished"]
    print(f"{len(runs) - len(waiting)} of {len(runs)} runs are finished", flush=True)
    ended: list[Outcome] = []
    by_name = {run.point.name: run for run in waiting}

    def tell(outcome: Outcome) -> None:
        ended.append(outcome)
        done = "finished" if by_name[outcome.command.name].state == "finished" else "stopped"
        how = f"failed: {outcome.reason}" if outcome.reason else f"{done} after {outcome.seconds:.0f} s"
        print(f"[{len(ended)}/{len(waiting)}] {outcome.command.name}: {how}", flush=True)

    Pool(config.parallel, config.restarts, tell).run([run.command for run in waiting])
    return {outcome.command.name: outcome.reason for outcome in ended if outcome.reason}


def predict(study: Study, folder: Path, early: Sequence[StudyRun], late: Sequence[StudyRun]) -> None:
    """Have the analyses fix their predictions of the late runs, from the early ones."""
    known = [run.result(study) for run in early]
    path = fix_predictions(study.analyses, folder, known, [run.result(study) for run in late])
    print(f"predictions are fixed in {path}", flush=True)


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
