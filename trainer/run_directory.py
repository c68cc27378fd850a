"""Where a run writes: `runs/<name>/{config.yaml, metrics.jsonl, keys.jsonl, checkpoints/, samples/, ...}`."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conf.errors import ConfigError
from data.store import protocol_of, redact

_SECRET = re.compile(r"(^|_)(key|token|secret|password|credential)s?($|_)|api_?key|access_?key", re.IGNORECASE)
_URL_SECRET = re.compile(r"://[^/@\s]+@")
_NO_SECRETS = {"log_keys", "keys", "key_hash"}
# Of storage options, only these are told: names of secrets differ from store to store.
_TOLD_OPTIONS = {"endpoint_url", "region_name", "anon", "client_kwargs", "config_kwargs", "project", "timeout"}
_URL_QUERY = re.compile(r"(://[^?\s]*)\?\S+")


class RunDirectory:
    """The paths of a run. Creating it makes the folder.

    Raises:
        ValueError: the folder cannot be made.
    """

    def __init__(self, runs: str, name: str):
        self.path = Path(runs) / name
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.keys = self.path / "keys.jsonl"
        self.quarantine = self.path / "quarantine.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.samples = self.path / "samples"
        self.wandb = self.path / "wandb.json"
        self.report = self.path / "report.html"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"runs={runs}: cannot make the folder {self.path}: {error.strerror}") from error

    def write_config(self, config: dict[str, Any]) -> None:
        """Write the composed config, whose secrets are masked."""
        import yaml

        self.config.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))

    def rewind(self, step: int) -> None:
        """Drop the metrics that an interrupted run wrote beyond the step that it resumes from: no step stands twice."""
        if self.metrics.exists():
            kept = [line for line, row in _rows(self.metrics) if row.get("step", 0) <= step]
            scratch = self.metrics.with_suffix(".tmp")
            scratch.write_text("".join(kept))
            scratch.replace(self.metrics)


def check_name(name: str) -> None:
    """Refuse a run's name that is no folder within `runs`.

    Raises:
        ConfigError: it is empty, absolute, or holds "..".
    """
    path = Path(name)
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise ConfigError(f"name={name!r} is no folder within `runs`: give the run a name such as name=first")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a .jsonl file; a last line cut short by a crash is left out."""
    return [row for _, row in _rows(path)]


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
        if protocol_of(value) == "pipe":
            return redact(value)
        return _URL_QUERY.sub(r"\1?***", _URL_SECRET.sub("://***@", value))
    return value


def _told(options: Any) -> Any:
    if not isinstance(options, dict):
        return "***" if options is not None else None
    return {k: _told(v) if isinstance(v, dict) else v if k in _TOLD_OPTIONS else "***" for k, v in options.items()}


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for line in path.read_text().splitlines(keepends=True):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and line.endswith("\n"):
            yield line, row
