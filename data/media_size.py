"""The size of pictures and clips from their first bytes, without decoding them.

Sizes are those of the upright picture: EXIF orientations 5 to 8 swap width and height.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Literal, cast

from PIL import Image, UnidentifiedImageError

from data.ranged_file import RangedFile

IMAGE_EXTENSIONS = frozenset(["jpg", "jpeg", "png", "webp", "gif", "bmp", "ppm", "pgm", "tif", "tiff", "avif", "jp2"])
VIDEO_EXTENSIONS = frozenset(["mp4", "mkv", "webm", "mov", "avi", "m4v", "mpg", "mpeg", "ts"])

_OTHER_FORMATS = ("BMP", "PPM", "TIFF", "AVIF", "JPEG2000")  # some of Pillow's readers run programs: not those
_JPEG_SIZE_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0..15 without DHT, JPG and DAC
_JPEG_BARE_MARKERS = frozenset([0x01, *range(0xD0, 0xD9)])  # TEM, RST0..7, SOI: no length follows


@dataclass(frozen=True, slots=True)
class MediaSize:
    """Width and height in pixels, upright; for a clip also frames, frames per second and seconds."""

    width: int
    height: int
    frames: int | None = None
    fps: float | None = None
    duration: float | None = None


def media_member(extensions: Sequence[str]) -> tuple[int, Literal["image", "video"]] | None:
    """Which of a sample's members is its picture or clip: the position of the extension, and the kind.

    Of several (`jpg` beside `depth.png`) it is the one with the fewest dots, then the first in the tar.
    """
    found = []
    for position, extension in enumerate(extensions):
        last = extension.rpartition(".")[2]
        if last in IMAGE_EXTENSIONS or last in VIDEO_EXTENSIONS:
            found.append((extension.count("."), position, last))
    if not found:
        return None
    _, position, last = min(found)
    return position, "image" if last in IMAGE_EXTENSIONS else "video"


def image_size(file: RangedFile) -> MediaSize:
    """Size of an encoded picture, reading as little of it as the format allows.

    Raises:
        ValueError: no known format, or damaged before its size is told.
    """
    head = file.pread(0, 32)
    if head[:2] == b"\xff\xd8":
        size = _jpeg(file)
    elif head[:8] == b"\x89PNG\r\n\x1a\n":
        size = _png(file, head)
    elif head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        size = _webp(file, head)
    elif head[:6] in (b"GIF87a", b"GIF89a"):
        size = struct.unpack_from("<HH", head, 6) if len(head) >= 10 else None
    else:
        size = _other(file)
    if size is None or min(size) < 1:
        raise ValueError("not a picture whose size can be read")
    return MediaSize(*size)


def video_size(file: RangedFile) -> MediaSize:
    """Size, length and frame rate of a clip, from its container's headers (PyAV reads and seeks only for them).

    The frame count is the container's own, or where it holds none, duration times frame rate, rounded.

    Raises:
        ValueError: not a video that FFmpeg can open.
    """
    import av

    try:
        with av.open(file, mode="r", metadata_errors="replace") as container:
            stream = next(iter(container.streams.video), None)
            if stream is None:
                raise ValueError("no video stream")
            fps = float(stream.average_rate or stream.guessed_rate or 0) or None
            duration: float | None
            if stream.duration is not None and stream.time_base is not None:
                duration = float(stream.duration * stream.time_base)
            else:
                duration = container.duration / av.time_base if container.duration else None
            frames = stream.frames or (round(duration * fps) if duration and fps else None)
            width, height = stream.codec_context.width, stream.codec_context.height
    except (av.error.FFmpegError, av.error.InvalidDataError) as error:
        raise ValueError(f"not a video that can be opened: {error}") from error
    if width < 1 or height < 1:
        raise ValueError("a video stream without a size")
    return MediaSize(width, height, frames, fps, duration)


def exif_orientation(tiff: bytes) -> int:
    """The orientation, 1 to 8, in an EXIF block (TIFF 6.0 layout, from its byte-order mark on); 1 if it holds none."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or len(tiff) < 8:
        return 1
    (start,) = struct.unpack_from(order + "I", tiff, 4)
    if start + 2 > len(tiff):
        return 1
    (count,) = struct.unpack_from(order + "H", tiff, start)
    for entry in range(start + 2, min(start + 2 + 12 * count, len(tiff) - 11), 12):
        tag, kind, _, value = struct.unpack_from(order + "HHIH", tiff, entry)
        if tag == 0x0112:
            return value if kind == 3 and 1 <= value <= 8 else 1
    return 1


