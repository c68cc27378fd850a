"""Starting DeepSpeed, which compiles its collectives of CPUs at first use."""

import logging
import os
import shutil
import sys
import time
from pathlib import Path

import torch

LONGEST_COMPILE_S = 900.0
_EXTENSIONS = ("deepspeed_shm_comm", "deepspeed_ccl_comm")


def start_deepspeed(device: torch.device) -> None:
    """DeepSpeed on top of the process group that there is.

    Raises:
        ValueError: see `refuse_abandoned_locks`.
    """
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # It compiles with the ninja of this environment.
    if shutil.which("ninja") is None:
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    refuse_abandoned_locks()
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def refuse_abandoned_locks() -> None:
    """Do not wait for a compiler that was killed: torch waits for as long as its lock is there, which nothing removes.

    Raises:
        ValueError: a lock is older than any compilation takes.
    """
    from torch.utils.cpp_extension import _get_build_directory

    for name in _EXTENSIONS:
        lock = Path(_get_build_directory(name, verbose=False)) / "lock"
        try:
            age = time.time() - lock.stat().st_mtime
        except FileNotFoundError:
            continue
        if age > LONGEST_COMPILE_S:
            raise ValueError(
                f"{lock} is {age / 60:.0f} minutes old: a process that compiled DeepSpeed's collectives was killed, and"
                " all others would wait for it. Remove the file, if nothing compiles there now"
            )
