"""Embeddings of shards, a part of a database for each: of whole pictures, or of patches of them, and of captions.

A part's metadata are written last, and tell what made it and the marks of its embeddings: a part is there when they
are, and all of it is what they tell.
"""

import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from conf.errors import ConfigError
from data.curation.base import Media
from data.curation.clip import Embedder, shared_embedder
from data.curation.media import read_media
from data.curation.pretrained import Device, Dtype, fingerprint, model_folder
from data.decode import DecodeError, decode_image
from data.hashing import mix64, text64
from data.manifest import Manifest
from data.media_size import IMAGE_EXTENSIONS
from data.parquet import to_parquet, told_at
from data.retrieval.database import SIDES, Side, embedding_path, map_embeddings, metadata_path
from data.retrieval.marks import mark_at, mark_of
from data.store import Store, redact
from data.tasks import Task
from models.hub import load_part
from models.image import embedding_width

_WHOLE = 512
"""Pixels that suffice of a whole picture: models see fewer."""
_COLUMNS = ("caption", "url")


@dataclass(frozen=True)
class Patches:
    """Squares at random places of pictures, as retrieval-augmented diffusion's database has them (arXiv 2204.11824).

    Args:
        per_picture: how many of each.
        size: side in pixels of the picture; its shorter side, where that is less.
        seed: of their places.
    """

    per_picture: int = 1
    size: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if self.per_picture < 1 or self.size < 1:
            raise ValueError(f"patches.per_picture={self.per_picture} and patches.size={self.size} must be positive")

    def places(self, key: str, height: int, width: int) -> list[tuple[int, int, int, int]]:
        """Left, top, right and bottom of each patch of a picture, which follow from its key."""
        side = min(self.size, height, width)
        found = []
        for number in range(self.per_picture):
            drawn = np.random.default_rng(mix64(text64(key), number, self.seed))
            left, top = int(drawn.integers(width - side + 1)), int(drawn.integers(height - side + 1))
            found.append((left, top, left + side, top + side))
        return found


@dataclass(frozen=True)
class Embedding:
    """How pictures and captions become embeddings.

    Args:
        model: of transformers, CLIP, SigLIP ...: a folder, or a name on the hub.
        texts: embed captions too.
        patches: of pictures; null: whole ones.
        batch: pictures at a time.
        dtype: that the model computes in.
        device: auto, cpu or cuda.
    """

    model: str
    texts: bool = False
    patches: Patches | None = None
    batch: int = 64
    dtype: Dtype = "float32"
    device: Device = "auto"

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"embedding.batch={self.batch} must be positive")
        if self.texts and self.patches is not None:
            raise ValueError("embedding.texts=true embeds the captions of whole pictures: leave out embedding.patches")

    @property
    def sides(self) -> list[Side]:
        """What is embedded."""
        return [side for side in SIDES if side == "image" or self.texts]

    def embedder(self) -> Embedder:
        """The model, loaded once in a process."""
        return shared_embedder(model_folder(self.model), self.dtype, self.device)

    def width(self) -> int:
        """d, as the model's configuration tells it: its weights need not be there.

        Raises:
            ValueError: there is no such configuration, or one that tells no width.
        """
        from transformers import AutoConfig

        try:
            return embedding_width(load_part(AutoConfig.from_pretrained, self.model), self.model)
        except ValueError as error:
            raise ValueError(
                f"embedding.model={self.model} cannot be read, which tells the width: give width=... ({error})"
            ) from error

    def fingerprint(self) -> str:
        """Of the model."""
        return fingerprint(model_folder(self.model))

    def recipe(self) -> dict[str, Any]:
        """All that embeddings depend on, as JSON values."""
        patches = asdict(self.patches) if self.patches is not None else None
        return {
            "model": self.fingerprint(),
            "dtype": self.dtype,
            "batch": self.batch,
            "texts": self.texts,
            "patches": patches,
        }


