"""One SLURM cluster for the session's tests, and data for what runs on it."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.lab import Lab, unavailable
from tools.demo.scenes import write_tars


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for a module's runs, with drawn scenes to train on."""
    folder = tmp_path_factory.mktemp("runs")
    write_tars(folder / "scenes", 60, seed=0)
    return folder
