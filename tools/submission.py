"""`cluster=slurm`: checks a job as if its ranks were here, keeps what it will run, and hands it to SLURM.

submitted = submit_job(check_job("train", overrides))       # one job, or an array of tasks and what follows it
submitted = submit_runs("a sweep", [check_job(...), ...], folder, parallel=2)   # several runs, as one array
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf

from conf.compose import compose, split_cluster
from conf.errors import ConfigError
from conf.schema import check
from conf.secrets import without_secrets
from data.run_directory import check_name, read_jsonl, saved_step
from data.tasks import Tasks
from slurm.chain import Chain
from slurm.queue import entries, max_array_size
from slurm.resources import Resources
from slurm.submit import submit
from slurm.work import Progress, Work
from tools.cli import JOBS
from tools.snapshot import keep_code, keep_command
from tools.submitted import CHAIN


@dataclass(frozen=True)
class Checked:
    """A job that may be submitted.

    Args:
        job: its name.
        overrides: without those of `cluster`.
        config: as its ranks or tasks compose it.
        resources: of the job, or of each of its tasks.
        task_keys: where it is told its task, where it is split into an array of tasks: `cluster` (each task is one
            process) or, of a job with ranks of its own in each task, that job's name.
        node_counts: that the ranks, of each task, can run on, ascending.
        folder: that it belongs to, `runs/<name>`.
    """

    job: str
    overrides: list[str]
    config: DictConfig
    resources: Resources
    task_keys: str | None
    node_counts: list[int]
    folder: Path

    @property
    def name(self) -> str:
        """Of the run."""
        return str(self.config.name)

    @property
    def chain(self) -> Chain:
        """The history of the folder's job."""
        return Chain(self.folder / CHAIN)

    def task(self, task: int | None) -> list[str]:
        """Overrides of `cluster` for one of the tasks; without one, for what needs the work of all."""
        tasks, cpus = self.resources.tasks, self.resources.cpus_per_rank
        words = ["cluster=tasks" if self.task_keys == "cluster" else "cluster=local"]
        if task is not None:
            return [*words, f"{self.task_keys}.tasks={tasks}", f"{self.task_keys}.task={task}"]
        return [*words, f"cluster.tasks={cpus}"] if self.task_keys == "cluster" else words

    def work(self, commands: Sequence[Sequence[str]], logs: Path, chain: Chain, tasks: Sequence[int] = ()) -> Work:
        """Commands of this job, given by their overrides of `cluster`: of some of its tasks, or of all that is left."""
        whole = [["-m", "tools.cli", self.job, *self.overrides, *words] for words in commands]
        progress = self._progress(tasks)
        return Work(self.folder.name, whole, logs, chain, self.resources, self.node_counts, progress)

    def _progress(self, tasks: Sequence[int]) -> Callable[[], Progress] | None:
        if self.job == "train":
            return None if self.config.dry_run else partial(train_progress, self.folder, self.config.steps)
        folder = self.folder / "encode" if self.job == "encode" else self.folder
        parts = [folder / f"task_{task}" for task in tasks] or [folder]
        return partial(tasks_progress, [part / "metrics.jsonl" for part in parts])


@dataclass(frozen=True)
class Submitted:
    """What SLURM was given.

    Args:
        what: the run's name, or words for several.
        job: its id; of an array, that of all elements.
        last: the id of the job with which all is done: another than `job` after an array of tasks.
    """

    what: str
    job: str
    last: str

    def __str__(self) -> str:
        return f"{self.what}: job {self.job}" + (f", then {self.last}" if self.last != self.job else "")


@dataclass
class _Schema:
    cluster: Resources


