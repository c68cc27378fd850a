"""Pictures and clips for the benchmarks of curation: drawn, so that they are the same everywhere."""

import io
import tarfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import simplejpeg

FPS = 25


def picture(height: int, seed: int, text: bool = False) -> bytes:
    """A JPEG, 16 : 9; with four lines of text if asked for."""
    pixels = _clouds(height, seed)
    if text:
        font, scale = cv2.FONT_HERSHEY_DUPLEX, height / 360
        for line in range(4):
            place, color = (height // 18, height * (line + 1) // 5), (255 * (line % 2),) * 3
            cv2.putText(pixels, "Text for detectors", place, font, scale, color, 2, cv2.LINE_AA)
    return simplejpeg.encode_jpeg(pixels, quality=90)


def clip(height: int, frames: int, seed: int) -> bytes:
    """H.264, 16 : 9, at 25 fps: a picture that moves, with a cut in the middle."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(FPS), options={"preset": "veryfast", "crf": "23"})
        shots = _clouds(height, 2 * seed), _clouds(height, 2 * seed + 1)
        stream.height, stream.width = shots[0].shape[:2]
        for i in range(frames):
            pixels = np.roll(shots[2 * i // frames], 2 * i, axis=1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode())
    return file.getvalue()


def write_shards(folder: Path, count: int, pictures: Sequence[bytes], per_shard: int) -> list[Path]:
    """Tars of pictures, which are repeated."""
    paths = [folder / f"{shard:05d}.tar" for shard in range(count)]
    for shard, path in enumerate(paths):
        with tarfile.open(path, "w") as tar:
            for i in range(per_shard):
                data = pictures[(shard * per_shard + i) % len(pictures)]
                member = tarfile.TarInfo(f"{shard}-{i:06d}.jpg")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return paths


def _clouds(height: int, seed: int) -> np.ndarray:
    """(height, 16/9 height, 3) uint8: detail of all sizes, as in photographs."""
    random = np.random.default_rng(seed)
    width = height * 16 // 9 // 2 * 2
    picture = np.zeros((height, width, 3), np.float32)
    for grain in (1, 4, 16):
        noise = random.normal(size=(height // grain + 1, width // grain + 1, 3)).astype(np.float32)
        picture += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC) * grain**0.5
    return np.clip(picture * 15 + 128, 0, 255).astype(np.uint8)
