"""Which models the databases are of that a run's samples have neighbours in: told by its checkpoints' configs, so that
neither a resumption nor a sampler takes the embeddings of another for those that the network knows."""

import logging
from copy import deepcopy
from typing import Any

from conf.errors import ConfigError
from data.fields import Field
from data.retrieval.database import same_model
from data.retrieval.field import NeighbourField
from data.tars import TarData

log = logging.getLogger(__name__)


def with_models(config: dict[str, Any], data: TarData) -> dict[str, Any]:
    """The config of a run, in which each field of neighbours tells the model of its database."""
    told, fields = deepcopy(config), _fields(data)
    for place, node in _nodes(told).items():
        one = fields[place]
        if isinstance(one, NeighbourField):
            node["model"] = one.opened.model
    return told


def check_models(then: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to go on from the one config to the other, both of `with_models`, with neighbours of another model.

    Raises:
        ConfigError: a database is of another model.
    """
    before = _nodes(then)
    for place, node in _nodes(now).items():
        one, other = (side.get("model") if "database" in side else None for side in (before.get(place, {}), node))
        same = same_model(one, other) if one is not None and other is not None else True
        if same is None:
            log.warning("%s: nothing tells that the database %s is of the model that it was", place, node["database"])
        elif not same:
            raise ConfigError(
                f"{place}: the database {node['database']} holds embeddings of another model than the run was trained"
                " with so far: take one of that model, or begin another run."
            )


def _nodes(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What describes fields of samples, by key."""
    data = config.get("data") or {}
    found = {"data.fields": data.get("fields")}
    found |= {f"data.sources.{name}.fields": one.get("fields") for name, one in (data.get("sources") or {}).items()}
    return {f"{key}.{name}": node for key, fields in found.items() for name, node in (fields or {}).items() if node}


def _fields(data: TarData) -> dict[str, Field]:
    """The fields of samples, by key."""
    found = {"data.fields": data.fields}
    found |= {f"data.sources.{name}.fields": one.fields for name, one in data.sources.items()}
    return {f"{key}.{name}": one for key, fields in found.items() for name, one in fields.items()}
