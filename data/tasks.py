"""A job's work in N tasks: all started here as processes, or one of them at a time, as in a job array.

Task i of N takes the work's items i, i + N, i + 2 N ... What a task makes must not depend on N: then the job gives the
same whichever way it runs. Processes are spawned, with one thread each; they end with the process that started them,
however that ends.
"""

import io
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, Generic, TypeVar

from conf.errors import ConfigError
from data.progress import Advance, Progress
from data.tracking import RunLog

_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
_RAISED = (ConfigError, ValueError, OSError)  # what a job raises for its user, the narrowest first
R = TypeVar("R")
T = TypeVar("T")


@dataclass(frozen=True)
class Tasks:
    """A job's `cluster`.

    Args:
        tasks: N, how many the work is split into.
        task: run just this one of them, 0 .. N - 1; null: start all of them here.
    """

    tasks: int = 1
    task: int | None = None

    def __post_init__(self) -> None:
        if self.tasks < 1:
            raise ValueError(f"cluster.tasks={self.tasks} must be at least 1")
        if self.task is not None and not 0 <= self.task < self.tasks:
            raise ValueError(f"cluster.task={self.task} is not one of the {self.tasks} tasks, 0 to {self.tasks - 1}")

    @property
    def here(self) -> list[int]:
        """The tasks that this command runs."""
        return list(range(self.tasks)) if self.task is None else [self.task]

    @property
    def part(self) -> str | None:
        """The part of a run that this command is, if it is not the whole of it."""
        return None if self.task is None else f"task_{self.task}"

    def totals(self, samples: Sequence[int]) -> list[int]:
        """Samples of each task, of items of so many."""
        return [sum(samples[task :: self.tasks]) for task in range(self.tasks)]


@dataclass(frozen=True)
class Task:
    """One of `count` tasks, as the work sees it: its own items, and whom to tell of progress."""

    index: int
    count: int
    tell: Callable[[Advance], Any]

    def own(self, items: Sequence[T]) -> Sequence[T]:
        """This task's share of all items."""
        return items[self.index :: self.count]

    def advance(self, samples: int, errors: Mapping[str, int] | None = None) -> None:
        """So many more samples are done, some of them with errors, which are counted by reason."""
        self.tell(Advance(samples, 0, errors or {}))

    def skip(self, samples: int, errors: Mapping[str, int] | None = None) -> None:
        """So many samples were done by an earlier run: they do not count for the speed."""
        self.tell(Advance(samples, samples, errors or {}))


def run_tasks(
    work: Callable[[Task], R], tasks: Tasks, totals: Sequence[int], description: str, log: RunLog | None = None
) -> list[R]:
    """Run the tasks that belong here under one progress bar: done, samples/s, time left, errors.

    A single task runs in this process, several are spawned: then `work` and what it returns must be picklable, and the
    caller's main module importable. In either case with one thread per task, so that sums round alike.

    Args:
        work: does one task's share.
        tasks: which run here.
        totals: samples of each of the N tasks.
        description: of the bar.
        log: that gets rows about the progress.

    Returns:
        What `work` returned for each task that ran here.

    Raises:
        ValueError, OSError: as the first task that failed raised them; the others are stopped.
        ChildProcessError: a task was killed.
        RuntimeError: a task raised anything else; holds its traceback.
    """
    assert len(totals) == tasks.tasks, "one total per task"
    with Progress(sum(totals[i] for i in tasks.here), description, log) as progress:
        if len(tasks.here) == 1:
            one_thread()
            return [work(Task(tasks.here[0], tasks.tasks, progress.tell))]
        return _spawn(work, tasks, progress)


def one_thread() -> None:
    """Keep libraries that are imported by now, and would start a thread per core, to one: tasks are what uses cores."""
    if "cv2" in sys.modules:
        sys.modules["cv2"].setNumThreads(1)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def _spawn(work: Callable[[Task], R], tasks: Tasks, progress: Progress) -> list[R]:
    context = multiprocessing.get_context("spawn")
    results: dict[int, R] = {}
    processes: dict[Connection, tuple[int, SpawnProcess]] = {}
    try:
        with _environment(_ONE_THREAD):
            for i in tasks.here:
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(work, i, tasks.tasks, sender), name=f"task {i}")
                processes[receiver] = i, process
                process.start()
                sender.close()  # the child's is then the only one, so that its end is seen here
        open_ends = list(processes)
        while open_ends:
            for connection in wait(open_ends):
                assert isinstance(connection, Connection)
                i, process = processes[connection]
                try:
                    message = connection.recv()
                except EOFError:
                    open_ends.remove(connection)
                    process.join()
                    if i not in results:
                        raise ChildProcessError(_death(i, tasks.tasks, process.exitcode)) from None
                    continue
                if isinstance(message, _Failure):
                    raise message.kind(message.text) from RuntimeError(f"in task {i}:\n{message.trace}")
                if isinstance(message, _Result):
                    results[i] = message.value
                else:
                    progress.tell(message)
    finally:
        for connection, (_, process) in processes.items():
            if process.is_alive():
                process.terminate()
            if process.pid is not None:
                process.join()
            connection.close()
    return [results[i] for i in tasks.here]


@dataclass(frozen=True)
class _Result(Generic[R]):
    value: R


@dataclass(frozen=True)
class _Failure:
    kind: type[Exception]
    text: str
    trace: str


def _child(work: Callable[[Task], R], index: int, count: int, connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the parent then ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # whole lines, where PYTHONUNBUFFERED would mix those of several tasks
            stream.reconfigure(line_buffering=True, write_through=False)
    one_thread()
    try:
        connection.send(_Result(work(Task(index, count, connection.send))))
    except Exception as error:
        kind = next((kind for kind in _RAISED if isinstance(error, kind)), None)
        trace = traceback.format_exc()
        connection.send(_Failure(kind, str(error), trace) if kind else _Failure(RuntimeError, trace, trace))
    connection.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as the command line does: DuckDB's bindings print pages about leaks while the interpreter shuts down


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _death(index: int, count: int, code: int | None) -> str:
    how = f"by signal {-code}" if code is not None and code < 0 else f"with status {code}"
    return (
        f"task {index} of {count} ended {how} before its work was done: if memory ran out, use fewer cluster.tasks;"
        " the same command goes on where it stopped"
    )


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Environment variables that processes started meanwhile inherit."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
