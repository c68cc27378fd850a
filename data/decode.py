"""Encoded image to RGB pixels: the fastest maintained decoder of each format that is also right.

JPEG goes through libjpeg-turbo (simplejpeg), which can decode at 1/2, 1/4 or 1/8 of the size far faster; all else
through Pillow, which knows palettes, transparency and 16-bit samples, and refuses truncated files. (OpenCV decodes PNG
about 20 % faster and WebP no faster, but leaves these cases to the caller.) Colour profiles are not applied.
"""

import io
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

Color = tuple[int, int, int]

WHITE: Color = (255, 255, 255)
MAX_PIXELS = 100_000_000  # 300 MB of RGB; medium-format photographs pass, 30,000 x 30,000 does not

# Formats that Pillow may try. Some of its other readers run external programs (EPS starts Ghostscript).
_FORMATS = ("PNG", "WEBP", "JPEG", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
_EXIF_ORIENTATION = 0x0112
_EXIF_MARK = b"Exif\x00\x00"

# Our own limit, checked on the header of every image, replaces Pillow's, which cannot be set for a single call.
Image.MAX_IMAGE_PIXELS = None


class DecodeError(ValueError):
    """The bytes are not an image that can be decoded whole, or its header announces too many pixels."""


@dataclass(frozen=True)
class Decoded:
    """An image, upright.

    Args:
        pixels: (h, w, 3) uint8 RGB, possibly smaller than the original (scaled decoding).
        original_size: height and width of the original, after EXIF orientation.
    """

    pixels: np.ndarray
    original_size: tuple[int, int]


def decode_image(
    data: bytes,
    cover: tuple[int, int] | None = None,
    background: Color = WHITE,
    max_pixels: int = MAX_PIXELS,
) -> Decoded:
    """Decode an image to RGB, with its EXIF orientation applied and transparency laid over a background.

    Args:
        data: the whole encoded file.
        cover: height and width that the result will be scaled down to cover. A larger JPEG is then decoded at a half, a
            quarter or an eighth of its size, as long as the result still has both. None: full size.
        background: RGB colour below transparent pixels.
        max_pixels: images whose header announces more are refused before any pixel is decoded.

    Raises:
        DecodeError: unknown format, damaged or truncated data, too many pixels.
    """
    try:
        if data[:2] == b"\xff\xd8":
            return _decode_jpeg(data, cover, max_pixels)
        return _decode_pillow(data, background, max_pixels)
    except (DecodeError, MemoryError):
        raise
    except UnidentifiedImageError as error:  # whose text has an address in memory, another one in each run
        raise DecodeError(f"cannot decode image of {len(data)} bytes: cannot identify image file") from error
    except Exception as error:  # decoders fail in a dozen ways on damaged bytes: OSError, SyntaxError, struct.error ...
        raise DecodeError(f"cannot decode image of {len(data)} bytes: {error}") from error


def _decode_jpeg(data: bytes, cover: tuple[int, int] | None, max_pixels: int) -> Decoded:
    height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    _check_size(height, width, max_pixels)
    if colorspace in ("CMYK", "YCCK"):
        return _decode_pillow(data, WHITE, max_pixels)
    orientation = _jpeg_orientation(data)
    factor = 1
    if cover is not None:
        rows, columns = cover if orientation < 5 else cover[::-1]
        factor = _scale_factor(height, width, rows, columns)
    # libjpeg-turbo has SIMD inverse transforms for powers of two; scaling to 5/8 or 3/4 takes longer than none at all.
    # `strict` turns libjpeg's warnings (premature end, corrupt data) into errors instead of grey areas.
    pixels = simplejpeg.decode_jpeg(
        data,
        "RGB",
        min_height=-(-height // factor),
        min_width=-(-width // factor),
        min_factor=factor,
        strict=True,
    )
    original = (height, width) if orientation < 5 else (width, height)
    return Decoded(_upright(pixels, orientation), original)


def _scale_factor(height: int, width: int, rows: int, columns: int) -> int:
    factor = 1
    while factor < 8 and height >= 2 * factor * rows and width >= 2 * factor * columns:
        factor *= 2
    return factor


def _jpeg_orientation(data: bytes) -> int:
    if not _has_exif(data):  # most training images; spares Pillow's parsing
        return 1
    with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
        return _orientation(image)


def _has_exif(data: bytes) -> bool:
    """Whether one of a JPEG's segments (ITU T.81, annex B.1.1) before its first scan is an EXIF block. Searching all of
    its bytes would take a twentieth of the time of decoding them."""
    place = 2
    while data[place : place + 1] == b"\xff" and place + 4 <= len(data):
        marker = data[place + 1]
        if marker == 0xE1 and data.startswith(_EXIF_MARK, place + 4):
            return True
        if marker == 0xDA:  # start of scan
            break
        # A marker may have more bytes of 0xff before it.
        place += 1 if marker == 0xFF else 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return False


def _orientation(image: Image.Image) -> int:
    value = image.getexif().get(_EXIF_ORIENTATION, 1)
    return value if value in range(1, 9) else 1


def _decode_pillow(data: bytes, background: Color, max_pixels: int) -> Decoded:
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        _check_size(image.height, image.width, max_pixels)
        image.load()
        pixels = _upright(_to_rgb(image, background), _orientation(image))
    return Decoded(pixels, (pixels.shape[0], pixels.shape[1]))


def _to_rgb(image: Image.Image, background: Color) -> np.ndarray:
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips at 255 instead of scaling
        grey = (np.asarray(image).astype(np.uint32) * 255 + 32767) // 65535
        return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise DecodeError(f"image mode {image.mode} has no defined range of brightness")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, background)
        canvas.paste(rgba.convert("RGB"), mask=rgba.getchannel("A"))
        return np.array(canvas)
    return np.array(image.convert("RGB"))


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise DecodeError(f"image of {width} x {height} pixels exceeds max_pixels={max_pixels}")


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation (1 to 8, Exif 2.32 table 6): where row 0 and column 0 of the file stand in the scene."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
