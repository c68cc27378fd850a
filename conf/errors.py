"""The error that a mistake in a command line or a config raises."""

from collections.abc import Iterator
from contextlib import contextmanager


class ConfigError(ValueError):
    """A mistake of the user's: its text is one sentence that names the key, type, group or file at fault."""


@contextmanager
def mistakes() -> Iterator[None]:
    """What is refused in here can only be refused for what the user has written: a ValueError becomes a ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def first_line(error: BaseException) -> str:
    """What an error says, without what some libraries put under it: the query, a traceback, a list of all there is."""
    return (str(error).strip() or repr(error)).splitlines()[0]
