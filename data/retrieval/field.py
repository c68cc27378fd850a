"""The neighbours of samples as one of their fields: embeddings, pictures or captions."""

import json
import logging
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conf.errors import ConfigError
from data.fields import Field, Origin
from data.hashing import text64
from data.manifest import Manifest
from data.members import ContentError
from data.retrieval.database import Database, same_model
from data.retrieval.originals import Originals
from data.scores import read_scored
from data.store import Store, redact
from data.transforms import CENTER, Framing, frame

log = logging.getLogger(__name__)

_SHOWN = 128  # pixels of a neighbour on a contact sheet


@dataclass(frozen=True)
class NeighbourField(Field):
    """What a database has of a sample's neighbours, the nearest first.

    Args:
        database: its folder.
        k: how many of those that are stored.
        column: that `millrace retrieve` wrote.
        most_similar: neighbours of a greater cosine are left out: near-duplicates (0.95). (`millrace retrieve
            without_itself=true` has left out the sample itself, and patches of it.)
        model: that the database is of, as checkpoints tell it of training's (`Database.model`); another is refused.
    """

    database: str
    k: int = 4
    column: str = "neighbours"
    most_similar: float | None = None
    model: str | None = None

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k={self.k}: at least one neighbour")

    @property
    def columns(self) -> list[str]:
        return [self.column, f"{self.column}_similarity"]

    def made_of(self, manifests: Sequence[Manifest], store: Store) -> str | None:
        found = (read_scored(manifest, self.column, store) for manifest in manifests)
        columns = {json.dumps(one.recipe.settings, sort_keys=True) for one in found if one is not None}
        return f"database {self.opened.fingerprint}, columns {text64(' '.join(sorted(columns))):016x}"

    def check(self, manifests: Sequence[Manifest], store: Store) -> None:
        """Whether the columns are of this database, and both have k neighbours.

        Raises:
            ConfigError: of another, or of another state of it; fewer neighbours or rows.
        """
        if self.k > self.opened.rows:
            raise ConfigError(f"k={self.k} neighbours of a database of {self.opened.rows} rows: choose a smaller k")
        for manifest in manifests:
            scored = read_scored(manifest, self.column, store)
            if scored is None or scored.recipe.settings.get("database") != self.opened.fingerprint:
                raise ConfigError(
                    f"the column {self.column!r} beside {redact(manifest.shard)} is not of the database {self.database}"
                    f" as it is: run `millrace retrieve database={self.database} neighbours_of=..."
                    f" column={self.column}`"
                )
            if scored.recipe.settings["k"] < self.k:
                stored = scored.recipe.settings["k"]
                raise ConfigError(f"k={self.k} neighbours of {stored} that are stored: retrieve with a larger k")

    def read(self, origin: Origin) -> Any:
        ids = np.asarray(origin.column(self.column), np.int64)
        similarities = np.asarray(origin.column(f"{self.column}_similarity"), np.float32)
        return self._of(self.chosen(ids, similarities), origin.geometry.target)

    def chosen(self, ids: np.ndarray, similarities: np.ndarray) -> np.ndarray:
        """Of ids of neighbours and their cosines (..., stored), those that a sample comes with: a vector of ids."""
        kept = ids >= 0
        if self.most_similar is not None:
            kept &= similarities <= self.most_similar
        return ids[kept & (np.cumsum(kept, axis=-1) <= self.k)]

    def given(self, text: str, target: tuple[int, int]) -> Any:
        """Of a text, of a picture's file, of a row of the database, `~17`, or of rows themselves, `[3, 17]`."""
        return self._answer(*self._sought(text), target)

    def of_text(self, text: str, target: tuple[int, int]) -> Any:
        """Of a text, whatever it looks like."""
        asked = self._embedder.texts([text])
        return self._answer(asked, self._nearest(asked), target)

    def _answer(self, asked: np.ndarray | None, ids: np.ndarray, target: tuple[int, int]) -> Any:
        """The value for an embedding that was asked for, if any, whose neighbours these rows are."""
        return self._of(ids, target)

    @abstractmethod
    def _of(self, ids: np.ndarray, target: tuple[int, int]) -> Any:
        """The value of rows of the database, k at most, for pictures of that height and width."""

    def _sought(self, text: str) -> tuple[np.ndarray | None, np.ndarray]:
        """The embedding, (1, d), of a text or of a picture's file, and the rows that are asked for, k at most."""
        text = text.strip()
        if text.startswith("["):
            return None, self._rows(text)[: self.k]
        if text.startswith("~"):
            return None, self._nearest(self.opened.vectors(self._rows(text)))
        from data.retrieval.embedding import embed_query  # with it come torch's models, which training does without

        asked = embed_query(text, self._embedder)
        return asked, self._nearest(asked)

    def _rows(self, text: str) -> np.ndarray:
        """Of a text, `[3, 17]` or `~17`."""
        try:
            told = json.loads(text.removeprefix("~"))
        except ValueError:
            told = None
        rows = told if text.startswith("[") else [told]
        if not rows or not all(type(row) is int and 0 <= row < self.opened.rows for row in rows):
            raise ValueError(
                f"rows are given as [3, 17], or one as ~17, from 0 to {self.opened.rows - 1} of {self.database}"
            )
        return np.asarray(rows, np.int64)

    def _nearest(self, query: np.ndarray) -> np.ndarray:
        """Ids of the k nearest of a query (1, d)."""
        (ids,), _ = self._searcher(query, self.k)
        return ids[ids >= 0]

    @cached_property
    def opened(self) -> Database:
        """The database.

        Raises:
            ConfigError: it is of another model.
        """
        return self._open()

    def _open(self) -> Database:
        database = Database(self.database)
        same = True if self.model is None else same_model(self.model, database.model)
        if same is None:
            log.warning("nothing tells that the database %s is of the model that training's is of", self.database)
        elif not same:
            raise ConfigError(
                f"the database {self.database} holds embeddings of another model than the one that was trained with"
                f" ({database.told.get('model_name')}): make it with training's"
            )
        return database

    @cached_property
    def _searcher(self) -> Any:
        from data.retrieval.index import Searcher

        return Searcher(self.opened)

    @cached_property
    def _embedder(self) -> Any:
        from data.curation.clip import shared_embedder
        from data.curation.pretrained import fingerprint, model_folder

        name = self.opened.told.get("model_name")
        if name is None:
            raise ContentError(f"{self.database} does not tell the model that made it: give rows, [3, 17]")
        folder = model_folder(name)
        if fingerprint(folder) != self.opened.told["model"]:
            raise ConfigError(
                f"{folder} is no longer the model that made the database {self.database}: put that one there, or give"
                " rows, [3, 17]"
            )
        return shared_embedder(folder, "float32", "auto")


