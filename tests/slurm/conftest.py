"""One SLURM cluster for the session's tests."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.lab import Lab, unavailable


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """The cluster; tests are skipped, and say why, where there can be none."""
    if reason := unavailable():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="lab-"))  # pytest's own folders are too deep for a socket's path
    cluster = Lab(folder / "slurm")
    yield cluster
    cluster.close()
    shutil.rmtree(folder)
