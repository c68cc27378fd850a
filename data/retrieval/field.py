"""The neighbours of samples as one of their fields."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conf.errors import ConfigError
from data.fields import Field, Origin
from data.manifest import Manifest
from data.members import ContentError
from data.retrieval.database import Database
from data.scores import read_scored
from data.store import Store, redact


@dataclass(frozen=True)
class Neighbours(Field):
    """Embeddings of a sample's neighbours in a database, (k, d) float32 of length one, the nearest first. Where there
    are fewer, zeros stand in the place of those that are missing.

    Args:
        database: its folder.
        k: how many of those that are stored.
        column: that `millrace retrieve` wrote.
        most_similar: neighbours of a greater cosine are left out: the sample itself, where it is in the database
            (0.999), and near-duplicates (0.95).
        query: put the embedding of what was asked for before the neighbours, in sampling: k - 1 of them follow (arXiv
            2207.13038).
        width: d, where the database is not there to tell: a plan asks.
    """

    database: str
    k: int = 4
    column: str = "neighbours"
    most_similar: float | None = None
    query: bool = False
    width: int | None = None

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k={self.k}: at least one neighbour")

    @property
    def columns(self) -> list[str]:
        return [self.column, f"{self.column}_similarity"]

    @property
    def optional(self) -> bool:
        return False

    def check(self, manifests: Sequence[Manifest], store: Store) -> None:
        """Whether the columns are of this database.

        Raises:
            ConfigError: of another, or of another state of it.
        """
        if self.width not in (None, self.opened.width):
            raise ConfigError(
                f"the database {self.database} has embeddings of {self.opened.width} numbers, not of {self.width}: it"
                " is of another model than the conditioner was made for"
            )
        for manifest in manifests:
            scored = read_scored(manifest, self.column, store)
            if scored is None or scored.recipe.settings.get("database") != self.opened.fingerprint:
                raise ConfigError(
                    f"the column {self.column!r} beside {redact(manifest.shard)} is not of the database {self.database}"
                    f" as it is: run `millrace retrieve database={self.database} neighbours_of=..."
                    f" neighbours={self.column}`"
                )
            if scored.recipe.settings["k"] < self.k:
                stored = scored.recipe.settings["k"]
                raise ConfigError(f"k={self.k} neighbours of {stored} that are stored: retrieve with a larger k")

    def read(self, origin: Origin) -> Tensor:
        ids = np.asarray(origin.column(self.column), np.int64)
        similarities = np.asarray(origin.column(f"{self.column}_similarity"), np.float32)
        kept = ids >= 0
        if self.most_similar is not None:
            kept &= similarities <= self.most_similar
        return self._tokens(self.opened.vectors(ids[kept][: self.k]))

    def blank(self, target: tuple[int, int]) -> Tensor:
        return torch.zeros(self.k, self.width or self.opened.width)

    def given(self, text: str, target: tuple[int, int]) -> Tensor:
        """Of a text, of a picture's file, or of rows of the database: `[3, 17]`."""
        if text.lstrip().startswith("["):
            ids = np.asarray(json.loads(text), np.int64)
            if ids.ndim != 1 or not len(ids) or ids.min() < 0 or ids.max() >= self.opened.rows:
                raise ValueError(f"rows from 0 to {self.opened.rows - 1} of {self.database}")
            return self._tokens(self.opened.vectors(ids[: self.k]))
        from data.retrieval.embedding import embed_query  # with it come torch's models, which training does without

        asked = embed_query(text, self._embedder)
        (ids,), _ = self._searcher(asked, min(self.k, self.opened.rows))
        found = self.opened.vectors(ids[ids >= 0])
        return self._tokens(np.concatenate([asked, found]) if self.query else found)

    def _tokens(self, vectors: np.ndarray) -> Tensor:
        tokens = torch.zeros(self.k, self.opened.width)
        tokens[: len(vectors)] = torch.from_numpy(vectors[: self.k])
        return tokens

    @cached_property
    def opened(self) -> Database:
        """The database."""
        return Database(self.database)

    @cached_property
    def _searcher(self) -> Any:
        from data.retrieval.index import Searcher

        return Searcher(self.opened)

    @cached_property
    def _embedder(self) -> Any:
        from data.curation.clip import shared_embedder
        from data.curation.pretrained import model_folder

        name = self.opened.told.get("model_name")
        if name is None:
            raise ContentError(f"{self.database} does not tell the model that made it: give rows, [3, 17]")
        return shared_embedder(model_folder(name), "float32", "auto")
