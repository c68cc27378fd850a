"""A sample's picture as it goes into a packed shard: as it is, smaller, or in another format."""

import io
from dataclasses import dataclass
from typing import Literal

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch.nn.functional import interpolate

from data.decode import MAX_PIXELS, Color, decode_image
from data.transforms import covering_size

Format = Literal["jpg", "png", "webp"]
_SPELLINGS = {"jpg": ("jpg", "jpeg"), "png": ("png",), "webp": ("webp",)}


@dataclass(frozen=True)
class Pictures:
    """What becomes of pictures.

    Args:
        short_side: pixels; pictures whose short side is longer are scaled down to it, others are left. None: leave all.
        format: that pictures get which do not have it yet. None: each keeps its own; one that is neither JPEG, PNG nor
            WebP becomes PNG where it is scaled down.
        quality: of JPEG and WebP, 1 .. 100.
        verify: decode also those that are copied, so that no damaged one gets through.
        max_pixels: larger ones are refused by their header.
    """

    short_side: int | None = None
    format: Format | None = None
    quality: int = 95
    verify: bool = True
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if self.short_side is not None and self.short_side < 1:
            raise ValueError(f"short_side={self.short_side} must be positive")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality={self.quality} must be from 1 to 100")
        if self.format not in (None, *_SPELLINGS):
            raise ValueError(f"format={self.format!r} must be one of {', '.join(_SPELLINGS)}, or null")


@dataclass(frozen=True)
class Picture:
    """An encoded picture, its extension, and its height and width in pixels, upright."""

    data: bytes
    extension: str
    size: tuple[int, int]


def pack_picture(picture: Picture, pictures: Pictures, background: Color) -> Picture:
    """The picture to be packed: byte for byte the same where nothing is to be changed about it.

    One that is encoded anew has its EXIF orientation applied, and lies over the background where it was transparent.

    Raises:
        DecodeError: it cannot be decoded whole (found out by `verify` where it is copied), or has too many pixels.
    """
    own = _format_of(picture.data)
    form = pictures.format or own
    smaller = pictures.short_side is not None and min(picture.size) > pictures.short_side
    if form == own and not smaller:
        if pictures.verify:  # at an eighth of its size, which still reads every byte of a JPEG
            decode_image(picture.data, cover=(1, 1), background=background, max_pixels=pictures.max_pixels)
        return picture
    size = picture.size
    if smaller:
        assert pictures.short_side is not None
        size = covering_size(*picture.size, (pictures.short_side, pictures.short_side))
    # What JPEG's own scaling leaves is at least twice the size, so that the filter's quality is the resize's.
    cover = (2 * size[0], 2 * size[1]) if smaller else None
    pixels = decode_image(picture.data, cover=cover, background=background, max_pixels=pictures.max_pixels).pixels
    if pixels.shape[:2] != size:
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        resized = interpolate(image, size=size, mode="bicubic", antialias=True)
        pixels = resized[0].permute(1, 2, 0).contiguous().numpy()
    form = form or "png"
    stem, dot, last = picture.extension.rpartition(".")
    extension = picture.extension if last in _SPELLINGS[form] else f"{stem}{dot}{form}"
    return Picture(_encode(pixels, form, pictures.quality), extension, size)


def _format_of(data: bytes) -> Format | None:
    if data[:2] == b"\xff\xd8":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def _encode(pixels: np.ndarray, form: Format, quality: int) -> bytes:
    if form == "jpg":
        return simplejpeg.encode_jpeg(pixels, quality, "RGB")
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form.upper(), **({"quality": quality} if form == "webp" else {}))
    return file.getvalue()