def check_job(job: str, overrides: Sequence[str]) -> Checked:
    """`millrace <job> <overrides>`, with `cluster=slurm` among the overrides, checked as far as can be told beforehand.

    Raises:
        ConfigError: a mistake in the command; its parts cannot run together on so many ranks; a secret would get onto
            the disk; or a job works on the same folder already.
        SlurmError: SLURM does not answer.
    """
    module = import_module(JOBS[job].module)
    cluster = compose(job, list(overrides)).cluster
    check(DictConfig({"cluster": cluster}), _Schema)
    try:
        resources = Resources(**OmegaConf.to_container(cluster))  # type: ignore[arg-type]
    except ValueError as error:
        raise ConfigError(str(error)) from error
    _refuse_secrets(overrides)
    own, _ = split_cluster(overrides)
    single = get_type_hints(module.Config)["cluster"] is Tasks  # each task is one process, not several ranks
    config = compose(job, [*own, "cluster=tasks", f"cluster.tasks={resources.tasks}"] if single else own)
    check(config, module.Config)
    task_keys = _task_keys(job, config, resources, single)
    counts = [1] if single else _node_counts(module, config, resources)
    if job == "train" and resources.gpu is not None:
        counts = _that_fit(counts, config, resources.gpu, resources.ranks)
    check_name(str(config.name))
    folder = Path(config.runs).absolute() / str(config.name)
    checked = Checked(job, own, config, resources, task_keys, counts, folder)
    _refuse_twice(checked)
    return checked


def submit_job(checked: Checked) -> Submitted:
    """Submit a job of ranks; or one of tasks as an array, and after it what needs all tasks to be done.

    Raises:
        SlurmError: SLURM refuses it.
    """
    kept = _keep(checked)
    code = keep_code(kept)
    if checked.task_keys is None:
        job = submit([_ranks(checked, kept)], kept / "submitit", code)
        checked.chain.add("submitted", job, kind=checked.job, kept=kept.name)
        return Submitted(checked.name, job, job)
    elements = _elements(checked, kept)
    job = submit(elements, kept / "submitit", code, checked.resources.max_parallel)
    checked.chain.add("submitted", job, kind=checked.job, kept=kept.name, elements=len(elements))
    if len(elements) == 1:
        return Submitted(checked.name, job, job)
    # The same command without a task: what is done by now is passed over, what needs all of it is made, on all cores.
    rest = checked.work([checked.task(None)], kept / "logs" / "rest", Chain(kept / "rest.jsonl"))
    last = submit([rest], kept / "submitit", code, dependency=f"afterok:{job}")
    checked.chain.add("submitted", last, kind=checked.job, kept=kept.name, after=job)
    return Submitted(checked.name, job, last)


def submit_runs(
    what: str, runs: Sequence[Checked], folder: Path, parallel: int | None = None, dependency: str | None = None
) -> Submitted:
    """Submit several jobs of ranks, which share their resources, as one array.

    Args:
        what: to call them by.
        runs: each with a folder of its own, whose `slurm.jsonl` tells its history.
        folder: new; for what they share: the code, and the batch scripts with their output.
        parallel: how many may run at a time; None: as many as fit.
        dependency: in sbatch's words, `afterok:17`.

    Raises:
        SlurmError: SLURM refuses it.
    """
    assert not any(run.task_keys for run in runs)
    assert all(run.resources == runs[0].resources for run in runs)
    code = keep_code(folder)
    kept = [_keep(run) for run in runs]
    works = [_ranks(run, place) for run, place in zip(runs, kept, strict=True)]
    job = submit(works, folder / "submitit", code, parallel, dependency)
    for i, (run, place) in enumerate(zip(runs, kept, strict=True)):
        run.chain.add("submitted", f"{job}_{i}" if len(runs) > 1 else job, kind=run.job, kept=place.name)
    return Submitted(what, job, job)


def train_progress(folder: Path, steps: int) -> Progress:
    """How far a run has come: to the newest step that is saved."""
    return Progress(saved_step(folder), steps)


def tasks_progress(metrics: Sequence[Path]) -> Progress:
    """How far tasks have come: the samples that the newest start of each found done."""
    newest = [read_jsonl(file)[-1:] for file in metrics if file.exists()]
    return Progress(sum(row.get("skipped", 0) for rows in newest for row in rows), None)


def _ranks(checked: Checked, kept: Path) -> Work:
    return checked.work([["cluster=local"]], kept / "logs", checked.chain)


