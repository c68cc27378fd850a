"""Starts the ranks of a job on this machine, through torch's elastic launcher.

Under an existing `torchrun` or SLURM task nothing is started: the command joins as the rank it already is.
"""

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import psutil
from omegaconf import DictConfig

from conf.errors import ConfigError

log = logging.getLogger(__name__)

_SENTENCE = "millrace: "
LAUNCHER = "MILLRACE_LAUNCHER"
_FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_PR_SET_PDEATHSIG = 1


def wants_ranks(config: DictConfig) -> bool:
    """Whether the job asks for more than one process and is not already one of them."""
    if config.get("cluster", {}).get("processes", 1) <= 1:
        return False
    from trainer.distributed import read_environment

    return read_environment(os.environ) is None


def ranks_of(config: DictConfig) -> int:
    """How many ranks the job has: those of the launcher it runs under, or else those it asks for."""
    from trainer.distributed import read_environment

    place = read_environment(os.environ)
    return place[1] if place else config.get("cluster", {}).get("processes", 1)


def launch(job: str, overrides: list[str], config: DictConfig) -> None:
    """Run the same command as `cluster.processes` ranks; their output also lands in the run directory's `logs/`.

    The first SIGTERM, SIGUSR1 or SIGINT is passed on to the ranks, which have all the time they need to save and leave.

    Raises:
        ConfigError: the run's folder cannot be made; or a rank failed by a mistake in the command (status 2): the
            sentence names it and its log.
        ChildProcessError: likewise, a rank that failed otherwise.
        KeyboardInterrupt: Ctrl-C was pressed twice, or before there were ranks; none is left.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logs = run_directory(config) / "logs"
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"runs={config.get('runs', 'runs')}: cannot make the folder {logs}: {error.strerror}."
        ) from error
    # One thread pool per rank: the machine's cores are shared, and a fixed count keeps sums bit-equal between runs.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // config.cluster.processes)))
    os.environ[LAUNCHER] = str(os.getpid())
    # -P keeps the caller's folder off the import path: it may well hold a folder named "data" or "models".
    command = ["-P", "-m", "tools.cli", job, *overrides]
    restarts: int = config.cluster.restarts
    with signals_forwarded(_ranks) as forwarded:
        while True:
            try:
                return _start_ranks(config.cluster.processes, logs, command)
            except ChildFailedError as error:
                rank, failure = error.get_first_failure()
                words = f"rank {rank} of {job!r} failed{_words_of_rank(logs, rank)}"
                if forwarded:
                    names = " and ".join(number.name for number in forwarded)
                    words = f"asked to stop by {names}, {words} (exit status {failure.exitcode})"
                if forwarded or restarts == 0:
                    # The command ends with the rank's own status.
                    kind = ConfigError if failure.exitcode == 2 else ChildProcessError
                    raise kind(f"{words}; its whole output is under {logs}.") from error
                restarts -= 1
                log.warning("%s; starting again, %d more times", words, restarts)


def _start_ranks(processes: int, logs: Path, command: list[str]) -> None:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        # Restarts are `launch`'s: the elastic agent's own would bring a run back that was asked to stop.
        max_restarts=0,
        monitor_interval=0.2,
        # Nor its signal handlers, which give the ranks 30 seconds, and undo nohup.
        signals_to_handle="SIGQUIT",
        # Every rank writes its log; rank 0 also speaks here.
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=Std.ALL, tee={0: Std.ALL}),
    )
    elastic_launch(settings, sys.executable)(*command)


def _ranks() -> list[int]:
    return [child.pid for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]


@contextmanager
def signals_forwarded(running: Callable[[], Sequence[int]]) -> Iterator[list[signal.Signals]]:
    """The first signal to stop goes to every process that runs; gives the signals so far. A second Ctrl-C kills them,
    with all that they have started.

    Args:
        running: ids of these processes. They lead sessions of their own, so that a terminal's Ctrl-C reaches only the
            launcher.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed twice, or nothing runs.
    """
    received: list[signal.Signals] = []

    def forward(number: int, _: FrameType | None) -> None:
        processes = running()
        again = number == signal.SIGINT and signal.SIGINT in received
        for process in processes:
            with suppress(ProcessLookupError):  # it has just ended
                if again:
                    os.killpg(process, signal.SIGKILL)
                elif not received:
                    os.kill(process, number)
        if not received:
            log.warning("asked to stop by %s: what runs saves and leaves", signal.Signals(number).name)
        received.append(signal.Signals(number))
        if again or not processes:
            raise KeyboardInterrupt

    earlier = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        yield received
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def follow_launcher() -> None:
    """In a rank that `launch` started: be sent SIGTERM when the launcher dies, however it does.

    Linux only; elsewhere a launcher that is killed leaves its ranks running.
    """
    launcher = os.environ.pop(LAUNCHER, None)
    if launcher is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(launcher):  # it died before
        os.kill(os.getpid(), signal.SIGTERM)


def run_directory(config: DictConfig) -> Path:
    """Where a job of this config writes; raises ConfigError when its name leads elsewhere."""
    from data.run_directory import check_name

    name = str(config.get("name", "job"))
    check_name(name)
    return Path(config.get("runs", "runs")) / name


def _words_of_rank(logs: Path, rank: int) -> str:
    """The last words of a rank in the newest start."""
    written = sorted(logs.glob(f"*/attempt_*/{rank}/stderr.log"), key=lambda path: path.stat().st_mtime)
    return last_words(written[-1]) if written else ""


def last_words(log: Path) -> str:
    """`": "` and the last sentence for users, or else the last line, that a command wrote to a log; "" if none."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    sentences = [line.removeprefix(_SENTENCE) for line in lines if line.startswith(_SENTENCE)]
    words = (sentences or lines)[-1:]
    return f": {words[0].rstrip('.')}" if words else ""
