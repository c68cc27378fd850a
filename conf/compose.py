"""From overrides to a composed config, with Hydra's mistakes put into one sentence each."""

import difflib
import re
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.errors import ConfigError

ROOT = Path(__file__).parent
# Mappings whose keys are the user's own names.
_OPEN = ("data.sources.", "data.storage_options.", "ema.lengths.", "log.wandb.", "networks.")


def compose(job: str, overrides: list[str]) -> DictConfig:
    """The config of a job (`conf/<job>.yaml`) under the given Hydra overrides.

    `shrink` (set by `scale=tiny`) maps class names to values: every node built from that class takes them, below what
    the command line says. Interpolations are resolved.

    Raises:
        ConfigError: an unknown key, group or choice, an override that does not parse, or an interpolation that fails.
    """
    overrides = [_opened(override) for override in overrides]
    try:
        with initialize_config_dir(str(ROOT), version_base="1.3"):
            config = hydra_compose(job, overrides=overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_sentence(job, error)) from error
    if "shrink" in config:
        chosen = {override.partition("=")[0] for override in overrides}
        for group, node in config.replace.items():
            if group not in chosen:
                config[group] = node
        _shrink(config, OmegaConf.to_container(config.shrink))  # type: ignore[arg-type]
        _reapply(config, overrides)
    try:
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        raise ConfigError(f"An interpolation in the config of {job!r} fails: {_first_line(error)}.") from error
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError(f"{missing[0]!r} must be given: add {missing[0]}=<value> to the command.")
    return config


def _opened(override: str) -> str:
    """The override as Hydra takes it: a value that does not parse is text (`where=width > 64`), and one under a mapping
    whose names are the user's own may add (Hydra's ++)."""
    try:
        OverridesParser.create().parse_override(override)
    except HydraException as error:
        key, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"{override!r} is no override: it should look like key=value.") from error
        escaped = value.replace("'", "\\'")
        override = f"{key}='{escaped}'"
    return f"++{override}" if override.startswith(_OPEN) else override


def describe(job: str, purpose: str) -> str:
    """The text of `millrace <job> --help`: its groups with their choices, and the head comments of its config file."""
    text = (ROOT / f"{job}.yaml").read_text()
    groups = re.findall(r"^\s*- (?:override )?/?([a-z_]+): ", text, re.MULTILINE)
    lines = [f"millrace {job}: {purpose}", "", "groups (choose with group=choice):"]
    width = max((len(g) for g in groups), default=0)
    for group in groups:
        choices = sorted(p.relative_to(ROOT / group).with_suffix("").as_posix() for p in (ROOT / group).rglob("*.yaml"))
        lines.append(f"  {group:<{width}}  {', '.join(choices)}")
    lines += ["", f"keys (conf/{job}.yaml; set with key=value):", ""]
    lines += ["  " + line for line in text.splitlines() if not line.lstrip().startswith("- ") and line != "defaults:"]
    return "\n".join(lines)


def nodes(config: Any, path: str = "") -> list[tuple[str, DictConfig]]:
    """Every mapping of a config with its dotted path, parents first."""
    found: list[tuple[str, DictConfig]] = []
    if isinstance(config, DictConfig):
        found.append((path, config))
        items: list[tuple[str, Any]] = [(str(key), config._get_node(key)) for key in config]
    elif isinstance(config, ListConfig):
        items = [(str(i), config._get_node(i)) for i in range(len(config))]
    else:
        return found
    for key, value in items:
        found += nodes(value, f"{path}.{key}" if path else key)
    return found


def _shrink(config: DictConfig, shrink: dict[str, dict]) -> None:
    for _, node in nodes(config):
        values = shrink.get(node.get("_target_", ""))
        for key, value in (values or {}).items():
            OmegaConf.update(node, key, value, merge=False)


def _reapply(config: DictConfig, overrides: list[str]) -> None:
    for override in OverridesParser.create().parse_overrides(overrides):
        key = override.key_or_group
        if not override.is_delete() and not (ROOT / key.lstrip("/")).is_dir():
            OmegaConf.update(config, key, override.value(), merge=True)


def _sentence(job: str, error: Exception) -> str:
    """Hydra's error as one sentence that names the key, group or choice at fault."""
    text = str(error)
    if isinstance(error, MissingConfigException):
        found = re.search(r"Could not find '([^']+)'", text)
        wanted = found.group(1) if found else (error.missing_cfg_file or "?")
        group, _, choice = str(wanted).rpartition("/")
        options = re.findall(r"^\t(\S+)$", text, re.MULTILINE)
        if group:
            return f"Group {group!r} has no choice {choice!r}{_nearest(choice, options)}; it has {', '.join(options)}."
        return f"There is no config {wanted!r}."
    key = re.search(r"Could not override '([^']+)'", text)
    if key and "in the defaults list" in text:
        return f"{job!r} has no group {key.group(1)!r} to choose (millrace {job} --help lists them)."
    if key and isinstance(error, ConfigCompositionException):
        return f"{job!r} has no key {key.group(1)!r}{_near_key(job, key.group(1))} (millrace {job} --help lists them)."
    return f"{_first_line(error)}."


def _near_key(job: str, key: str) -> str:
    with initialize_config_dir(str(ROOT), version_base="1.3"):
        config = hydra_compose(job)
    known = [f"{path}.{name!s}" if path else str(name) for path, node in nodes(config) for name in node]
    return _nearest(key, known)


def _nearest(word: str, options: list[str]) -> str:
    close = difflib.get_close_matches(word, options, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")
