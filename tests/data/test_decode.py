"""Decoding against Pillow and against closed forms."""

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from data.decode import DecodeError, decode_image


def smooth(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, channels), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC).reshape(height, width, channels)


def encode(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("form", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {}), ("TIFF", {}), ("PPM", {})]
)
def test_lossless_formats_give_the_pixels_back(form, options):
    pixels = smooth(50, 71)
    decoded = decode_image(encode(Image.fromarray(pixels), form, **options), cover=(8, 8))
    assert np.array_equal(decoded.pixels, pixels)
    assert decoded.original_size == (50, 71)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA"])
def test_modes_without_transparent_pixels_equal_pillow(mode):
    image = Image.fromarray(smooth(40, 30)).convert(mode)
    decoded = decode_image(encode(image, "PNG")).pixels
    assert np.array_equal(decoded, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("background", [(255, 255, 255), (10, 200, 30)])
def test_alpha_is_composited_on_the_background(background):
    rgba = smooth(40, 30, 4)
    alpha = rgba[..., 3:].astype(float) / 255
    exact = rgba[..., :3] * alpha + np.array(background) * (1 - alpha)
    decoded = decode_image(encode(Image.fromarray(rgba), "PNG"), background=background).pixels
    assert np.abs(decoded - exact).max() <= 0.51


def test_transparent_palette_entry_shows_the_background():
    image = Image.fromarray(np.array([[0, 1], [2, 0]], dtype=np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    decoded = decode_image(encode(image, "PNG", transparency=0), background=(1, 2, 3)).pixels
    assert decoded.tolist() == [[[1, 2, 3], [0, 255, 0]], [[0, 0, 255], [1, 2, 3]]]


def test_transparent_colour_of_an_rgb_png_shows_the_background():
    image = Image.fromarray(np.array([[[9, 8, 7], [1, 1, 1]]], dtype=np.uint8))
    decoded = decode_image(encode(image, "PNG", transparency=(9, 8, 7)), background=(0, 0, 255)).pixels
    assert decoded.tolist() == [[[0, 0, 255], [1, 1, 1]]]


def test_sixteen_bit_grey_is_scaled_and_not_clipped():
    grey = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    decoded = decode_image(encode(Image.fromarray(grey), "PNG")).pixels
    assert np.array_equal(decoded, np.repeat(np.rint(grey / 257)[..., None], 3, 2))


def test_sixteen_bit_colour_keeps_its_brightness():
    colour = (smooth(16, 16).astype(np.uint16)) * 257
    png = cv2.imencode(".png", colour[..., ::-1])[1].tobytes()
    assert np.array_equal(decode_image(png).pixels, colour // 257)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_equals_pillow(mode):
    data = encode(Image.fromarray(smooth(64, 96)).convert(mode), "JPEG", quality=90)
    pillow = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(decode_image(data).pixels - pillow).max() <= 2  # both are libjpeg-turbo, of different versions


def test_exif_is_found_behind_other_segments_and_only_there():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.fromarray(smooth(40, 56)), "JPEG", exif=exif)
    comment = b"\xff\xff\xff\xfe" + (600).to_bytes(2, "big") + b"\xff\xda" + bytes(596)
    behind = data[:2] + comment + data[2:]
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(behind))))
    assert np.abs(decode_image(behind).pixels.astype(int) - upright).max() <= 2
    plain = encode(Image.fromarray(smooth(40, 56)), "JPEG")
    assert decode_image(plain + data).pixels.shape[:2] == (40, 56)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if form == "WEBP" else {"quality": 95} if form == "JPEG" else {}
    data = encode(Image.fromarray(smooth(400, 560)), form, exif=exif, **options)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    decoded = decode_image(data)
    assert np.abs(decoded.pixels.astype(int) - upright).max() <= 2
    assert decoded.original_size == upright.shape[:2]
    rows, columns = 250, 130  # a half fits only upright images that are tall
    covered = decode_image(data, cover=(rows, columns))
    assert covered.original_size == upright.shape[:2]
    height, width = covered.pixels.shape[:2]
    assert height >= rows and width >= columns
    if form == "JPEG":
        assert covered.pixels.shape[0] == upright.shape[0] // (2 if orientation >= 5 else 1)


@pytest.mark.parametrize(
    ("cover", "factor"), [((33, 17), 8), ((50, 40), 8), ((51, 40), 4), ((200, 10), 2), ((201, 9), 1)]
)
def test_scaled_jpeg_covers_and_looks_like_the_downscaled_image(cover, factor):
    image = Image.fromarray(cv2.resize(smooth(30, 24), (321, 400), interpolation=cv2.INTER_CUBIC))
    decoded = decode_image(encode(image, "JPEG", quality=95, subsampling=0), cover=cover)
    assert decoded.pixels.shape[:2] == (-(-400 // factor), -(-321 // factor))
    assert decoded.original_size == (400, 321)
    reference = np.asarray(image.resize(decoded.pixels.shape[1::-1], Image.Resampling.BOX)).astype(float)
    assert np.abs(decoded.pixels - reference).mean() < 4


def announce_png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def announce_jpeg(width: int, height: int) -> bytes:
    data = bytearray(encode(Image.fromarray(smooth(16, 16)), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize("announce", [announce_png, announce_jpeg])
def test_a_bomb_is_refused_by_its_header(announce):
    with pytest.raises(DecodeError, match="30000 x 30000 pixels exceeds max_pixels=100000000"):
        decode_image(announce(30000, 30000), cover=(64, 64))


def test_the_size_limit_is_exact():
    data = encode(Image.fromarray(smooth(20, 30)), "PNG")
    decode_image(data, max_pixels=600)
    with pytest.raises(DecodeError, match="max_pixels=599"):
        decode_image(data, max_pixels=599)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_truncated_images_are_errors(form):
    data = encode(Image.fromarray(smooth(120, 90)), form)
    # Only a PNG's last bytes (the empty IEND chunk) hold nothing of the picture.
    for length in range(0, len(data) - 16, 29):
        with pytest.raises(DecodeError):
            decode_image(data[:length], cover=(16, 16))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_damaged_images_give_pixels_or_a_decode_error_and_nothing_else(form):
    data = encode(Image.fromarray(smooth(60, 44)), form)
    rng = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(data)
        for at in rng.integers(0, len(data), rng.integers(1, 8)):
            damaged[at] = rng.integers(256)
        try:
            decoded = decode_image(bytes(damaged), max_pixels=10_000)
        except DecodeError:
            continue
        assert decoded.pixels.dtype == np.uint8 and decoded.pixels.shape[2] == 3


@pytest.mark.parametrize("data", [b"", b"hello", b"\xff\xd8", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_what_is_no_image_is_an_error_that_reads_the_same_in_every_run(data):
    with pytest.raises(DecodeError) as error:
        decode_image(data)
    assert " at 0x" not in str(error.value)  # an object's address


def test_float_images_are_refused_for_want_of_a_range():
    with pytest.raises(DecodeError, match="mode F"):
        decode_image(encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"))
