"""The neighbours that pictures are drawn of: how many, in which database, of which queries."""

from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from pydantic import PositiveInt

from conf.errors import ConfigError, mistakes
from conf.schema import build
from data.draws import Draws
from data.hashing import text64
from data.retrieval.field import NeighbourField, Neighbours
from data.retrieval.pseudo_queries import count_neighbours, proposal
from data.tars import TarData
from models.conditions import NeighbourEncoder
from trainer.loading import Loaded
from trainer.sampling import SAMPLING_STEP


@dataclass
class NeighboursConfig:
    """conf/neighbours, whose comments explain the keys."""

    k: PositiveInt | None
    query: bool | None
    top_m: float | None
    alike: bool
    column: str | None


def neighbour_fields(loaded: Loaded) -> dict[str, NeighbourField]:
    """The fields of a model that are neighbours, as it was trained with them."""
    return {name: one for name, one in loaded.fields.items() if isinstance(one, NeighbourField)}


class NeighbourReader:
    """The neighbours that pictures are drawn of.

    Args:
        config: of the `sample` or the `evaluate` job.
        loaded: what is sampled from.

    Raises:
        ConfigError: another database for a model without neighbours, or one of another width or too few rows.
    """

    def __init__(self, config: Any, loaded: Loaded) -> None:
        self._config, self._loaded = config, loaded
        self._trained = neighbour_fields(loaded)
        asked = config.neighbours
        if not self._trained and (config.database is not None or asked.k is not None or asked.query is not None):
            key = "neighbours" if config.database is None else "database"
            raise ConfigError(f"{key}: the model was trained without neighbours.")
        self.fields = {name: self.as_asked(name, one) for name, one in self._trained.items()}
        """As the pictures have them, by name."""

    def as_asked(self, name: str, trained: Any) -> NeighbourField:
        """A field of training with what is asked for in its place."""
        asked = self._config.neighbours
        changes: dict[str, Any] = {"database": self._config.database or trained.database}
        changes |= {"k": asked.k or trained.k, "column": asked.column or trained.column}
        if isinstance(trained, Neighbours):
            changes["query"] = trained.query if asked.query is None else asked.query
            encoders: Any = self._loaded.networks["conditioner"]
            reading = (one for one in encoders.numbered() if isinstance(one, NeighbourEncoder) and one.reads == name)
            changes["width"] = next((one.width for one in reading), None)
        return replace(trained, **changes)

    def fingerprint(self, drawn: bool) -> str:
        """Of the databases, and, for `drawn`, of the entries that may be drawn."""
        told = [f"{name} {kind.opened.fingerprint}" for name, kind in self.fields.items()]
        if drawn and self._config.neighbours.top_m is not None:
            told += [
                f"drawn {text64(repr((p.ids.tolist(), p.weights.tolist()))):016x}" for p in self._proposals.values()
            ]
        return ", ".join([*told, f"drawn={drawn}"])

    def drawn(self, seed: int) -> dict[str, str]:
        """Of each field a query that the seed draws: an entry of the database, whose neighbours are to be taken."""
        unit = Draws(seed, ((SAMPLING_STEP, 0, 0),)).unit("pseudo-query")[0]
        return {name: f"~{self._entry(name, unit)}" for name in self.fields}

    def _entry(self, name: str, unit: float) -> int:
        if self._config.neighbours.top_m is None:
            return int(unit * self.fields[name].opened.rows)
        return self._proposals[name](unit)

    @cached_property
    def _proposals(self) -> dict[str, Any]:
        asked = self._config.neighbours
        found = {}
        for name, trained in self._trained.items():
            if asked.column is None and self._moved(name):
                raise ConfigError(
                    "database: how often its entries are neighbours of training's samples is told by a column that"
                    f" `millrace retrieve database={self._config.database} neighbours_of=<training's shards>"
                    " column=<column>` writes: give neighbours.column=<column>, or neighbours.top_m=null."
                )
            counted = replace(self.fields[name], k=trained.k)
            with mistakes():
                found[name] = proposal(count_neighbours(self._data(name, counted), counted), asked.top_m, asked.alike)
        return found

    def _moved(self, name: str) -> bool:
        """Whether neighbours are in another database than in training, wherever that lies."""
        if self._config.database is None:
            return False
        try:
            trained = self._trained[name].opened
        except ConfigError:  # it is no longer there
            return True
        return trained.fingerprint != self.fields[name].opened.fingerprint

    def _data(self, name: str, counted: NeighbourField) -> TarData:
        """Training's, with no other field."""
        node = deepcopy(self._loaded.config["data"])
        node["fields"] = {}
        for source in node["sources"].values():
            source.pop("fields", None)
        data: TarData = build(node)
        data.fields = {name: counted}
        return data
