"""A study on a SLURM cluster: its runs as one array, then what follows them as jobs that wait for it."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from conf.compose import compose, split_cluster
from conf.errors import ConfigError
from conf.schema import check
from tools.study.design import Study
from tools.study.job import Config, compose_study, prepare
from tools.study.runs import StudyRun
from tools.submission import Checked, Submitted, check_job, submit_job, submit_runs

# Of the jobs between and after the runs: one process, which reads what the runs have left.
_SINGLE = ("cluster.nodes=1", "cluster.gpus_per_node=0", "cluster.ranks_per_node=1", "cluster.min_nodes=null")


def submit_study(overrides: Sequence[str]) -> tuple[str, list[Submitted]]:
    """`millrace study <overrides>`, with `cluster=slurm` among them: unfinished runs as an array, at most
    `cluster.max_parallel` at a time; then the prediction, and the held-out runs as another array; then what evaluates
    them, as one more; then the analysis. Gives the study's name, and its jobs.

    A job follows the one before however that ends (`afterany`): a run that fails is listed with its reason, and does
    not keep the others from being analysed. But held-out runs start only where they have been predicted (`afterok`).
    All is checked before anything is submitted.

    Raises:
        ConfigError: a mistake in the study, or in any of its runs.
        SlurmError: SLURM refuses a job.
    """
    own, of_cluster = split_cluster(overrides)
    config = compose("study", own)
    check(config, Config)
    study, runs = compose_study(config, here=False)
    if config.dry_run or config.stage != "all":
        raise ConfigError("cluster=slurm submits a whole study: leave out dry_run and stage, or run them here.")
    folder = Path(config.runs) / study.name
    early, late = [[_checked(r, of_cluster) for r in part if r.state != "finished"] for part in by_turn(runs)]
    prediction = _single(own, of_cluster, study.name, "prediction") if late else None
    evaluations = _evaluations(study, runs, of_cluster)
    analysis = _single(own, of_cluster, study.name, "analysis")
    prepare(study, folder)

    submitted: list[Submitted] = []

    def after(kind: str) -> str | None:
        return f"{kind}:{submitted[-1].last}" if submitted else None

    if early:
        submitted.append(_array(f"{study.name}, runs", early, folder, "runs", after("afterany")))
    if prediction is not None:
        submitted.append(_follow(prediction, after("afterany")))
        submitted.append(_array(f"{study.name}, held-out runs", late, folder, "held_out", after("afterok")))
    if evaluations:
        what = f"{study.name}, evaluations"
        submitted.append(_array(what, evaluations, folder, "evaluations", after("afterany")))
    submitted.append(_follow(analysis, after("afterany")))
    return study.name, submitted


def by_turn(runs: Sequence[StudyRun]) -> list[list[StudyRun]]:
    """The runs, and those that wait for the prediction."""
    return [[run for run in runs if run.point.held_out == late] for late in (False, True)]


def _checked(run: StudyRun, of_cluster: Sequence[str]) -> Checked:
    return check_job("train", [*run.overrides, *of_cluster])


def _evaluations(study: Study, runs: Sequence[StudyRun], of_cluster: Sequence[str]) -> list[Checked]:
    """The commands that evaluate the runs, each on one node."""
    if study.evaluate is None:
        return []
    commands = [overrides for run in runs if not run.evaluation() for overrides in study.evaluate.commands(run.folder)]
    return [check_job("evaluate", [*one, *of_cluster, "cluster.nodes=1", "cluster.min_nodes=null"]) for one in commands]


def _single(own: Sequence[str], of_cluster: Sequence[str], study: str, stage: str) -> Checked:
    return check_job("study", [*own, f"stage={stage}", f"name={study}/{stage}", *of_cluster, *_SINGLE])


def _follow(single: Checked, after: str | None) -> Submitted:
    return submit_job(replace(single, resources=replace(single.resources, dependency=after)) if after else single)


def _array(what: str, runs: list[Checked], folder: Path, part: str, after: str | None) -> Submitted:
    kept = folder / "slurm" / f"{time.strftime('%Y%m%d-%H%M%S')}-{part}"
    return submit_runs(what, runs, kept.absolute(), runs[0].resources.max_parallel, after)
