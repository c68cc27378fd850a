"""The modules that the tests of data/ share, and a folder of each test's own to run jobs in."""

from tests.data.curation.conftest import elsewhere

__all__ = ["elsewhere"]
