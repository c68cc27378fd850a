"""Types of a composed config, checked before anything starts: constructors' annotations are the schema."""

import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import cache
from importlib import import_module
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from conf.errors import ConfigError


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
        if isinstance(error.__cause__, ValueError):
            raise ConfigError(str(error.__cause__)) from error
        raise


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


def _check(value: dict, schema: Callable[..., Any], path: str) -> None:
    kinds, required, open_ended = _signature(schema)
    for key, item in value.items():
        if str(key).startswith("_") or (not path and key in ("shrink", "replace", "scale", "experiment")):
            continue
        where = f"{path}.{key}" if path else str(key)
        if key not in kinds:
            if open_ended:
                continue
            raise ConfigError(f"{where!r} is no key of {_name(schema)}; it takes {', '.join(kinds)}.")
        if not _descend(item, where):
            _check_type(item, kinds[key], where)
    for key in required:
        if key not in value:
            raise ConfigError(f"{path + '.' + key if path else key!r} is missing: {_name(schema)} needs it.")


def _descend(item: Any, path: str) -> bool:
    """Check the targets inside a value; True if the value holds any, so that its own type is theirs to check."""
    if isinstance(item, dict):
        if "_target_" in item:
            if not item.get("_partial_", False):
                _check(item, target(item["_target_"], path), path)
            return True
        inside = [(v, f"{path}.{k}") for k, v in item.items()]
    elif isinstance(item, list):
        inside = [(v, f"{path}[{i}]") for i, v in enumerate(item)]
    else:
        return False
    found = [_descend(value, where) for value, where in inside]  # all of them, not up to the first
    return any(found)


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


def _check_type(value: Any, kind: Any, path: str) -> None:
    if is_dataclass(kind) and isinstance(kind, type) and isinstance(value, dict):
        _check(value, kind, path)
        return
    inner_kind = get_args(kind)[-1] if get_origin(kind) is dict else None
    if is_dataclass(inner_kind) and isinstance(value, dict):
        for name, item in value.items():
            _check_type(item, inner_kind, f"{path}.{name}")
        return
    try:
        adapter = TypeAdapter(kind, config=None if is_dataclass(kind) else ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:
        adapter = TypeAdapter(kind)
    try:
        adapter.validate_python(value, strict=True)  # "no" is no False, 2.0 no int
    except ValidationError as error:
        first = error.errors()[0]
        inner = "".join(f".{part}" for part in first["loc"] if isinstance(part, str) and part.isidentifier())
        raise ConfigError(
            f"{path}={value!r} is of the wrong type{f' at {inner}' if inner else ''}: "
            f"{first['msg'][0].lower()}{first['msg'][1:]}."
        ) from error


def _name(schema: Callable[..., Any]) -> str:
    return getattr(schema, "__qualname__", str(schema))
