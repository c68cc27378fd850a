"""The samples that a database's rows were made of: their pictures and captions."""

from typing import Any

import numpy as np

from conf.errors import ConfigError
from data.decode import DecodeError, decode_image
from data.index import ensure_indexed
from data.manifest_reader import ManifestReader
from data.media_size import media_member
from data.members import ContentError, read_member
from data.retrieval.database import Database
from data.store import Store

_MEMBERS = ("key", "extensions", "offsets", "sizes")


class Originals:
    """Pictures of a database's rows, read from the shards that it was made of.

    Args:
        database: whose metadata tell shards and rows.
        store: where the shards lie.
        manifest_folder: where manifests lie that are not beside them.

    Raises:
        ConfigError: the metadata do not tell the shards, or a shard is no longer what the database was made of.
        StoreError: a store fails.
    """

    def __init__(self, database: Database, store: Store, manifest_folder: str | None = None) -> None:
        if not database.tells_shards:
            raise ConfigError(f"the metadata of {database.folder} do not tell the shards that its pictures are in")
        self._database, self._store = database, store
        parts, shards = [part for part in database.parts if part.rows], list(database.shards.values())
        manifests = ensure_indexed(shards, store, manifest_folder)
        for part, manifest in zip(parts, manifests, strict=True):
            database.check_shard(part.start, manifest.shard, manifest.digest)
        self._rows = ManifestReader(store, [one.url for one in manifests], [one.digest for one in manifests])
        self._numbers = {shard: i for i, shard in enumerate(shards)}

    def picture(self, row: int, cover: tuple[int, int]) -> np.ndarray:
        """What was embedded: a picture, or a patch of one, (h, w, 3) uint8 RGB; a whole picture perhaps smaller than
        it is, as long as it has that height and width.

        Raises:
            ContentError: it is no longer where the manifest says, or cannot be decoded.
            StoreError: the store fails.
        """
        (told,) = self._database.metadata([row], ["shard", "row", "patch"])
        number = self._numbers[told["shard"]]
        found: dict[str, Any] = {n: v[0] for n, v in self._rows.rows(number, [told["row"]], _MEMBERS).items()}
        member = media_member(found["extensions"])
        if member is None:
            raise ContentError(f"its neighbour {row}, {found['key']!r}, has no picture")
        try:
            name, offset, size = (found[of][member[0]] for of in ("extensions", "offsets", "sizes"))
            data = read_member(self._store, told["shard"], found["key"], name, offset, size)
            patch = told.get("patch")
            pixels = decode_image(data, cover if patch is None else None).pixels
        except (ContentError, DecodeError) as error:
            raise ContentError(f"its neighbour {row}, {found['key']!r}: {error}") from error
        left, top, right, bottom = patch or (0, 0, pixels.shape[1], pixels.shape[0])
        return pixels[top:bottom, left:right]