@dataclass(frozen=True)
class Neighbours(NeighbourField):
    """Embeddings of neighbours, (k, d) float32 of length one. Where there are fewer, zeros stand in the place of those
    that are missing.

    Args:
        query: put the embedding of what was asked for before the neighbours, in sampling: k - 1 of them follow (arXiv
            2207.13038), none with k = 1.
        width: d, where the database is not there to tell: a plan asks.
        store, manifest_folder: as of `NeighbourPictures`, which a contact sheet shows.
    """

    query: bool = False
    width: int | None = None
    store: Store = field(default_factory=Store)
    manifest_folder: str | None = None

    def _open(self) -> Database:
        database = super()._open()
        if self.width not in (None, database.width):
            raise ConfigError(
                f"the database {self.database} has embeddings of {database.width} numbers, not of {self.width}: it"
                " is of another model than the conditioner was made for"
            )
        return database

    def blank(self, target: tuple[int, int]) -> Tensor:
        return torch.zeros(self.k, self.width or self.opened.width)

    def _answer(self, asked: np.ndarray | None, ids: np.ndarray, target: tuple[int, int]) -> Tensor:
        """As many as there are, (up to k, d)."""
        vectors = self.opened.vectors(ids)
        if self.query and asked is not None:
            vectors = np.concatenate([asked, vectors])[: self.k]
        return torch.from_numpy(vectors)

    def shown(self) -> Field | None:
        """See `Field.shown`: their pictures, or captions, as far as the database tells them."""
        of = (self.database, self.k, self.column, self.most_similar, self.model)
        if self.opened.tells_shards:
            return NeighbourPictures(*of, _SHOWN, self.store, self.manifest_folder)
        return NeighbourCaptions(*of)

    def _of(self, ids: np.ndarray, target: tuple[int, int]) -> Tensor:
        tokens = torch.zeros(self.k, self.opened.width)
        tokens[: len(ids)] = torch.from_numpy(self.opened.vectors(ids))
        return tokens


@dataclass(frozen=True)
class NeighbourPictures(NeighbourField):
    """Pictures of neighbours, or the patches that they are, (k, 3, H, W) uint8: the middle, in the sample's height and
    width. Where there are fewer, zeros stand in the place of those that are missing.

    Args:
        size: height and width, in the place of the sample's.
        store: where the database's shards lie.
        manifest_folder: where their manifests lie that are not beside them.
    """

    size: int | None = None
    store: Store = field(default_factory=Store)
    manifest_folder: str | None = None

    def check(self, manifests: Sequence[Manifest], store: Store) -> None:
        """See `NeighbourField.check`; the database's shards, too."""
        super().check(manifests, store)
        _ = self._originals

    def blank(self, target: tuple[int, int]) -> Tensor:
        return torch.zeros(self.k, 3, *self._size(target), dtype=torch.uint8)

    def _of(self, ids: np.ndarray, target: tuple[int, int]) -> Tensor:
        pictures, size = self.blank(target), self._size(target)
        for place, row in enumerate(ids.tolist()):
            frame(self._originals.picture(row, size), size, Framing(CENTER, CENTER, flip=False), pictures[place])
        return pictures

    def _size(self, target: tuple[int, int]) -> tuple[int, int]:
        return target if self.size is None else (self.size, self.size)

    @cached_property
    def _originals(self) -> Originals:
        return Originals(self.opened, self.store, self.manifest_folder)


@dataclass(frozen=True)
class NeighbourCaptions(NeighbourField):
    """Captions of neighbours, k of them. Where there are fewer, or a neighbour has none, "" stands in their place."""

    def check(self, manifests: Sequence[Manifest], store: Store) -> None:
        """See `NeighbourField.check`; whether the database has captions, too."""
        super().check(manifests, store)
        if not self.opened.tells_captions:
            raise ConfigError(f"the metadata of the database {self.database} have no captions for its neighbours")

    def blank(self, target: tuple[int, int]) -> list[str]:
        return [""] * self.k

    def _of(self, ids: np.ndarray, target: tuple[int, int]) -> list[str]:
        told = self.opened.metadata(ids.tolist(), ["caption"])
        return [*(one.get("caption") or "" for one in told), *[""] * (self.k - len(ids))]
