"""Evaluates finished runs, each once, several at a time."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from data.tasks import Task, Tasks, run_tasks
from tools.study.pool import Command, Pool
from tools.study.runs import StudyRun, evaluate_run
from tools.study.stages import Evaluation


def run_commands(runs: Sequence[StudyRun], evaluation: Evaluation, parallel: int, restarts: int) -> None:
    """Run the commands that the evaluation of finished runs needs, `parallel` at a time; those that fail are told."""
    commands = [
        Command(f"{run.point.name}, evaluation", ["evaluate", *overrides], run.folder / "logs" / "evaluation.log")
        for run in _waiting(runs)
        for overrides in evaluation.commands(run.folder)
    ]
    for outcome in Pool(parallel, restarts).run(commands):
        how = f"failed: {outcome.reason}" if outcome.reason else f"finished after {outcome.seconds:.0f} s"
        print(f"{outcome.command.name}: {how}", flush=True)


def evaluate(runs: Sequence[StudyRun], evaluation: Evaluation, parallel: int) -> None:
    """Evaluate the finished runs that have not been, `parallel` at a time, with one thread each. Those whose commands
    have not come to their end are left out."""
    waiting = [run.folder for run in _waiting(runs) if not evaluation.commands(run.folder)]
    if waiting:
        tasks = Tasks(min(parallel, len(waiting)))
        totals = [len(waiting[i :: tasks.tasks]) for i in range(tasks.tasks)]
        run_tasks(partial(_evaluate_own, waiting, evaluation), tasks, totals, "evaluating")


def _waiting(runs: Sequence[StudyRun]) -> list[StudyRun]:
    return [run for run in runs if run.state == "finished" and not run.evaluation()]


def _evaluate_own(waiting: Sequence[Path], evaluation: Evaluation, task: Task) -> None:
    for folder in task.own(waiting):
        evaluate_run(folder, evaluation)
        task.advance(1)
