"""From overrides to a composed config, with Hydra's mistakes put into one sentence each."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from conf.errors import ConfigError, first_line
from conf.schema import parameters

ROOT = Path(__file__).parent
# Mappings whose keys are not all in the composed config: the user's own names, and what takes the place of a null.
_OPEN = re.compile(
    r"(cluster\.env|cluster\.sbatch|data\.(sources|fields)|(data|store)\.storage_options|ema\.lengths|log\.wandb|init_from"
    r"|networks|fields)[.=]"
)
# Keys that hold a name, which is text even where it looks like a number: samples.ema=1000, name=7.
_NAMES = ("name", "run", "average", "validation.ema", "samples.ema", "init_from.ema")
_OF_CLUSTER = re.compile(r"[+~]*cluster\b")


def compose(job: str, overrides: list[str], missing: Literal["refuse", "null"] = "refuse") -> DictConfig:
    """The config of a job (`conf/<job>.yaml`) under the given Hydra overrides.

    In this order, later ones above earlier ones: the choices of groups, the experiment's values, the scale's, the
    command line's. An experiment may be a file of the user's (`experiment=runs/sd15/experiment.yaml`, written by
    `import`), whose objects take the place of the groups' choices. What an experiment sets in a group falls away where
    the command line or the scale chooses a class that does not take it. `shrink` (set by `scale=tiny`) maps class names
    to values: every node built from that class takes them, below what the command line says, but where it has null:
    there is no such part. `items` keeps those of a list. `stand_in` maps groups to class names, and these to choices:
    where an object of the class would be built, the choice is the group's, unless the command line chooses.
    Interpolations are resolved.

    Args:
        missing: what becomes of keys that must be given and are not.

    Raises:
        ConfigError: an unknown key, group or choice, an override that does not parse, or an interpolation that fails.
    """
    parsed = [_parse(override) for override in overrides]
    written = [o for o in parsed if o.key_or_group == "experiment" and str(o.value()).endswith(".yaml")]
    parsed = [o for o in parsed if o not in written]
    _check_choices(job, parsed)
    choices = [override for override in parsed if _is_choice(override)]
    config = DictConfig({})
    try:
        with initialize_config_dir(str(ROOT), version_base="1.3"):
            config = _composed(job, choices, written, {})
            if stand_ins := _stand_ins(config, choices):
                config = _composed(job, choices, written, stand_ins)
        _drop_of_other_classes(config, choices, stand_ins)
        if "shrink" in config:
            _shrink(config, OmegaConf.to_container(config.shrink))  # type: ignore[arg-type]
        # Hydra's own way with values, for which it has no public name: `compose` would apply them before all the above.
        ConfigLoaderImpl._apply_overrides_to_config([o for o in parsed if o not in choices], config)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_sentence(job, error, config)) from error
    try:
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        key = _unresolved(config)
        raise ConfigError(
            f"{key!r} follows another value: {first_line(error).rstrip('.')}. Set {key} itself."
        ) from error
    # Items of lists last: they are missing because they follow a key that is.
    for key in sorted(OmegaConf.missing_keys(config), key=lambda key: ("[" in key, key)):
        if missing == "refuse":
            raise ConfigError(f"{key!r} must be given: add {key}=<value> to the command.")
        OmegaConf.update(config, key, None)
    return config


def split_cluster(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides of what is run, and those of `cluster`, of where."""
    own = [override for override in overrides if not _OF_CLUSTER.match(override)]
    return own, [override for override in overrides if _OF_CLUSTER.match(override)]