def embed_query(query: str, embedder: Embedder) -> np.ndarray:
    """The embedding, (1, d), of a text, or of the picture whose file it names.

    Raises:
        ValueError: there is no such picture, or it is damaged; the model embeds pictures only.
    """
    path = Path(query)
    picture = path.suffix[1:].lower() in IMAGE_EXTENSIONS
    try:
        there = bool(path.suffix) and path.is_file()
    except OSError:  # a text that is too long for a name
        there = False
    if not there and picture:
        raise ValueError(
            f"{query} is named as a picture, and there is no such file: correct its path, or drop the ending"
        )
    if not there:
        return embedder.texts([query])
    try:
        pixels = decode_image(path.read_bytes()).pixels
    except (DecodeError, OSError) as error:
        raise ValueError(f"{query} cannot be read as a picture: {error}") from error
    return embedder.images([pixels])


def part_names(count: int) -> list[str]:
    """The numbers of so many parts, as files have them: alphabetical order is that of numbers."""
    return [f"{i:0{max(5, len(str(count - 1)))}d}" for i in range(count)]


@dataclass(frozen=True)
class PartWriter:
    """Writes a database's parts.

    Args:
        folder: of the database.
        embedding: how pictures become embeddings.
        store: where the shards lie.
        max_errors: share of a shard's samples that may have no picture to embed.
        marks: of the files that there were, as far as they are known; see `Database`.
    """

    folder: Path
    embedding: Embedding
    store: Store
    max_errors: float
    marks: Mapping[str, str] = field(default_factory=dict)

    def is_done(self, manifest: Manifest, part: str) -> bool:
        """Whether a part holds what this shard's would, all of it."""
        path, told = metadata_path(self.folder, part), self._told(manifest, part)
        try:
            if not told or self.marks.get(self._name(path)) not in (None, mark_at(path)):
                return False
            rows = pq.read_metadata(path).num_rows
        except FileNotFoundError:  # another task has taken it away meanwhile
            return False
        return all(self._is_whole(side, part, rows, told) for side in self.embedding.sides)

    def discard_damaged(self, manifest: Manifest, part: str) -> None:
        """Have a part that tells that it is done, and is not whole, tell so no longer: where marks are not known, it
        may pass for whole."""
        if self._told(manifest, part) and not self.is_done(manifest, part):
            metadata_path(self.folder, part).unlink(missing_ok=True)

    def files(self, part: str) -> dict[str, str]:
        """The marks of the files of a part that is done."""
        path = metadata_path(self.folder, part)
        told = told_at(str(path), Store()).get("files", {})
        of_sides = {side: embedding_path(self.folder, side, part) for side in self.embedding.sides}
        found = {self._name(of_side): told.get(side) or mark_at(of_side) for side, of_side in of_sides.items()}
        return found | {self._name(path): mark_at(path)}

    def write_all(self, manifests: Sequence[Manifest], task: Task) -> None:
        """What one task does: write the parts of its own shards, those that are not done.

        Raises:
            ValueError: too many of a shard's samples cannot be embedded.
            StoreError: a store fails.
        """
        names = part_names(len(manifests))
        for i in task.own(range(len(manifests))):
            if self.is_done(manifests[i], names[i]):
                task.skip(manifests[i].rows)
            else:
                self._write(manifests[i], names[i], task)

    def _write(self, manifest: Manifest, part: str, task: Task) -> None:
        rows: list[dict[str, Any]] = []
        vectors: dict[Side, list[np.ndarray]] = {side: [] for side in self.embedding.sides}
        failed: Counter[str] = Counter()
        for samples, found, of_found, errors in embedded(manifest, self.embedding, self.store):
            rows += found
            failed += errors
            for side, array in of_found.items():
                vectors[side].append(array.astype(np.float16))
            task.advance(len(samples), errors)
        if failed.total() > self.max_errors * manifest.rows:
            reason, count = failed.most_common(1)[0]
            raise ValueError(
                f"{failed.total()} of the {manifest.rows} samples of {redact(manifest.shard)} cannot be embedded, more"
                f" than max_errors={self.max_errors} allows: {count} times {reason}. Raise max_errors to go on without"
                " them"
            )
        path = metadata_path(self.folder, part)
        path.unlink(missing_ok=True)  # it would tell that the part is whole
        marks: dict[str, str] = {}
        nothing = np.zeros((0, self.embedding.embedder().width), np.float16)
        for side, arrays in vectors.items():
            buffer = io.BytesIO()
            np.save(buffer, np.concatenate([nothing, *arrays]))
            Store().write(str(embedding_path(self.folder, side, part)), buffer.getvalue())
            marks[side] = mark_of(buffer)
        told = {"recipe": self._recipe, "shard": manifest.digest, "errors": dict(failed), "files": marks}
        Store().write(str(path), to_parquet(_table(rows), told))

    def _told(self, manifest: Manifest, part: str) -> dict[str, Any]:
        """What a part tells; nothing where it is of another shard or recipe."""
        told = told_at(str(metadata_path(self.folder, part)), Store())
        return told if (told.get("recipe"), told.get("shard")) == (self._recipe, manifest.digest) else {}

    def _is_whole(self, side: Side, part: str, rows: int, told: dict[str, Any]) -> bool:
        path = embedding_path(self.folder, side, part)
        known = {told.get("files", {}).get(side), self.marks.get(self._name(path))} - {None}
        if known - {mark_at(path)}:
            return False
        try:
            return len(map_embeddings(path, "")) == rows
        except ConfigError:
            return False

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    @cached_property
    def _recipe(self) -> dict[str, Any]:
        return self.embedding.recipe()