def _upright(width: int, height: int, orientation: int) -> tuple[int, int]:
    return (height, width) if orientation >= 5 else (width, height)


def _jpeg(file: RangedFile) -> tuple[int, int] | None:
    """ITU T.81 annex B: segments up to the frame header; EXIF is an APP1 segment before it."""
    offset, orientation = 2, 1
    while True:
        head = file.pread(offset, 10)
        if len(head) < 4 or head[0] != 0xFF:
            return None
        marker = head[1]
        if marker == 0xFF:  # a fill byte
            offset += 1
        elif marker in _JPEG_BARE_MARKERS:
            offset += 2
        elif marker in _JPEG_SIZE_MARKERS:
            if len(head) < 9:
                return None
            height, width = struct.unpack_from(">HH", head, 5)
            return _upright(width, height, orientation)
        elif marker in (0xD9, 0xDA):  # the picture ends, or its data begins, without a frame header
            return None
        else:
            (length,) = struct.unpack_from(">H", head, 2)
            if marker == 0xE1 and head[4:10] == b"Exif\0\0":
                orientation = exif_orientation(file.pread(offset + 10, length - 8))
            offset += 2 + length


def _png(file: RangedFile, head: bytes) -> tuple[int, int] | None:
    """PNG 3rd edition, section 11.2.1; an eXIf chunk counts where it stands before the picture's data."""
    if len(head) < 24 or head[12:16] != b"IHDR":
        return None
    width, height = struct.unpack_from(">II", head, 16)
    orientation, offset = 1, 33
    while len(chunk := file.pread(offset, 8)) == 8 and chunk[4:] not in (b"IDAT", b"IEND"):
        (length,) = struct.unpack_from(">I", chunk)
        if chunk[4:] == b"eXIf":
            orientation = exif_orientation(file.pread(offset + 8, length))
            break
        offset += 12 + length
    return _upright(width, height, orientation)


def _webp(file: RangedFile, head: bytes) -> tuple[int, int] | None:
    """RFC 9649: lossy (VP8), lossless (VP8L), or extended (VP8X, whose EXIF chunk comes after the picture)."""
    if len(head) < 30:
        return None
    kind = head[12:16]
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", head, 26)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", head, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind != b"VP8X":
        return None
    width = int.from_bytes(head[24:27], "little") + 1
    height = int.from_bytes(head[27:30], "little") + 1
    orientation, offset = 1, 12
    has_exif = head[20] & 0x08
    while has_exif and len(chunk := file.pread(offset, 8)) == 8:
        (length,) = struct.unpack_from("<I", chunk, 4)
        if chunk[:4] == b"EXIF":
            exif = file.pread(offset + 8, length)
            orientation = exif_orientation(exif.removeprefix(b"Exif\0\0"))
            break
        offset += 8 + length + length % 2
    return _upright(width, height, orientation)


def _other(file: RangedFile) -> tuple[int, int] | None:
    """Rarer formats by way of Pillow, which may read more of the file."""
    file.seek(0)
    try:
        with Image.open(cast(IO[bytes], file), formats=_OTHER_FORMATS) as image:
            # Pillow has already swapped a TIFF's sides when it opens it.
            return image.size if image.format == "TIFF" else _upright(*image.size, image.getexif().get(0x0112, 1))
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError):
        return None
