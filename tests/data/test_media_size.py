"""Sizes from first bytes, against Pillow and PyAV."""

import io
import struct

import av
import numpy as np
import pytest
from PIL import Image, ImageOps
from shard_files import picture

from data.media_size import exif_orientation, image_size, media_member, video_size
from data.ranged_file import RangedFile


def ranged(content: bytes, read: list[int] | None = None) -> RangedFile:
    def fetch(offset: int, size: int) -> bytes:
        if read is not None:
            read.append(size)
        return content[offset : offset + size]

    return RangedFile(fetch, len(content), 0)


def upright(content: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(content)) as image:
        return ImageOps.exif_transpose(image).size


FORMATS = [
    ("JPEG", {}),
    ("JPEG", {"progressive": True, "icc_profile": bytes(100_000)}),
    ("PNG", {}),
    ("WEBP", {}),
    ("WEBP", {"lossless": True}),
    ("GIF", {}),
    ("BMP", {}),
    ("PPM", {}),
    ("TIFF", {}),
    ("AVIF", {}),
]


@pytest.mark.parametrize(("form", "options"), FORMATS)
def test_sizes_are_pillows(form, options):
    for width, height in [(1, 1), (17, 300), (640, 33)]:
        found = image_size(ranged(picture(width, height, form, **options)))
        assert (found.width, found.height) == (width, height)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_are_those_of_the_upright_picture(form, orientation):
    exif = Image.Exif()
    exif[0x010E] = "a description before the orientation"
    exif[0x0112] = orientation
    content = picture(40, 30, form, exif=exif)
    found = image_size(ranged(content))
    assert (found.width, found.height) == upright(content) == ((30, 40) if orientation >= 5 else (40, 30))


@pytest.mark.parametrize("length", [100, 101])
def test_exif_behind_webp_chunks_of_odd_and_even_length(length):
    exif = Image.Exif()
    exif[0x0112] = 6
    content = picture(40, 30, "WEBP", exif=exif, icc_profile=bytes(length))
    assert struct.unpack_from("<I", content, content.index(b"ICCP") + 4)[0] == length
    found = image_size(ranged(content))
    assert (found.width, found.height) == upright(content) == (30, 40)


def test_orientation_in_either_byte_order():
    for order, mark in (("<", b"II"), (">", b"MM")):
        entry = struct.pack(order + "HHIHH", 0x0112, 3, 1, 6, 0)
        tiff = mark + struct.pack(order + "HI", 42, 8) + struct.pack(order + "H", 1) + entry + bytes(4)
        assert exif_orientation(tiff) == 6
        for cut in range(len(tiff) - 6):
            assert exif_orientation(tiff[:cut]) in (1, 6)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF"])
def test_only_the_first_bytes_are_read(form):
    read: list[int] = []
    image_size(ranged(picture(600, 500, form), read))
    assert sum(read) < 400


@pytest.mark.parametrize(("form", "options"), FORMATS[:6])
def test_damaged_beginnings_are_errors_and_never_a_wrong_size(form, options):
    content = picture(64, 48, form, **options)
    for cut in [*range(0, 64), 100, 200, 400]:
        try:
            found = image_size(ranged(content[:cut]))
        except ValueError:
            continue
        assert (found.width, found.height) == (64, 48)
    with pytest.raises(ValueError, match="size"):
        image_size(ranged(b"nothing of the kind, but long enough to look at"))


def clip(path, form: str, codec: str, size: tuple[int, int], frames: int, fps: int) -> bytes:
    with av.open(str(path), "w", format=form) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        rng = np.random.default_rng(0)
        for _ in range(frames):
            image = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image)))
        container.mux(stream.encode())
    return path.read_bytes()


@pytest.mark.parametrize("form", ["mp4", "matroska"])
def test_size_length_and_rate_of_clips(tmp_path, form):
    content = clip(tmp_path / "clip", form, "mpeg4", (96, 64), frames=37, fps=12)
    found = video_size(ranged(content))
    assert (found.width, found.height, found.frames, found.fps) == (96, 64, 37, 12.0)
    assert found.duration == pytest.approx(37 / 12, abs=0.05)
    with pytest.raises(ValueError, match="video"):
        video_size(ranged(content[:50]))


def test_which_member_is_the_picture():
    assert media_member(["json", "png", "txt"]) == (1, "image")
    assert media_member(["depth.png", "jpg"]) == (1, "image")
    assert media_member(["left.jpg", "right.jpg"]) == (0, "image")
    assert media_member(["txt", "mp4"]) == (1, "video")
    assert media_member(["txt", "npy"]) is None