def embedded(
    manifest: Manifest, embedding: Embedding, store: Store
) -> Iterator[tuple[list[Media], list[dict[str, Any]], dict[Side, np.ndarray], Counter[str]]]:
    """A shard's samples in batches, what was embedded of them: metadata and embeddings, a row each, and how many could
    not be, by reason.

    Raises:
        StoreError: the store fails.
    """
    embedder, patches = embedding.embedder(), embedding.patches
    side = _WHOLE if patches is None else 1 << 30
    row = 0
    for samples in read_media(manifest, store, _COLUMNS, frozenset({"image"}), side, embedding.batch):
        rows: list[dict[str, Any]] = []
        pictures: list[np.ndarray] = []
        failed: Counter[str] = Counter()
        for number, sample in enumerate(samples, row):
            failure = sample.failure() if sample.kind == "image" else None
            if sample.kind != "image" or failure is not None:
                failed[failure.reason if failure is not None else "no picture"] += 1
                continue
            told = {"image_path": sample.key, "shard": redact(manifest.shard), "row": number, **sample.row}
            image = sample.image
            for place in patches.places(sample.key, *image.shape[:2]) if patches is not None else [None]:
                rows.append(told | {"patch": list(place) if place is not None else None})
                left, top, right, bottom = place or (0, 0, image.shape[1], image.shape[0])
                pictures.append(image[top:bottom, left:right])
        vectors: dict[Side, np.ndarray] = {}
        if pictures:
            vectors["image"] = np.concatenate(
                [embedder.images(pictures[i : i + embedding.batch]) for i in range(0, len(pictures), embedding.batch)]
            )
            if embedding.texts:
                vectors["text"] = embedder.texts([one["caption"] or "" for one in rows])
        yield samples, rows, vectors, failed
        row += len(samples)


def _table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    schema = pa.schema(
        {
            "image_path": pa.string(),
            "caption": pa.string(),
            "url": pa.string(),
            "shard": pa.string(),
            "row": pa.int64(),
            "patch": pa.list_(pa.int32()),
        }
    )
    return pa.Table.from_pylist(list(rows), schema)
