"""`millrace <job> [overrides]`: composes the job's config, starts the ranks where asked, and hands over to the job.

Heavy libraries are imported by the job that needs them, so that help and mistakes answer at once.
"""

import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from conf.errors import ConfigError

_TRACEBACK = "MILLRACE_TRACEBACK"
_BARE = re.compile(r"[^=~+]+")


class Job(NamedTuple):
    """What a first word of the command means.

    Args:
        module: whose `run` takes the config.
        what: it does, for people.
        word: the key that a bare word gives: `millrace logs first` is `millrace logs run=first`.
    """

    module: str
    what: str
    word: str | None = None


JOBS = {
    "index": Job("data.index", "read tar headers once and write the manifest beside the shards"),
    "curate": Job("data.curate", "score every sample with filters: columns beside the manifests, for where clauses"),
    "pack": Job("data.pack", "write selected samples as fresh, balanced tars, resized or encoded anew if asked"),
    "encode": Job("trainer.encode", "keep what a run's frozen encoders make of its data, for training to read"),
    "retrieve": Job("data.retrieve", "a database of embeddings, a FAISS index over it, the neighbours of samples"),
    "train": Job("trainer.train", "train any model under any objective on any engine; resumes where it stopped"),
    "study": Job(
        "tools.study.job", "a sweep of training runs with an analysis: fits, the papers' tables, a report", "study"
    ),
    "sample": Job("trainer.sample", "draw images from a run's checkpoint or from a diffusers folder"),
    "import": Job("tools.importing", "a diffusers folder, or a file in its authors' layout, as a run to go on from"),
    "export": Job("tools.export", "a run as a folder that diffusers opens, or as a file in the authors' layout"),
    "evaluate": Job("trainer.evaluate", "FID, KID, precision and recall, CLIP score ... of a model, or of pictures"),
    "plan": Job("tools.plan", "what a run would need, without a GPU: memory of a rank, FLOPs, traffic, time, cost"),
    "jobs": Job("tools.jobs", "what was submitted with cluster=slurm, and how it goes"),
    "logs": Job("tools.logs", "the last lines that a submitted run wrote: millrace logs <run>", "run"),
    "cancel": Job("tools.cancel", "end a submitted run: millrace cancel <run>", "run"),
    "bench": Job(
        "tools.bench", "the benchmarks behind the README's figures: loader, plan, step, curate, selection ...", "bench"
    ),
}

USAGE = """\
usage: millrace <job> [key=value ...] [group=choice ...]

jobs:
{jobs}

Every job is a Hydra config. `millrace <job> --help` lists its keys and groups, `millrace <job> ... --cfg` prints the
composed config, `scale=tiny` shrinks any experiment to a CPU, `cluster.processes=2` starts that many ranks here, and
`cluster=slurm` submits the job instead.
"""


def usage() -> str:
    """The text of `millrace --help`."""
    width = max(map(len, JOBS))
    return USAGE.format(jobs="\n".join(f"  {name:<{width}}  {what}" for name, (_, what, _) in JOBS.items()))


def main() -> None:
    """The `millrace` command."""
    code = execute(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Not through the interpreter's teardown: gloo's threads abort it now and then (pytorch #190489), and DuckDB's
    # bindings print pages about leaks.
    os._exit(code)


def execute(arguments: Sequence[str]) -> int:
    """Run a command line and return its exit status: 0; 2 after one sentence on stderr about a mistake in the command;
    1 after one about its data, files or stores; 130 after Ctrl-C. Any other exception passes.
    """
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    job, overrides = arguments[0], list(arguments[1:])
    try:
        if job not in JOBS:
            raise ConfigError(f"There is no job {job!r}; the jobs are {', '.join(JOBS)}.")
        _run(job, overrides)
    except ConfigError as error:
        print(f"millrace: {error}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        # What users cause is a ValueError, what stores and disks cause an OSError; but bugs raise these too.
        if os.environ.get(_TRACEBACK):
            raise
        # A rank's sentence has the hint already.
        hint = "" if _TRACEBACK in str(error) else f" ({_TRACEBACK}=1 shows where this was raised)"
        print(f"millrace: {error}{hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("millrace: interrupted", file=sys.stderr)
        return 130
    return 0


def _run(job: str, overrides: list[str]) -> None:
    from conf.compose import compose, describe

    if "-h" in overrides or "--help" in overrides:
        print(describe(job, JOBS[job].what))
        return
    show = "--cfg" in overrides
    overrides = [o for o in overrides if o != "--cfg"]
    word = JOBS[job].word
    if word is not None:
        overrides = [f"{word}={o}" if _BARE.fullmatch(o) else o for o in overrides]
    if job == "plan" and not show:  # of other ranks than there are here
        from tools.plan import plan

        plan(overrides)
        return
    config = compose(job, overrides)
    if show:
        from omegaconf import OmegaConf

        from conf.secrets import without_secrets

        print(OmegaConf.to_yaml(without_secrets(OmegaConf.to_container(config))))
        return

    from conf.schema import check
    from tools.launch import follow_launcher, launch, ranks_of, wants_ranks

    follow_launcher()
    module = import_module(JOBS[job].module)
    if config.get("cluster", {}).get("kind") == "slurm":
        from tools.submission import check_job, submit_job

        if hasattr(module, "submit"):  # a job of several jobs
            module.submit(overrides)
        else:
            checked = check_job(job, overrides)
            name = checked.name
            print(f"{submit_job(checked)}. See millrace jobs, millrace logs {name}, millrace cancel {name}")
            if job == "train" and checked.resources.gpus_per_node and checked.resources.gpu is None:
                print("Whether it fits its GPUs was not asked: cluster.gpu=<their name> refuses a run that does not.")
        return
    check(config, module.Config)
    if hasattr(module, "preflight"):
        module.preflight(config, ranks_of(config))
    if wants_ranks(config):
        launch(job, overrides, config)
    else:
        module.run(config)


if __name__ == "__main__":
    main()
