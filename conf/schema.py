"""Types of a composed config, checked before anything starts: constructors' annotations are the schema."""

import inspect
import re
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from importlib import import_module
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from pydantic import ConfigDict, TypeAdapter, ValidationError

from conf.errors import ConfigError
from conf.secrets import without_secrets


def check(config: DictConfig, schema: type) -> None:
    """Hold a job's config against the job's dataclass, and every `_target_` in it against its constructor.

    Raises:
        ConfigError: a key unknown to its constructor, one that is missing, or a value of another type.
    """
    _check(OmegaConf.to_container(config), schema, "")  # type: ignore[arg-type]


def build(config: Any, **extra: Any) -> Any:
    """The object that a config node with a `_target_` describes, nested nodes built first (Hydra's instantiate).

    Raises:
        ConfigError: a constructor refuses its values.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        return instantiate(config, _convert_="all", **extra)
    except InstantiationException as error:
        if not isinstance(error.__cause__, ValueError):
            raise
        text, at = str(error.__cause__), re.search(r"^full_key: (\S+)", str(error), re.MULTILINE)
        path = at.group(1) if at else ""
        if re.match(r"\w+=", text):  # a constructor's own name for a key: lr=-1.0
            text = f"{path}.{text}" if path else text
        raise ConfigError(text if text.startswith(path) else f"{path}: {text}") from error


def target(name: str, path: str) -> Callable[..., Any]:
    """The class or function that a `_target_` names."""
    module, _, attribute = name.rpartition(".")
    try:
        found: Any = import_module(module)
        return getattr(found, attribute)
    except (ImportError, AttributeError, ValueError):
        # A class method, `module.Class.method`, needs one more step.
        outer, _, middle = module.rpartition(".")
        try:
            return getattr(getattr(import_module(outer), middle), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(f"{path}._target_ names {name!r}, which cannot be imported: {error}.") from error


def parameters(name: str, path: str) -> Callable[[str], bool]:
    """Whether the constructor that a `_target_` names takes a key."""
    kinds, _, open_ended = _signature(target(name, path))
    return lambda key: open_ended or key in kinds


def defaults(name: str, path: str) -> dict[str, Any]:
    """What the constructor that a `_target_` names takes for keys that are left out."""
    made = target(name, path)
    found = {p.name: p.default for p in inspect.signature(made).parameters.values() if p.default is not p.empty}
    own = fields(made) if is_dataclass(made) else ()
    return found | {f.name: f.default_factory() for f in own if f.default_factory is not MISSING}


def _check(value: dict, schema: Callable[..., Any], path: str) -> None:
    kinds, required, open_ended = _signature(schema)
    for key, item in value.items():
        if str(key).startswith("_") or (not path and key in ("shrink", "stand_in", "scale", "experiment")):
            continue
        where = f"{path}.{key}" if path else str(key)
        if key in kinds:
            _check_value(item, kinds[key], where)
        elif not open_ended:
            takes = f"it takes {', '.join(kinds)}" if kinds else "it takes none"
            raise ConfigError(f"{where!r} is no key of {_name(schema)}; {takes}.")
    for key in required:
        if key not in value:
            raise ConfigError(f"{path + '.' + key if path else key!r} is missing: {_name(schema)} needs it.")


def _check_value(value: Any, kind: Any, path: str) -> None:
    """A value against an annotation: targets against their constructors, dataclasses by field, containers by item."""
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if isinstance(value, dict) and "_target_" in value:
        made = target(value["_target_"], path)
        _check_class(made, kinds, path)
        if not value.get("_partial_", False):
            _check(value, made, path)
        return
    record = next((k for k in kinds if isinstance(k, type) and is_dataclass(k)), None)
    of_items = [Any if k is Any else get_args(k)[-1] for k in kinds if k is Any or get_origin(k) is type(value)]
    if isinstance(value, dict) and of_items:
        for key, item in value.items():
            if not isinstance(key, str):
                raise ConfigError(f"{path} has the key {key}, which must be text: put it in quotes.")
            _check_value(item, of_items[0], f"{path}.{key}")
    elif isinstance(value, list) and of_items:
        for i, item in enumerate(value):
            _check_value(item, of_items[0], f"{path}[{i}]")
    elif isinstance(value, dict) and record is not None:
        _check(value, record, path)
    elif isinstance(value, dict) and any(_is_described(k) for k in kinds):
        raise ConfigError(f"{path!r} is no {_names(kinds)}: it has no _target_ that names the class to build.")
    else:
        _check_leaf(value, kind, path)


def _check_class(made: Callable[..., Any], kinds: tuple[Any, ...], path: str) -> None:
    """Whether a target makes an object of one of the kinds."""
    built = made if isinstance(made, type) else get_type_hints(made).get("return", Any)
    if Any in kinds or not isinstance(built, type):
        return
    if not any(issubclass(built, kind) for kind in kinds if isinstance(kind, type)):
        raise ConfigError(f"{path}._target_ names {_name(made)}, which is no {_names(kinds)}.")


@cache
def _signature(schema: Callable[..., Any]) -> tuple[dict[str, Any], list[str], bool]:
    """Names with their types, names without a default, and whether any further name is taken."""
    if is_dataclass(schema) and isinstance(schema, type):
        hints = get_type_hints(schema, include_extras=True)
        names = {f.name: hints[f.name] for f in fields(schema) if f.init}
    else:
        constructor = getattr(schema, "__init__") if isinstance(schema, type) else schema  # noqa: B009
        hints = get_type_hints(constructor, include_extras=True)
        names = {n: hints.get(n, Any) for n in inspect.signature(schema).parameters}
    parameters = inspect.signature(schema).parameters.values()
    closed = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    required = [p.name for p in closed if p.default is p.empty]
    return {p.name: names[p.name] for p in closed}, required, len(closed) < len(list(parameters))


def _check_leaf(value: Any, kind: Any, path: str) -> None:
    if isinstance(kind, type) and is_dataclass(kind):  # its fields may be of classes that pydantic knows nothing of
        told = f"{_name(kind)} is a mapping with {_fields(kind)}"
        raise ConfigError(f"{path}={_shown(value, path)!r} is of the wrong type: {told}.")
    adapter = TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True))
    try:
        adapter.validate_python(value, strict=True)  # "no" is no False, 2.0 no int
    except ValidationError as error:
        first = error.errors()[0]
        fault = "is out of range" if first["type"].startswith(("greater", "less")) else "is of the wrong type"
        raise ConfigError(
            f"{path}={_shown(value, path)!r} {fault}: {first['msg'][0].lower()}{first['msg'][1:]}."
        ) from error


def _fields(record: Any) -> str:
    return ", ".join(f.name for f in fields(record) if f.init)


def _shown(value: Any, path: str) -> Any:
    """The value as a sentence may show it: its path may say that it is secret."""
    keys = path.split(".")
    return "***" if "storage_options" in keys else without_secrets(value, keys[-1])


def _is_described(kind: Any) -> bool:
    """Whether configs describe such objects by a `_target_`."""
    return isinstance(kind, type) and kind.__module__ != "builtins" and not is_dataclass(kind)


def _names(kinds: tuple[Any, ...]) -> str:
    return " or ".join(_name(kind) for kind in kinds if kind is not type(None))


def _name(schema: Callable[..., Any]) -> str:
    return getattr(schema, "__qualname__", str(schema))
