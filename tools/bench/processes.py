"""Measurements in processes of their own, so that memory and warm caches are theirs alone."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

MIB = 2**20


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def memory() -> dict[str, float]:
    """MiB resident: now (VmRSS), private (RssAnon), of files and so shared (RssFile), at the peak (VmHWM).

    Raises:
        ValueError: this is not Linux.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        raise ValueError("this benchmark measures memory through /proc and needs Linux")
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return {name: int(fields[name].split()[0]) * 1024 / MIB for name in ("VmRSS", "RssAnon", "RssFile", "VmHWM")}
