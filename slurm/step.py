"""Tasks on the nodes of an allocation: one `srun`, whose fate is told in a sentence."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slurm.resources import Resources

# srun's words for a task that failed: "srun: error: node2: task 1: Exited with exit code 1", "...: tasks 0-3: Killed".
_FATE = re.compile(r"error: (?P<node>\S+): tasks? (?P<task>\d+)[^:]*: (?P<what>.*)")
_STATUS = re.compile(r"Exited with exit code (\d+)")
# Torch's launcher ends its ranks 30 s after a signal, which is not enough for a large checkpoint: it is kept from
# seeing any, and the ranks, which SLURM signals as well, set their own handlers.
_DEAF = ("sh", "-c", 'trap "" USR1 TERM; exec "$@"', "sh")


@dataclass(frozen=True)
class Failure:
    """Why a step failed.

    Args:
        status: of the first task that failed, or of srun itself.
        reason: a sentence.
    """

    status: int
    reason: str


class Step:
    """Runs a command on nodes, and passes signals on to it.

    Args:
        words: the command of every task.
        nodes: names.
        tasks: on each node.
        cpus: of each task.
        options: of srun, beside these.
        logs: folder for the tasks' output, which goes on where the last start's ended.
    """

    def __init__(
        self, words: Sequence[str], nodes: Sequence[str], tasks: int, cpus: int, options: Sequence[str], logs: Path
    ):
        self._logs = logs
        self._errors: list[str] = []
        logs.mkdir(parents=True, exist_ok=True)
        own = [
            f"--nodes={len(nodes)}",
            f"--nodelist={','.join(nodes)}",
            f"--ntasks={tasks * len(nodes)}",
            f"--ntasks-per-node={tasks}",
            f"--cpus-per-task={cpus}",
            "--kill-on-bad-exit=1",
            "--open-mode=append",
            f"--output={log_of(logs, '%t')}",
        ]
        self._process = subprocess.Popen(["srun", *own, *options, *words], stderr=subprocess.PIPE, text=True)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def signal(self, number: int) -> None:
        """Send a signal to all of the step's processes."""
        if self._process.poll() is None:
            self._process.send_signal(number)

    def wait(self, seconds: float) -> bool:
        """Whether the step has ended, after so many seconds at most."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        self._reader.join(seconds)
        return True

    def failure(self) -> Failure | None:
        """Of a step that has ended: None where all tasks ended with status 0."""
        status = self._process.returncode
        if status == 0:
            return None
        for line in self._errors:
            if fate := _FATE.search(line):
                own = _STATUS.search(fate["what"])
                words = f"task {fate['task']} on {fate['node']}: {fate['what'].lower()}"
                if last := _last_line(log_of(self._logs, fate["task"])):
                    words += f": {last}"
                return Failure(int(own.group(1)) if own else status, words)
        return Failure(status, self._errors[-1] if self._errors else f"srun ended with status {status}")

    def kill(self) -> None:
        """End the step at once."""
        self._process.kill()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            sys.stderr.write(line)
            if "error" in line:
                self._errors.append(line.strip())


def ranks(command: Sequence[str], nodes: Sequence[str], resources: Resources, logs: Path) -> Step:
    """A step of a job's ranks: a task for each, or one for each node's launcher.

    Args:
        command: arguments of the ranks' interpreter.
    """
    cpus = resources.cpus_per_rank
    if resources.launcher == "srun":
        words = [*resources.prefix, *interpreter(resources), *command]
        return Step(words, nodes, resources.ranks, cpus, resources.srun, logs)
    job = int(os.environ["SLURM_JOB_ID"])
    launcher = [
        *("-m", "torch.distributed.run", f"--nnodes={len(nodes)}", f"--nproc-per-node={resources.ranks}"),
        *("--rdzv-backend=c10d", f"--rdzv-endpoint={nodes[0]}:{20_000 + job * 31 % 20_000}", f"--rdzv-id={job}"),
        *("--max-restarts=0", f"--log-dir={logs}", "--tee=3"),
    ]
    words = [*_DEAF, *resources.prefix, *interpreter(resources), *launcher, *command]
    return Step(words, nodes, 1, cpus * resources.ranks, resources.srun, logs)


def interpreter(resources: Resources) -> list[str]:
    """What starts a module of ours in a task."""
    return [resources.python or sys.executable, "-P"]  # -P: the folder that one submits from may hold a folder "data"


def log_of(logs: Path, task: str) -> Path:
    """The file with a task's output."""
    return logs / f"task_{task}.log"


def _last_line(path: Path) -> str:
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1].strip()[:500] if lines else ""