def _parse(override: str) -> Override:
    """The override, parsed: a value that does not parse is text (`where=width > 64`), so is a name, and what is under
    an open mapping may add (Hydra's ++)."""
    key, equals, value = override.partition("=")
    parser = OverridesParser.create()
    try:
        quote = isinstance(parser.parse_override(override).value(), int | float) and key in _NAMES
    except HydraException:
        quote = bool(equals)
    if quote:
        escaped = value.replace("'", "\\'")
        override = f"{key}='{escaped}'"
    try:
        parsed = parser.parse_override(f"++{override}" if _OPEN.match(override) else override)
        if not parsed.key_or_group:
            raise HydraException("an override without a key")
    except HydraException as error:
        raise ConfigError(f"{key + equals + value!r} is no override: it should look like key=value.") from error
    if re.match(r"hydra\b", parsed.key_or_group):
        raise ConfigError(
            f"{override!r} sets an option of Hydra, which Millrace does not use: see --help for the keys."
        )
    if parsed.is_sweep_override():
        raise ConfigError(
            f"{override!r} gives several values: a list is written {key}=[{value}], other text in quotes."
        )
    return parsed


def _is_choice(override: Override) -> bool:
    """Whether it chooses from a group, which is a folder here."""
    return (ROOT / override.key_or_group).is_dir() and not isinstance(override.value(), dict)


def _composed(job: str, choices: list[Override], written: list[Override], stand_ins: dict[str, str]) -> DictConfig:
    """The choices' config, then experiments' files."""
    overrides = [str(override.input_line) for override in choices]
    config = hydra_compose(job, overrides=[*overrides, *(f"{group}={choice}" for group, choice in stand_ins.items())])
    for file in written:
        _merge_written(config, Path(str(file.value())), {str(o.key_or_group) for o in choices} | set(stand_ins))
    return config


def _merge_written(config: DictConfig, file: Path, chosen: set[str]) -> None:
    """Put an experiment's file into the config, but for the groups that the command line chooses from."""
    if not file.is_file():
        raise ConfigError(f"experiment={file}: there is no such file.")
    given = OmegaConf.load(file)
    if not isinstance(given, DictConfig):
        raise ConfigError(f"experiment={file}: it holds no keys with values.")
    for key, value in given.items():
        if str(key) not in config:
            raise ConfigError(f"experiment={file} sets {key!r}, which this job does not have.")
        if str(key) in chosen:
            continue
        whole = "_target_" in value if isinstance(value, DictConfig) else True
        OmegaConf.update(config, str(key), value, merge=not whole, force_add=True)


def _stand_ins(config: DictConfig, choices: list[Override]) -> dict[str, str]:
    """What a scale chooses, by group, in the place of what it cannot have."""
    of_command_line = {override.key_or_group for override in choices}
    found: dict[str, str] = {}
    told: Any = OmegaConf.to_container(config.get("stand_in") or DictConfig({}))
    for group, by_class in told.items():
        for _, node in nodes(config) if group not in of_command_line else []:
            if node.get("_target_") in by_class:
                found[group] = by_class[node._target_]
    return found


def _drop_of_other_classes(config: DictConfig, choices: list[Override], stand_ins: dict[str, str]) -> None:
    """Remove the values that an experiment or a scale sets in a group, where the class that the command line or the
    scale chooses there takes no such values."""
    chosen = {_place(o): o.value() for o in choices if not o.is_delete()}
    if "scale" in chosen:
        text = (ROOT / "scale" / f"{chosen['scale']}.yaml").read_text()
        chosen = dict(re.findall(r"^\s*- override /(\S+): (\S+)$", text, re.MULTILINE)) | stand_ins | chosen
    elif "experiment" not in chosen:
        return
    file = ROOT / "experiment" / f"{chosen.get('experiment')}.yaml"
    while file.exists() and (extended := re.search(r"^\s*- /(experiment/\S+)$", file.read_text(), re.MULTILINE)):
        # What it extends may have set values for other choices.
        chosen = dict(re.findall(r"^\s*- override /(\S+): (\S+)$", file.read_text(), re.MULTILINE)) | chosen
        file = ROOT / f"{extended.group(1)}.yaml"
    for place, choice in chosen.items():
        group, _, package = place.partition("@")
        node = OmegaConf.select(config, package or group.replace("/", "."))
        if group in ("experiment", "scale") or not isinstance(node, DictConfig) or not isinstance(choice, str):
            continue
        for path, inner in nodes(node):
            if "_target_" in inner:
                takes = parameters(inner._target_, f"{place}.{path}")
                stale = [key for key in inner if not str(key).startswith("_") and not takes(str(key))]
            elif not path and not package:
                # No class of its own: it takes what its file says, and descriptions of objects (by_phase).
                own = OmegaConf.load(ROOT / group / f"{choice}.yaml")
                stale = [key for key in inner if key not in own and not isinstance(inner._get_node(key), DictConfig)]
            else:
                stale = []
            with open_dict(inner):
                for key in stale:
                    del inner[key]


