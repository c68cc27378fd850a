"""The modules that the tests of data/ share."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory, monkeypatch):
    """Jobs write to runs/ where they are started."""
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
