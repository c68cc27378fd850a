"""Run a function on n real gloo ranks.

    results = ranks(2).run(function, *args)

calls `function(*args)` on both ranks of a process group that lives for the whole test session, and returns what each
rank returned. The function must be at the top level of a module; what goes in and out is pickled. Processes come from
multiprocessing's fork server, which has imported torch already, so that a new group starts in a moment.
"""

import atexit
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_TIMEOUT_S = 300.0


class Ranks:
    """A process group of n ranks that waits for functions to run."""

    def __init__(self, size: int):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed.fsdp", "trainer.engines.fsdp", "deepspeed"])
        rendezvous = Path(tempfile.mkdtemp(prefix="ranks-")) / "rendezvous"
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, str(rendezvous), theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        atexit.register(self.close)

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float = _TIMEOUT_S) -> list[Any]:
        """`function(*args)` on every rank; what each returned, by rank. A rank that fails or takes longer than the
        timeout ends the group and raises RuntimeError with that rank's traceback."""
        for pipe in self._pipes:
            pipe.send((function, args))
        results = []
        for rank, pipe in enumerate(self._pipes):
            try:
                if not pipe.poll(timeout_s):
                    raise RuntimeError(f"rank {rank} has not answered after {timeout_s:.0f} s")
                failed, result = pipe.recv()
            except (EOFError, RuntimeError) as error:
                self.close()
                raise RuntimeError(f"rank {rank} of {len(self._pipes)}: {error!r}") from error
            if failed:
                self.close()
                raise RuntimeError(f"rank {rank} of {len(self._pipes)} failed:\n{result}")
            results.append(result)
        return results

    def close(self) -> None:
        """End the processes; the next `ranks(n)` starts new ones."""
        if _session.get(len(self._pipes)) is self:
            del _session[len(self._pipes)]
        atexit.unregister(self.close)
        for process in self._processes:
            process.kill()
            process.join()


_session: dict[int, Ranks] = {}


def ranks(size: int) -> Ranks:
    """The session's process group of that many ranks."""
    if size not in _session:
        _session[size] = Ranks(size)
    return _session[size]


def _serve(rank: int, size: int, rendezvous: str, pipe: Connection) -> None:
    os.environ.update(OMP_NUM_THREADS="1", TORCH_FR_BUFFER_SIZE="512")
    # Libraries that look for a launcher (DeepSpeed) find one.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=size)
    while True:
        try:
            function, args = pipe.recv()
            answer = (False, function(*args))
        except EOFError:
            os._exit(0)
        except BaseException:
            answer = (True, traceback.format_exc())
        pipe.send(answer)
