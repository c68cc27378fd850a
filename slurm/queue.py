"""SLURM's queue: what it knows of jobs and nodes, and what it is asked to do with them.

squeue and scontrol answer on every cluster; sacct, which remembers more, only where there is an accounting database.
"""

import os
import re
import signal
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

# A node in one of these is no use to a job.
_BROKEN = re.compile(r"down|drain|fail|error|inval|unk", re.IGNORECASE)
_GOING_ON = ("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "RESIZING", "REQUEUED", "COMPLETING")
_TIMEOUT_S = 60.0


class SlurmError(OSError):
    """A SLURM command failed; the text is its own."""


@dataclass(frozen=True)
class Entry:
    """A job in the queue, or one that has left it.

    Args:
        state: SLURM's word for it: PENDING, RUNNING, COMPLETED, ...
        reason: why it waits or ended, in SLURM's words; may be "None".
        nodes: SLURM's list of them.
        seconds_left: before the time limit; None without one, or where it does not run.
    """

    state: str
    reason: str = ""
    nodes: str = ""
    seconds_left: int | None = None

    @property
    def ended(self) -> bool:
        """Whether it will not go on by itself."""
        return self.state not in _GOING_ON


def command(*words: str) -> str:
    """What a SLURM command prints.

    Raises:
        SlurmError: it fails, is not installed, or does not answer within a minute.
    """
    # SLURM signals every process of a job that it ends; blocked, which children inherit, lets this one finish.
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except FileNotFoundError as error:
        raise SlurmError(f"no {words[0]} here: cluster=slurm works where SLURM's commands are") from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"{words[0]} has not answered within {_TIMEOUT_S:g} s") from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)
    if done.returncode:
        raise SlurmError(f"{words[0]}: {done.stderr.strip() or f'status {done.returncode}'}")
    return done.stdout


def entries(jobs: Iterable[str]) -> dict[str, Entry]:
    """Jobs that SLURM still knows, by id (`17`, or `17_3` for an array's element 3)."""
    wanted = set(jobs)
    found: dict[str, Entry] = {}
    if not wanted:
        return found
    for line in command("squeue", "-h", "-r", "-t", "all", "--me", "-o", "%i|%T|%r|%N|%L").splitlines():
        job, state, reason, nodes, left = line.split("|")
        if job in wanted:
            found[job] = Entry(state, reason, nodes, seconds(left))
    if forgotten := wanted - found.keys():
        found |= _accounted(forgotten)
    return found


def _accounted(jobs: set[str]) -> dict[str, Entry]:
    words = ("sacct", "-n", "-X", "-P", "-o", "JobID,State,NodeList", "-j", ",".join(sorted(jobs)))
    try:
        lines = command(*words).splitlines()
    except SlurmError:  # most small clusters keep no accounts
        return {}
    rows = [line.split("|") for line in lines]
    # "CANCELLED by 1000"
    return {job: Entry(state.split()[0], nodes=nodes) for job, state, nodes in rows if job in jobs}


def seconds(time: str) -> int | None:
    """SLURM's `days-hours:minutes:seconds` in seconds; None for UNLIMITED, INVALID and the like."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", time.strip())
    if not match:
        return None
    days, hours, minutes, rest = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def hosts(nodes: str) -> list[str]:
    """The nodes of SLURM's list `gpu[003-005,9],login1`."""
    return command("scontrol", "show", "hostnames", nodes).split() if nodes else []


def broken(nodes: Iterable[str]) -> list[str]:
    """Those of the nodes that SLURM takes for down, drained or failed."""
    if not (asked := ",".join(nodes)):
        return []
    lines = command("sinfo", "-h", "-N", "-n", asked, "-o", "%N %T").splitlines()
    return sorted({line.split()[0] for line in lines if _BROKEN.search(line.split()[1]) or line.endswith("*")})


def this_job() -> str:
    """The id of the job that this process belongs to, an array's element as `17_3`."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


def requeue(job: str) -> None:
    """Put a job back into the queue, whatever it does now."""
    command("scontrol", "requeue", job)


def exclude(job: str, nodes: Iterable[str]) -> None:
    """Have a job that waits take none of these nodes. One that was just requeued waits for some seconds at least."""
    command("scontrol", "update", f"jobid={job}", f"ExcNodeList={','.join(sorted(set(nodes)))}")


def nodes_of(partition: str) -> set[str]:
    """The names of a partition's nodes."""
    return set(command("sinfo", "-h", "-N", "-p", partition, "-o", "%N").split())


def cancel(job: str) -> None:
    """End a job, or an array with all its elements."""
    command("scancel", job)


def max_array_size() -> int:
    """How many elements an array may have here."""
    match = re.search(r"MaxArraySize\s*=\s*(\d+)", command("scontrol", "show", "config"))
    return int(match.group(1)) - 1 if match else 1000
