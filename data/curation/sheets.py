"""Contact sheets: small pictures of a few samples, with the key and a line of text under each."""

import io
from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image, ImageDraw

from data.curation.base import Media
from data.curation.media import read_ranges
from data.curation.video import still
from data.decode import DecodeError
from data.manifest import Manifest
from data.manifest_reader import ManifestReader
from data.media_size import media_member
from data.store import Store
from data.video import VideoError, open_clip

TILE = 144
"""Pixels of a small picture's longer side."""
_LINE = 15
_TEXT = 2 * _LINE + 4
_COLUMNS = 6
_SPAN = ("start_frame", "end_frame")


class Sheets:
    """Draws contact sheets of samples of some shards.

    Args:
        manifests: of the shards.
        store: where they lie.
    """

    def __init__(self, manifests: Sequence[Manifest], store: Store) -> None:
        self._manifests, self._store = manifests, store
        self._reader = ManifestReader(store, [m.url for m in manifests], [m.digest for m in manifests])

    def draw(self, places: Sequence[tuple[int, int]], texts: Sequence[str]) -> bytes:
        """PNG of samples, six in a row.

        Args:
            places: (shard, row) of each.
            texts: what stands under each, below its key.

        Raises:
            StoreError: the store fails.
        """
        lines = -(-len(places) // _COLUMNS)
        sheet = Image.new("RGB", (min(len(places), _COLUMNS) * TILE, lines * (TILE + _TEXT)), "white")
        brush = ImageDraw.Draw(sheet)
        for i, ((shard, row), text) in enumerate(zip(places, texts, strict=True)):
            left, top = i % _COLUMNS * TILE, i // _COLUMNS * (TILE + _TEXT)
            sample = self._media(shard, row)
            try:
                tile = _fit(picture_of(sample))
                sheet.paste(tile, (left + (TILE - tile.width) // 2, top + (TILE - tile.height) // 2))
            except (DecodeError, VideoError):
                brush.rectangle((left + 1, top + 1, left + TILE - 2, top + TILE - 2), outline="grey")
                brush.text((left + 8, top + TILE // 2), "cannot be decoded", fill="grey")
            for line, words in enumerate((sample.key, text)):
                brush.text((left + 4, top + TILE + 1 + line * _LINE), _shortened(words, brush), fill="black")
        buffer = io.BytesIO()
        sheet.save(buffer, "PNG")
        return buffer.getvalue()

    def _media(self, shard: int, row: int) -> Media:
        columns = ("key", "extensions", "offsets", "sizes", *_SPAN)
        values = {name: of_rows[0] for name, of_rows in self._reader.rows(shard, [row], columns).items()}
        member = media_member(values["extensions"])
        data, kind, span = b"", None, None
        if member is not None:
            place, kind = member
            member_at = values["offsets"][place], values["sizes"][place]
            (data,) = read_ranges(self._manifests[shard].shard, self._store, [member_at])
            span = tuple(values[name] for name in _SPAN) if values[_SPAN[0]] is not None else None
        return Media(values["key"], {}, kind, data, TILE, span)


def picture_of(sample: Media) -> np.ndarray:
    """(H, W, 3) uint8 RGB: the picture, or the middle frame of the clip.

    Raises:
        DecodeError: there is none, or it is damaged.
        VideoError: likewise, of a clip.
    """
    if sample.kind is None:
        raise DecodeError("no picture or clip")
    if sample.kind == "image":
        return sample.image
    with open_clip(sample.data) as clip:
        return still(clip, sample.span or (0, len(clip.timeline)), "middle")


def _shortened(text: str, brush: ImageDraw.ImageDraw) -> str:
    """The text without what is too much for a tile: keys differ in their ends."""
    if brush.textlength(text) <= TILE - 8:
        return text
    while text and brush.textlength("..." + text) > TILE - 8:
        text = text[1:]
    return "..." + text


def _fit(pixels: np.ndarray) -> Image.Image:
    scale = TILE / max(pixels.shape[:2])
    height, width = (max(1, round(side * scale)) for side in pixels.shape[:2])
    return Image.fromarray(cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA))
