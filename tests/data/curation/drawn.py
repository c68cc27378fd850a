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
