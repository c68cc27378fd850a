"""Pictures with known properties, drawn by the tests."""

import cv2
import numpy as np

from data.curation.base import Media


def natural(seed: int, height: int = 240, width: int = 320) -> np.ndarray:
    """(H, W, 3) uint8 noise with the spectrum of natural pictures, amplitude ~ 1/f."""
    rng = np.random.default_rng(seed)
    down, right = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    frequency = np.hypot(down, right)
    frequency[0, 0] = 1
    shape = (4, *frequency.shape)
    planes = np.fft.irfft2((rng.normal(size=shape) + 1j * rng.normal(size=shape)) / frequency**1.2, s=(height, width))
    pixels = np.moveaxis(planes[:3] + planes[3], 0, -1)
    return np.clip((pixels - pixels.mean()) / pixels.std() * 50 + 128, 0, 255).astype(np.uint8, order="C")


def encoded(pixels: np.ndarray, quality: int | None = None) -> bytes:
    """A JPEG of that quality, or a PNG."""
    form, options = (".png", []) if quality is None else (".jpg", [cv2.IMWRITE_JPEG_QUALITY, quality])
    return cv2.imencode(form, cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), options)[1].tobytes()


def media(pixels: np.ndarray, side: int = 512, quality: int | None = None) -> Media:
    return Media("key", {}, "image", encoded(pixels, quality), side)


def cropped(pixels: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """A crop, anywhere, that takes off this share of both sides."""
    height, width = pixels.shape[:2]
    rows, columns = round(height * (1 - share)), round(width * (1 - share))
    top, left = rng.integers(height - rows + 1), rng.integers(width - columns + 1)
    return pixels[top : top + rows, left : left + columns]


def icon(seed: int, side: int = 128) -> np.ndarray:
    """(side, side, 3) uint8: a figure of a few flat shapes with outlines on white, as emoji are."""
    rng = np.random.default_rng(seed)
    scale = 4
    pixels = np.full((side * scale, side * scale, 3), 255, np.uint8)
    body = int(rng.integers(3))
    for part in range(int(rng.integers(3, 7))):
        color = rng.integers(0, 256, 3).tolist()
        size = rng.uniform(0.3, 0.45, 2) if part == 0 else rng.uniform(0.05, 0.2, 2)
        center = np.array([0.5, 0.5]) if part == 0 else rng.uniform(0.2, 0.8, 2)
        (x, y), (width, height) = (
            (center * side * scale).astype(int).tolist(),
            (size * side * scale).astype(int).tolist(),
        )
        for fill, shade in ((cv2.FILLED, color), (2 * scale, [value // 2 for value in color])):
            if (body + part) % 3 == 0:
                cv2.ellipse(pixels, (x, y), (width, height), 0, 0, 360, shade, fill)
            elif (body + part) % 3 == 1:
                cv2.rectangle(pixels, (x - width, y - height), (x + width, y + height), shade, fill)
            else:
                corners = np.array([[x, y - height], [x + width, y + height], [x - width, y + height]])
                cv2.polylines(pixels, [corners], True, shade, fill) if fill > 0 else cv2.fillPoly(
                    pixels, [corners], shade
                )
    return cv2.resize(pixels, (side, side), interpolation=cv2.INTER_AREA)
