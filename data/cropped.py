"""Samples of a shard for encoders: pictures in their buckets' crops, and captions; read in large ranges, ahead."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.buckets import Buckets
from data.curation.media import read_ranges
from data.decode import Color, DecodeError, decode_image
from data.manifest import Manifest
from data.manifest_reader import ManifestReader
from data.media_size import media_member
from data.members import ContentError, check_member
from data.store import Store
from data.tar_index import BLOCK
from data.transforms import CENTER, Framing, frame

_MEMBERS = ("key", "extensions", "offsets", "sizes", "checksums", "width", "height")


@dataclass(frozen=True)
class Cropped:
    """One sample.

    Args:
        row: in the manifest.
        key: of the sample.
        captions: by column, "" where there is none.
        images: (1, 3, H, W) uint8, or (2, 3, H, W) with the mirrored picture, in the bucket's size; None without.
        original_size: height and width of the picture.
        crop: top and left of the crop in the resized picture.
        error: why there is no picture, though one was asked for.
    """

    row: int
    key: str
    captions: Mapping[str, str]
    images: Tensor | None = None
    original_size: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    error: str | None = None


@dataclass(frozen=True)
class Cropping:
    """How pictures are cut; as a run with `crop: center` does.

    Args:
        buckets: that pictures go to.
        flip: whether the mirrored picture is given as well.
        background: colour below transparent pixels.
        max_pixels: larger pictures are refused by their header.
    """

    buckets: Buckets
    flip: bool
    background: Color
    max_pixels: int

    def cut(self, data: bytes, width: int, height: int) -> tuple[Tensor, tuple[int, int], tuple[int, int]]:
        """An encoded picture's crops, original size, and the crop's top and left.

        Args:
            width, height: as the manifest has them, by which the bucket is chosen.

        Raises:
            ContentError: the picture cannot be decoded.
        """
        bucket = self.buckets[int(self.buckets.assign(np.array([width]), np.array([height]))[0])]
        target = (bucket.height, bucket.width)
        try:
            decoded = decode_image(data, target, self.background, self.max_pixels)
        except DecodeError as error:
            raise ContentError(str(error)) from error
        images = torch.empty((1 + self.flip, 3, *target), dtype=torch.uint8)
        for flip in range(1 + self.flip):
            crop = frame(decoded.pixels, target, Framing(CENTER, CENTER, bool(flip)), images[flip]).crop
        return images, decoded.original_size, crop


def read_cropped(
    manifest: Manifest,
    rows: np.ndarray,
    store: Store,
    columns: Sequence[str],
    cropping: Cropping | None,
    batch: int,
    threads: int,
) -> Iterator[list[Cropped]]:
    """Some rows of a shard, in order, in batches.

    Args:
        rows: of the manifest, ascending.
        store: where the shard lies.
        columns: of captions.
        cropping: of pictures; None leaves them out.
        batch: samples at a time.
        threads: that decode.

    Raises:
        StoreError: the store fails.
    """
    reader = ManifestReader(store, [manifest.url], [manifest.digest])

    def load(part: np.ndarray) -> list[Cropped]:
        values = reader.rows(0, part, [*_MEMBERS, *columns])
        samples = [{name: values[name][i] for name in values} for i in range(len(part))]
        captions = [{c: "" if one[c] is None else str(one[c]) for c in columns} for one in samples]
        if cropping is None:
            return [Cropped(int(row), one["key"], told) for row, one, told in zip(part, samples, captions, strict=True)]
        chosen = [_picture(one["extensions"]) for one in samples]
        places = {
            i: (samples[i]["offsets"][member] - BLOCK, BLOCK + samples[i]["sizes"][member])
            for i, member in enumerate(chosen)
            if member is not None
        }
        blocks = dict(zip(places, read_ranges(manifest.shard, store, list(places.values())), strict=True))

        def cut(i: int) -> Cropped:
            one, row = samples[i], int(part[i])
            try:
                data = _checked(one, chosen[i], blocks.get(i, b""))
                return Cropped(row, one["key"], captions[i], *cropping.cut(data, one["width"], one["height"]))
            except ContentError as error:
                return Cropped(row, one["key"], captions[i], error=str(error))

        return list(decoders.map(cut, range(len(part))))

    parts = [rows[start : start + batch] for start in range(0, len(rows), batch)]
    with ThreadPoolExecutor(threads) as decoders, ThreadPoolExecutor(1) as ahead:
        following = ahead.submit(load, parts[0]) if parts else None
        for part in [*parts[1:], None]:
            assert following is not None
            samples = following.result()
            following = ahead.submit(load, part) if part is not None else None
            yield samples


def _picture(extensions: Sequence[str]) -> int | None:
    chosen = media_member(extensions)
    return chosen[0] if chosen is not None and chosen[1] == "image" else None


def _checked(one: Mapping[str, Any], member: int | None, block: bytes) -> bytes:
    """The sample's picture out of the bytes from its header on."""
    if member is None:
        raise ContentError(f"no picture among its members ({', '.join(one['extensions'])})")
    checksum = one["checksums"][member] if one["checksums"] is not None else None
    extension, offset = one["extensions"][member], one["offsets"][member]
    check_member(block[:BLOCK], block[BLOCK:], one["key"], extension, offset, checksum)
    return block[BLOCK:]
