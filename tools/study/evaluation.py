"""Evaluates finished runs, each once, several at a time."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from data.tasks import Task, Tasks, run_tasks
from tools.study.runs import StudyRun, evaluate_run
from tools.study.stages import Evaluation


def evaluate(runs: Sequence[StudyRun], evaluation: Evaluation, parallel: int) -> None:
    """Evaluate the finished runs that have not been, `parallel` at a time, with one thread each."""
    waiting = [run.folder for run in runs if run.state == "finished" and not run.evaluation()]
    if waiting:
        tasks = Tasks(min(parallel, len(waiting)))
        totals = [len(waiting[i :: tasks.tasks]) for i in range(tasks.tasks)]
        run_tasks(partial(_evaluate_own, waiting, evaluation), tasks, totals, "evaluating")


def _evaluate_own(waiting: Sequence[Path], evaluation: Evaluation, task: Task) -> None:
    for folder in task.own(waiting):
        evaluate_run(folder, evaluation)
        task.advance(1)
