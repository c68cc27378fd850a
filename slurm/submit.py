"""Submission through submitit, which writes the batch scripts and hands each job its work."""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from slurm.attempt import attempt
from slurm.queue import SlurmError
from slurm.resources import Resources
from slurm.work import Work


def submit(
    works: Sequence[Work], folder: Path, code: Path, parallel: int | None = None, dependency: str | None = None
) -> str:
    """Submit one job, or several as an array, and return its id.

    Args:
        works: of the job, or of the array's elements; they share resources and name.
        folder: for the batch script and its output; seen by all nodes.
        code: folder that the job imports from before all others, however the working copy changes meanwhile.
        parallel: elements that may run at a time; None: any number.
        dependency: in sbatch's words, e.g. `afterok:17`; takes the place of the resources' own.

    Raises:
        SlurmError: sbatch refuses the job; the text is its own.
    """
    import submitit

    resources = works[0].resources
    executor = submitit.SlurmExecutor(
        folder=folder, python=f"exec {shlex.quote(sys.executable)}"
    )  # so that SLURM's signals reach it
    options = {"job_name": works[0].name} | resources.options()
    if dependency is not None:
        options["dependency"] = dependency
    executor.update_parameters(
        use_srun=False,  # the job's own steps do that
        stderr_to_stdout=True,
        setup=[*resources.setup(), *_environment(code, resources)],
        array_parallelism=parallel or len(works),
        additional_parameters=options,
    )
    configuration = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    try:
        # A job that submits others hands nothing of its own allocation on.
        with submitit.helpers.clean_env():
            os.environ.update(configuration)
            if len(works) == 1:
                return str(executor.submit(attempt, works[0]).job_id)
            return str(executor.map_array(attempt, works)[0].job_id).partition("_")[0]
    except submitit.core.utils.FailedJobError as error:
        raise SlurmError(str(error).strip().splitlines()[-1]) from error


def _environment(code: Path, resources: Resources) -> list[str]:
    """Shell lines after the user's own, which may load other Pythons."""
    return [
        f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
        "export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1",
        f"export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{resources.cpus_per_rank}}}",
        # Torch's launcher would end its ranks 30 s after a signal.
        "export TORCHELASTIC_SIGNALS_TO_HANDLE=SIGQUIT",
    ]
