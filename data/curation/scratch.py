"""Folders for what global filters keep on disk while they work."""

import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil


@contextmanager
def scratch_folder(root: Path, name: str) -> Iterator[Path]:
    """A folder that is removed in the end; those that killed processes of this machine left are removed now.

    Args:
        root: that it is made in.
        name: of the filter.
    """
    root.mkdir(parents=True, exist_ok=True)
    prefix = f"{name}-{platform.node()}-"
    for left in root.glob(f"{prefix}*"):
        if not psutil.pid_exists(int(left.name.removeprefix(prefix).partition("-")[0])):
            shutil.rmtree(left, ignore_errors=True)
    with TemporaryDirectory(prefix=f"{prefix}{os.getpid()}-", dir=root) as folder:
        yield Path(folder)
