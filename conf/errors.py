"""The error that a mistake in a command line or a config raises."""


class ConfigError(ValueError):
    """A mistake of the user's: its text is one sentence that names the key, type, group or file at fault."""
