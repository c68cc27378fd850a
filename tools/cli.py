"""`millrace <job> [overrides]`: composes the job's config, starts the ranks where asked, and hands over to the job.

Heavy libraries are imported by the job that needs them, so that help and mistakes answer at once.
"""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from conf.errors import ConfigError

JOBS = {
    "index": ("data.index", "read tar headers once and write the manifest beside the shards"),
    "train": ("trainer.train", "train any model under any objective on any engine; resumes where it stopped"),
    "sample": ("trainer.sample", "draw images from a run's checkpoint or from a diffusers folder"),
    "bench": ("tools.bench", "the benchmarks behind the README's figures: loader, plan, step, checkpoint"),
}

USAGE = """\
usage: millrace <job> [key=value ...] [group=choice ...]

jobs:
{jobs}

Every job is a Hydra config. `millrace <job> --help` lists its keys and groups, `millrace <job> ... --cfg` prints the
composed config, `scale=tiny` shrinks any experiment to a CPU, `cluster.processes=2` starts that many ranks here.
"""


def usage() -> str:
    """The text of `millrace --help`."""
    width = max(map(len, JOBS))
    return USAGE.format(jobs="\n".join(f"  {name:<{width}}  {what}" for name, (_, what) in JOBS.items()))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line. Exits with status 2 on a mistake of the user's, after one sentence on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return
    job, overrides = arguments[0], arguments[1:]
    try:
        if job not in JOBS:
            raise ConfigError(f"There is no job {job!r}; the jobs are {', '.join(JOBS)}.")
        _run(job, overrides)
    except ConfigError as error:
        print(f"millrace: {error}", file=sys.stderr)
        sys.exit(2)


def _run(job: str, overrides: list[str]) -> None:
    from conf.compose import compose, describe

    if "-h" in overrides or "--help" in overrides:
        print(describe(job, JOBS[job][1]))
        return
    show = "--cfg" in overrides
    config = compose(job, [o for o in overrides if o != "--cfg"])
    if show:
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(config, resolve=True))
        return

    from conf.schema import check

    module = import_module(JOBS[job][0])
    check(config, module.Config)

    from tools.launch import launch, wants_ranks

    if wants_ranks(config):
        launch(job, overrides, config)
        return
    module.run(config)
    sys.stdout.flush()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from trainer.distributed import leave

        leave()


if __name__ == "__main__":
    main()
