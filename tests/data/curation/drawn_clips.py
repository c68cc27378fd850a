"""Clips with known cuts and known motion, written with PyAV."""

import io
from collections.abc import Iterable, Sequence
from fractions import Fraction

import av
import cv2
import numpy as np

WIDTH, HEIGHT, FPS = 160, 120, 25


def encode(
    frames: Iterable[np.ndarray],
    fps: float | Fraction = FPS,
    codec: str = "libx264",
    form: str = "mp4",
    pixel_format: str = "yuv420p",
    times: Sequence[int] | None = None,
    **options: object,
) -> bytes:
    """A clip of (H, W, 3) uint8 RGB frames; `times` in frame durations, where they are not one each."""
    file = io.BytesIO()
    settings = {"preset": "veryfast", "crf": "20", **{k: str(v) for k, v in options.items()}}
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1000), options=settings)
        stream.pix_fmt = pixel_format
        for i, frame in enumerate(frames):
            if i == 0:
                stream.height, stream.width = frame.shape[:2]
            picture = av.VideoFrame.from_ndarray(frame)
            picture.pts = i if times is None else times[i]
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return file.getvalue()


def decode(data: bytes) -> list[np.ndarray]:
    """All frames, (H, W, 3) uint8 RGB, as PyAV decodes them from the start."""
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def texture(seed: int, width: int = WIDTH, height: int = HEIGHT, scale: float = 1.0) -> np.ndarray:
    """(height, width, 3) uint8: coloured clouds with detail of all sizes, as photographs have; wraps at the edges."""
    random = np.random.default_rng(seed)
    clouds = np.zeros((height, width, 3), np.float32)
    for grain in (1.5, 3.0, 6.0, 12.0):
        noise = random.normal(size=(height, width, 3)).astype(np.float32)
        noise += 2 * random.normal(size=(height, width, 1)).astype(np.float32)
        tiled = cv2.GaussianBlur(np.tile(noise, (3, 3, 1)), (0, 0), grain * scale)
        layer = tiled[height : 2 * height, width : 2 * width]
        clouds += layer / layer.std()
    clouds = clouds / clouds.std() * random.uniform(25, 50) + random.integers(70, 186, 3)
    return np.clip(clouds, 0, 255).astype(np.uint8)


def moving(picture: np.ndarray, count: int, right: float, down: float = 0.0) -> list[np.ndarray]:
    """`count` frames of a picture that moves by so many pixels a frame and wraps around."""
    height, width = picture.shape[:2]
    tiled = np.tile(picture, (2, 2, 1))
    frames = []
    for i in range(count):
        x, y = (-right * i) % width, (-down * i) % height
        frames.append(cv2.getRectSubPix(tiled, (width, height), (x + (width - 1) / 2, y + (height - 1) / 2)))
    return frames


def faded(frames: Sequence[np.ndarray], shares: Sequence[float], colour: int = 0) -> list[np.ndarray]:
    """Each frame mixed with so much of itself, and the rest of a grey level."""
    return [
        np.clip(frame * share + colour * (1 - share) + 0.5, 0, 255).astype(np.uint8)
        for frame, share in zip(frames, shares, strict=True)
    ]
