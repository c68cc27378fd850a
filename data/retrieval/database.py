"""A database: embeddings of pictures (and of their captions), what they are of, and indexes over them, in the layout of
clip-retrieval, which serves and reads it.

    img_emb/img_emb_00000.npy          (m, d) float16, of length one
    text_emb/text_emb_00000.npy        likewise, of the captions, where asked for
    metadata/metadata_00000.parquet    m rows: image_path (the sample's key), caption, url, shard, row, patch
    image.index, text.index            FAISS indexes, whose ids count the rows of all parts in order
    database.json                      ours: the model, the parts, how the indexes are searched, marks of all files

The files of a number are a part, with a row for each picture or patch in all of them. A folder that clip-retrieval
wrote has no `database.json`, and is read as well. Files of ours are held against their marks (see `data.retrieval.
marks`) before anything is taken from them.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash

from conf.errors import ConfigError, first_line
from data.parquet import told_at
from data.retrieval.marks import mark_at, size_in
from data.retrieval.metadata import MetadataReader
from data.store import Store

UNTOLD = "the model"
Side = Literal["image", "text"]
SIDES: tuple[Side, ...] = ("image", "text")
VERSION = 1
_PREFIX = {"image": "img_emb", "text": "text_emb"}


def same_model(one: str, other: str) -> bool | None:
    """Whether two of `Database.model` are one; None where that is not told."""
    return True if one == other else None if one.startswith(UNTOLD) or other.startswith(UNTOLD) else False


def local_folder(folder: str) -> Path:
    """The folder of a database.

    Raises:
        ConfigError: it is a URL.
    """
    if "://" in folder:
        raise ConfigError(f"database={folder}: databases are mapped into memory, so give a folder, not a URL")
    return Path(folder)


def embedding_path(folder: Path, side: Side, part: str) -> Path:
    """Where a part's embeddings lie."""
    return folder / _PREFIX[side] / f"{_PREFIX[side]}_{part}.npy"


def metadata_path(folder: Path, part: str) -> Path:
    """Where a part's metadata lie."""
    return folder / "metadata" / f"metadata_{part}.parquet"


def index_path(folder: Path, side: Side) -> Path:
    """Where an index lies."""
    return folder / f"{side}.index"


def told_path(folder: Path) -> Path:
    """Where a database of ours says what it is."""
    return folder / "database.json"


def read_told(folder: Path) -> dict[str, Any]:
    """What a database of ours says that it is; nothing where it says nothing.

    Raises:
        ConfigError: it is damaged, or of another version.
    """
    path = told_path(folder)
    if not path.exists():
        return {}
    try:
        told = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}): {remedy(folder)}") from error
    if not isinstance(told, dict):
        raise ConfigError(f"{path} is damaged: {remedy(folder)}")
    if told.get("version") != VERSION:
        raise ConfigError(
            f"{path} is of version {told.get('version')}, and this Millrace reads {VERSION}: use the Millrace that"
            f" wrote it, or {remedy(folder)}"
        )
    checksum = told.pop("checksum", None)
    if checksum not in (None, _checksum(told)):
        raise ConfigError(f"{path} is damaged, it is not what was written: {remedy(folder)}")
    return told


def write_told(folder: Path, told: dict[str, Any]) -> None:
    """Have a database of ours say what it is."""
    content = json.dumps(told | {"checksum": _checksum(told)}, indent=1)
    Store().write(str(told_path(folder)), content.encode())


def remedy(folder: Path) -> str:
    """What mends a database of ours, for errors."""
    return f"run `millrace retrieve database={folder} shards=...` again, which mends it"