def _place(choice: Override) -> str:
    """A group, and after an @ where its choice goes, if that is told."""
    return f"{choice.key_or_group}@{choice.package}" if choice.package else str(choice.key_or_group)


def _check_choices(job: str, parsed: list[Override]) -> None:
    """Whether the choices of groups are among those that `describe` lists."""
    groups = _groups(job)
    for override in parsed:
        group, value = override.key_or_group, override.value()
        options = [] if override.is_delete() else groups.get(group, [])
        if override.package is not None and not options:  # +where@data.sources.photos=svd: in no job's defaults
            options = sorted(file.stem for file in (ROOT / group).glob("*.yaml"))
        for choice in value if isinstance(value, list) else [value]:
            choice = "null" if choice is None else choice
            if options and not isinstance(choice, dict) and str(choice) not in options:
                near = _nearest(str(choice), options)
                raise ConfigError(f"Group {group!r} has no choice '{choice}'{near}; it has {', '.join(options)}.")


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


def _unresolved(config: DictConfig) -> str:
    """The first key whose interpolation fails, which OmegaConf's error does not tell."""
    for path, node in nodes(config):
        for key in node:
            try:
                value = node.get(key)
                if isinstance(value, ListConfig):
                    OmegaConf.to_container(value, resolve=True)
            except InterpolationResolutionError:
                return f"{path}.{key!s}" if path else str(key)
    raise AssertionError("every interpolation resolves")


def _shrink(config: DictConfig, shrink: dict[str, dict]) -> None:
    for _, node in nodes(config):
        values = shrink.get(node.get("_target_", ""))
        for key, value in (values or {}).items():
            if key in node and node._get_node(key)._is_none():  # type: ignore[union-attr]
                continue
            if isinstance(value, dict) and value.keys() == {"items"}:
                value = [node[key][i] for i in value["items"]]
            OmegaConf.update(node, key, value, merge=False, force_add=True)


def _sentence(job: str, error: Exception, config: DictConfig) -> str:
    """Hydra's error as one sentence that names the key, group or choice at fault."""
    text = str(error)
    key = re.search(r"Could not override '([^']+)'", text)
    if key and "in the defaults list" in text:
        return f"{job!r} has no group {key.group(1)!r} to choose (millrace {job} --help lists them)."
    if key and isinstance(error, ConfigCompositionException):
        near = _near_key(config, key.group(1))
        return f"{job!r} has no key {key.group(1)!r}{near} (millrace {job} --help lists them)."
    if twice := re.match(r"Multiple values for ([^\s']+)\.", text):
        return f"{twice.group(1)!r} has a choice already: put another in its place without the +."
    unfit = re.match(r"Error merging override \+*(.*)", text)
    if unfit:
        return f"{unfit.group(1)!r} does not fit what is there: {first_line(error.__cause__ or error).rstrip('.')}."
    return f"{first_line(error).rstrip('.')}."


def _near_key(config: DictConfig, key: str) -> str:
    """A hint at a key like the one given, or at one that ends with it (bench.rows for rows)."""
    known = [f"{path}.{name!s}" if path else str(name) for path, node in nodes(config) for name in node]
    ends = [name for name in known if name.endswith(f".{key}")]
    return f" (did you mean {ends[0]!r}?)" if ends else _nearest(key, known)


def _nearest(word: str, options: list[str]) -> str:
    close = difflib.get_close_matches(word, options, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
