"""From overrides to a composed config, with Hydra's mistakes put into one sentence each."""

import difflib
import re
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.errors import ConfigError

ROOT = Path(__file__).parent
# Mappings whose keys are not all in the composed config: the user's own names, and what takes the place of a null.
_OPEN = re.compile(r"(data\.sources|data\.storage_options|ema\.lengths|log\.wandb|init_from|networks)[.=]")
# Keys that hold a name, which is text even where it looks like a number: samples.ema=0.9999, name=7.
_NAMES = ("name", "average", "validation.ema", "samples.ema", "init_from.ema")


def compose(job: str, overrides: list[str]) -> DictConfig:
    """The config of a job (`conf/<job>.yaml`) under the given Hydra overrides.

    `shrink` (set by `scale=tiny`) maps class names to values: every node built from that class takes them, below what
    the command line says. Interpolations are resolved.

    Raises:
        ConfigError: an unknown key, group or choice, an override that does not parse, or an interpolation that fails.
    """
    overrides = [_parsable(override) for override in overrides]
    _check_choices(job, overrides)
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


def _parsable(override: str) -> str:
    """The override as Hydra takes it: a value that does not parse is text (`where=width > 64`), so is a name, and what
    is under an open mapping may add (Hydra's ++)."""
    key, equals, value = override.partition("=")
    try:
        parsed = OverridesParser.create().parse_override(override).value()
        quote = key in _NAMES and isinstance(parsed, int | float)
    except HydraException as error:
        if not equals:
            raise ConfigError(f"{override!r} is no override: it should look like key=value.") from error
        quote = True
    if quote:
        escaped = value.replace("'", "\\'")
        override = f"{key}='{escaped}'"
    return f"++{override}" if _OPEN.match(override) else override


def _check_choices(job: str, overrides: list[str]) -> None:
    """Whether the choices of groups are among those that `describe` lists."""
    groups = _groups(job)
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:  # the value is text by now, so it is the key
        raise ConfigError(f"An override does not parse: {_first_line(error)}.") from error
    for override in parsed:
        group, value = override.key_or_group, override.value()
        options = [] if override.is_delete() else groups.get(group, [])
        if override.package is not None and not options:  # +where@data.sources.photos=svd: in no job's defaults
            options = sorted(file.stem for file in (ROOT / group).glob("*.yaml"))
        for choice in value if isinstance(value, list) else [value]:
            choice = "null" if choice is None else choice
            if options and isinstance(choice, str) and choice not in options:
                raise ConfigError(
                    f"Group {group!r} has no choice {choice!r}{_nearest(choice, options)}; it has {', '.join(options)}."
                )


def describe(job: str, purpose: str) -> str:
    """The text of `millrace <job> --help`: its groups with their choices, and its config file without the defaults."""
    text = (ROOT / f"{job}.yaml").read_text()
    groups = _groups(job)
    lines = [f"millrace {job}: {purpose}", "", "groups (choose with group=choice):"]
    width = max(map(len, groups), default=0)
    lines += [f"  {group:<{width}}  {', '.join(choices)}" for group, choices in groups.items()]
    lines += ["", f"keys (conf/{job}.yaml; set with key=value):", ""]
    lines += ["  " + line for line in text.splitlines() if not line.lstrip().startswith("- ") and line != "defaults:"]
    return "\n".join(lines)


def _groups(job: str) -> dict[str, list[str]]:
    """The groups that a job's defaults name, and below each those that its choices' own defaults name (for `process`
    also `process/density`), with their choices."""
    found: dict[str, list[str]] = {}
    pending = _named_groups(ROOT / f"{job}.yaml")
    while pending:
        group = pending.pop(0)
        files = sorted((ROOT / group).rglob("*.yaml"))
        nested = sorted({name for file in files for name in _named_groups(file) if (ROOT / group / name).is_dir()})
        own = [file for file in files if not any(ROOT / group / name in file.parents for name in nested)]
        found[group] = [file.relative_to(ROOT / group).with_suffix("").as_posix() for file in own]
        pending = [f"{group}/{name}" for name in nested] + pending
    return found


def _named_groups(file: Path) -> list[str]:
    """Groups, relative to the file's own, that the defaults of a config choose from, or of configs that it extends."""
    text = file.read_text()
    extended = [file.with_name(f"{name}.yaml") for name in re.findall(r"^\s*- ([a-z]+)$", text, re.MULTILINE)]
    inherited = [group for base in extended if base.exists() for group in _named_groups(base)]
    return inherited + re.findall(r"^\s*- ([a-z_]+): ", text, re.MULTILINE)


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
            OmegaConf.update(node, key, value, merge=False, force_add=True)


def _reapply(config: DictConfig, overrides: list[str]) -> None:
    for override in OverridesParser.create().parse_overrides(overrides):
        key = override.key_or_group
        if not override.is_delete() and not (ROOT / key.lstrip("/")).is_dir():
            OmegaConf.update(config, key, override.value(), merge=True)


def _sentence(job: str, error: Exception) -> str:
    """Hydra's error as one sentence that names the key, group or choice at fault."""
    text = str(error)
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