def _checksum(told: dict[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(told, sort_keys=True).encode())


@dataclass(frozen=True)
class Part:
    """One of a database's parts.

    Args:
        name: its number, as files have it.
        start: the id of its first row.
        rows: how many it has.
    """

    name: str
    start: int
    rows: int


class Database:
    """A database to read. Embeddings are mapped into memory, and read by id.

    Args:
        folder: of this machine, or one that it mounts: FAISS maps files.

    Raises:
        ConfigError: there is none, it was not made to its end, files of it are missing, or do not fit each other.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = local_folder(str(folder))
        if not (self.folder / "img_emb").is_dir():
            raise ConfigError(
                f"database={folder} has no img_emb/: make one with `millrace retrieve database={folder} shards=...`, or"
                " with clip-retrieval"
            )
        self._maps: dict[Path, np.ndarray] = {}
        self._checked: set[Path] = set()
        self.told: dict[str, Any] = read_told(self.folder)
        self._marks: dict[str, str] = self.told.get("files", {})
        self._refuse_unfinished()
        self.parts = self._find_parts()
        self.rows = sum(part.rows for part in self.parts)
        self.width = self._map("image", self.parts[0]).shape[1]
        for part in self.parts:
            for side in self.sides:
                shape = self._map(side, part).shape
                if shape != (part.rows, self.width):
                    self.check_files()
                    raise ConfigError(
                        f"{embedding_path(self.folder, side, part.name)} has the shape {shape} where the part has"
                        f" {part.rows} rows and the first part {self.width} numbers each: {self.remedy}"
                    )

    @property
    def sides(self) -> list[Side]:
        """What there are embeddings of."""
        return [side for side in SIDES if (self.folder / _PREFIX[side]).is_dir()]

    @property
    def model(self) -> str:
        """Which its embeddings are of: its fingerprint. Where that is not told (clip-retrieval does not), what tells
        the database from others."""
        return self.told.get("model") or f"{UNTOLD} of database {self.fingerprint}"

    @cached_property
    def fingerprint(self) -> str:
        """Of all that its neighbours depend on: its content, not where it or its model lies, or how long it took."""
        told: dict[str, Any] = {key: self.told.get(key) for key in ("version", "model", "recipe", "parts")}
        for side, index in self.told.get("indexes", {}).items():
            told[f"{side} index"] = [index.get("identity"), index.get("search")]
        digest = xxhash.xxh3_128(json.dumps(told, sort_keys=True).encode())
        if "parts" not in self.told:
            for part in self.parts:
                vectors = self._map("image", part)
                digest.update(f"{part.rows}".encode())
                digest.update(vectors[:: max(1, part.rows // 16)].tobytes())
        return digest.hexdigest()

    def vectors(self, ids: np.ndarray, side: Side = "image") -> np.ndarray:
        """Embeddings of length one, (*ids.shape, d) float32."""
        flat = np.asarray(ids, np.int64).ravel()
        found = np.empty((len(flat), self.width), np.float32)
        places = np.searchsorted(self._starts, flat, side="right") - 1
        for place in np.unique(places):
            part, of_part = self.parts[place], places == place
            found[of_part] = self._checked_map(side, part)[flat[of_part] - part.start]
        return _unit(found).reshape(*np.shape(ids), self.width)

    def of_part(self, part: Part, side: Side = "image", rows: slice = slice(None)) -> np.ndarray:
        """A part's embeddings, all or some of its rows, of length one, (m, d) float32."""
        return _unit(np.asarray(self._checked_map(side, part)[rows], np.float32))

    def metadata(self, ids: Sequence[int], columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """What the rows of these ids are of, in the order given.

        Raises:
            ConfigError: the metadata are not there, are damaged, or have other rows than the embeddings.
        """
        found: list[dict[str, Any]] = [{} for _ in ids]
        places = np.searchsorted(self._starts, np.asarray(ids, np.int64), side="right") - 1
        for place in np.unique(places).tolist():
            asked = np.flatnonzero(places == place).tolist()
            start = self.parts[place].start
            for i, one in zip(asked, self._metadata.rows(place, [ids[i] - start for i in asked], columns), strict=True):
                found[i] = one
        return found

    @property
    def tells_shards(self) -> bool:
        """Whether the metadata tell the shards that the rows were made of."""
        return {"shard", "row"} <= self._told_columns

    @cached_property
    def shards(self) -> dict[str, str]:
        """By part that has rows, the shard that it was made of, without what is secret of its URL."""
        parts = [part for part in self.parts if part.rows]
        told = self.metadata([part.start for part in parts], ["shard"])
        return {part.name: one["shard"] for part, one in zip(parts, told, strict=True)}

    @property
    def tells_captions(self) -> bool:
        """Whether the metadata have captions."""
        return "caption" in self._told_columns

    @property
    def remedy(self) -> str:
        """What mends it, for errors."""
        return remedy(self.folder) if self.told else "write it anew with clip-retrieval, or whatever wrote it"

    def marks(self, side: Side) -> dict[str, str]:
        """Of a side's embeddings, by path."""
        return {name: mark for name, mark in self._marks.items() if name.startswith(f"{_PREFIX[side]}/")}

    def check_files(self) -> None:
        """Refuse any file that is not what was written, as far as marks tell, in a ConfigError."""
        for name in self._marks:
            self._check(self.folder / name)

    def check_model(self, fingerprint: str, name: str) -> None:
        """Refuse queries that another model embedded, in a ConfigError."""
        own = self.told.get("model")
        if own is not None and own != fingerprint:
            raise ConfigError(
                f"the database {self.folder} holds embeddings of another model than {name}: query it with the"
                f" model it was made with ({self.told.get('model_name')})"
            )

    def check_shard(self, row: int, shard: str, digest: str) -> None:
        """Refuse a shard, of that digest, that is another than the row was made of, in a ConfigError."""
        part = self.parts[int(np.searchsorted(self._starts, row, side="right")) - 1]
        made_of = dict(self.told.get("parts", []))
        if made_of.get(part.name, digest) != digest:
            raise ConfigError(f"{shard} is no longer what the database {self.folder} was made of: {self.remedy}")

    def _refuse_unfinished(self) -> None:
        first = min((self.folder / "metadata").glob("*.parquet"), default=None)
        if "unfinished" in self.told:
            raise ConfigError(f"{self.folder} is not finished, as {told_path(self.folder)} tells: {self.remedy}")
        if not self.told and first is not None and "recipe" in told_at(str(first), Store()):
            raise ConfigError(f"{told_path(self.folder)} is missing: {remedy(self.folder)}")

    def _find_parts(self) -> list[Part]:
        there = {path.stem.removeprefix("img_emb_") for path in (self.folder / "img_emb").glob("img_emb_*.npy")}
        names = [name for name, _ in self.told.get("parts", [])] or sorted(there)
        told = {path.relative_to(self.folder).as_posix() for path in self._paths(names)} | self._marks.keys()
        for name in sorted(told):
            path, mark = self.folder / name, self._marks.get(name)
            if not path.exists():
                raise ConfigError(f"{path} is missing: {self.remedy}")
            if mark is not None and path.stat().st_size != size_in(mark):
                raise ConfigError(
                    f"{path} has {path.stat().st_size} bytes where {size_in(mark)} were written: {self.remedy}"
                )
        for name in sorted(there.difference(names)):
            path = embedding_path(self.folder, "image", name)
            raise ConfigError(f"{path} is none of the parts that {told_path(self.folder)} tells of: {self.remedy}")
        parts, start = [], 0
        for name in names:
            rows = len(map_embeddings(embedding_path(self.folder, "image", name), self.remedy))
            parts.append(Part(name, start, rows))
            start += rows
        if not start:
            raise ConfigError(f"the database {self.folder} holds no embedding")
        return parts

    def _paths(self, parts: Sequence[str]) -> Iterator[Path]:
        """Where the embeddings lie that parts must have."""
        sides = SIDES if self.told.get("recipe", {}).get("texts") else self.sides
        return (embedding_path(self.folder, side, part) for part in parts for side in sides)

    def _checked_map(self, side: Side, part: Part) -> np.ndarray:
        self._check(embedding_path(self.folder, side, part.name))
        return self._map(side, part)

    def _check(self, path: Path) -> None:
        """Refuse a file that is not what was written; once for each, as they are used."""
        if path in self._checked:
            return
        mark = self._marks.get(path.relative_to(self.folder).as_posix())
        if mark is not None and mark_at(path) != mark:
            raise ConfigError(f"{path} is not what was written: {self.remedy}")
        self._checked.add(path)

    def _map(self, side: Side, part: Part) -> np.ndarray:
        path = embedding_path(self.folder, side, part.name)
        if path not in self._maps:
            self._maps[path] = map_embeddings(path, self.remedy)
        return self._maps[path]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}  # which would be copied, and not mapped, in another process

    @cached_property
    def _told_columns(self) -> set[str]:
        first = next(i for i, part in enumerate(self.parts) if part.rows)
        return set(self._metadata.columns(first))

    @cached_property
    def _metadata(self) -> MetadataReader:
        paths = [metadata_path(self.folder, part.name) for part in self.parts]
        marks = [self._marks.get(path.relative_to(self.folder).as_posix()) for path in paths]
        return MetadataReader(paths, [part.rows for part in self.parts], marks, self.remedy)

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.array([part.start for part in self.parts])


def map_embeddings(path: Path, remedy: str) -> np.ndarray:
    """A file of embeddings, (m, d) float16 or float32, mapped into memory.

    Raises:
        ConfigError: it holds something else, which the remedy mends.
    """
    try:
        vectors = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # headers are read as Python, and raise what that may
        reason = first_line(error)[:200]
        raise ConfigError(f"{path} cannot be read ({reason}): {remedy}") from error
    if vectors.ndim != 2 or vectors.dtype not in (np.float16, np.float32):
        raise ConfigError(
            f"{path} holds {vectors.dtype} of shape {vectors.shape}, not a row of numbers for each picture: {remedy}"
        )
    return vectors


def _unit(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