def _elements(checked: Checked, kept: Path) -> list[Work]:
    """The array's elements: each has one task, or several where SLURM allows no array that long."""
    tasks = checked.resources.tasks
    count = min(tasks, max_array_size())
    works = []
    for i in range(count):
        own, chain = range(i, tasks, count), Chain(kept / f"element_{i}.jsonl")
        works.append(checked.work([checked.task(task) for task in own], kept / "logs" / f"element_{i}", chain, own))
    return works


def _keep(checked: Checked) -> Path:
    kept = checked.folder / "slurm" / time.strftime("%Y%m%d-%H%M%S")
    keep_command(kept, checked.job, checked.overrides, checked.config)
    return kept


def _task_keys(job: str, config: DictConfig, resources: Resources, single: bool) -> str | None:
    """See `Checked`."""
    if single:
        if resources.ranks > 1:  # which would all do the same
            key = "gpus_per_node" if resources.ranks_per_node is None else "ranks_per_node"
            raise ConfigError(
                f"a task of {job} is one process, of which cluster.{key}={resources.ranks} would start as many: set"
                f" cluster.{key}=1 (or, without models, cluster.gpus_per_node=0), and cluster.tasks to how many there"
                " are to be."
            )
        return "cluster"
    if resources.tasks == 1:
        return None
    if job in config and "tasks" in config[job]:
        return job
    raise ConfigError(f"cluster.tasks={resources.tasks}: {job} does not split into tasks; its ranks are nodes' GPUs.")


def _node_counts(module: ModuleType, config: DictConfig, resources: Resources) -> list[int]:
    """The numbers of nodes that the job can run on, of those that it may get."""
    # Whether the nodes have CUDA is not for this machine to say.
    anywhere: Any = OmegaConf.merge(config, {"device": "auto"}) if "device" in config else config
    counts = []
    for nodes in range(resources.fewest_nodes, resources.nodes + 1):
        try:
            if hasattr(module, "preflight"):
                module.preflight(anywhere, nodes * resources.ranks)
            counts.append(nodes)
        except ConfigError:
            if nodes == resources.nodes:
                raise
    return counts


def _that_fit(counts: list[int], config: DictConfig, gpu: str, ranks_per_node: int) -> list[int]:
    """The numbers of nodes on which a run fits the memory of its GPUs. It is no less on more of them.

    Raises:
        ConfigError: none does.
    """
    from tools.plan.estimate import HEADROOM, estimate
    from trainer.hardware import DEVICES, device_named

    device = device_named(gpu)
    if device is None:
        raise ConfigError(f"cluster.gpu={gpu!r}: one of {', '.join(known.name for known in DEVICES)}, or null.")
    for i, nodes in enumerate(counts):
        needed = estimate(config, nodes * ranks_per_node)
        if needed.fits(device.memory, HEADROOM):
            return counts[i:]
    held, room = needed.bytes_per_rank / 2**30, (1 - HEADROOM) * device.memory / 2**30
    raise ConfigError(
        f"on {counts[-1]} x {ranks_per_node} GPUs a rank would need {held:.1f} GiB, and {device.name} has room for"
        f" {room:.1f} (its memory less {HEADROOM:.0%} for what cannot be told): millrace plan, with the same"
        " overrides, says what takes it and what may help; cluster.gpu=null submits it all the same."
    )


def _refuse_twice(checked: Checked) -> None:
    """Two jobs in one folder would write over each other."""
    jobs = [row["job"] for row in checked.chain.rows() if row["event"] == "submitted"]
    name = checked.folder.name
    for job, entry in entries(jobs).items():
        if not entry.ended:
            raise ConfigError(f"job {job} ({entry.state.lower()}) works on {checked.folder}: millrace cancel {name}")


def _refuse_secrets(overrides: Sequence[str]) -> None:
    """The command gets into files, which are no place for secrets."""
    for override in overrides:
        key, _, value = override.partition("=")
        path = key.split(".")
        shown: Any = {"storage_options": {"any": {path[-1]: value}}} if "storage_options" in path else value
        if "${oc.env:" not in value and without_secrets(shown, path[-1]) != shown:
            raise ConfigError(
                f"{key} holds a secret, which a submitted command would carry onto the disk: put it into an environment"
                f" variable, and give {key}='${{oc.env:NAME}}'."
            )
