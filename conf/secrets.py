"""What may be secret in a config, masked: for what is shown, logged, or written to disk."""

import re
from typing import Any

_SECRET = re.compile(r"(^|_)(key|token|secret|password|credential)s?($|_)|api_?key|access_?key", re.IGNORECASE)
_URL_SECRET = re.compile(r"://[^/@\s]+@")
_NO_SECRETS = {"log_keys", "keys", "key_hash"}
# Of storage options, only these are told: names of secrets differ from store to store.
_TOLD_OPTIONS = {"endpoint_url", "region_name", "anon", "client_kwargs", "config_kwargs", "project", "timeout"}
_URL_QUERY = re.compile(r"(://[^?\s]*)\?\S+")


def without_secrets(value: Any, name: str = "") -> Any:
    """The value with passwords, keys and tokens masked, by their names, inside URLs and in `pipe:` commands."""
    if isinstance(value, dict):
        if name == "storage_options":
            return {protocol: _told(options) for protocol, options in value.items()}
        return {k: without_secrets(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(v, name) for v in value]
    if isinstance(value, str):
        if value and _SECRET.search(name) and name not in _NO_SECRETS:
            return "***"
        if value.startswith("pipe:"):
            return without_command(value)
        return _URL_QUERY.sub(r"\1?***", _URL_SECRET.sub("://***@", value))
    return value


def without_command(url: str) -> str:
    """A `pipe:` URL without its shell command, but for the program."""
    program = url.removeprefix("pipe:").split(maxsplit=1)[:1]
    # `TOKEN=... curl` begins with an assignment.
    return "pipe:" + " ".join([*(word for word in program if "=" not in word), "..."])


def _told(options: Any) -> Any:
    if not isinstance(options, dict):
        return "***" if options is not None else None
    return {k: _told(v) if isinstance(v, dict) else v if k in _TOLD_OPTIONS else "***" for k, v in options.items()}
