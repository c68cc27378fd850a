"""What filters rest on: the shortest loops over libraries that give figures like theirs."""

import io
from collections.abc import Iterator

import cv2
import numpy as np
import simplejpeg
import xxhash

from tools.bench.curate_samples import FPS


def decode(data: bytes) -> np.ndarray:
    """(H, W, 3) uint8 RGB."""
    return simplejpeg.decode_jpeg(data, "RGB")


def sharpness(pixels: np.ndarray) -> float:
    """Variance of the Laplacian."""
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    return cv2.meanStdDev(cv2.Laplacian(grey, cv2.CV_16S))[1][0, 0] ** 2


def blank(pixels: np.ndarray) -> tuple[float, float]:
    """Contrast, and the largest share of nine neighbouring grey levels."""
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    counts = cv2.calcHist([grey], [0], None, [256], [0, 256]).ravel()
    return cv2.meanStdDev(grey)[1][0, 0], np.convolve(counts, np.ones(9), "valid").max() / grey.size


def _windows(side: int) -> list[tuple[slice, slice]]:
    """All of a square picture, and ten windows that leave off a twentieth or a tenth of its sides."""
    windows = [(slice(None), slice(None))]
    for share in (0.05, 0.1):
        length = round(side * (1 - share))
        rest = side - length
        for top, left in ((rest // 2, rest // 2), (0, 0), (0, rest), (rest, 0), (rest, rest)):
            windows.append((slice(top, top + length), slice(left, left + length)))
    return windows


_OF_GREY, _OF_COLORS = _windows(128), _windows(40)


def perceptual_hash(pixels: np.ndarray) -> tuple[list[bytes], list[bytes]]:
    """pHash and the mean colours of 4 x 4 fields, of the picture and of ten windows."""
    square = cv2.resize(pixels, (128, 128), interpolation=cv2.INTER_AREA)
    grey = cv2.cvtColor(square, cv2.COLOR_RGB2GRAY)
    hashes = []
    for window in _OF_GREY:
        small = cv2.resize(grey[window], (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
        low = cv2.dct(small)[:8, :8].ravel()
        hashes.append(np.packbits(low > np.median(low[1:])).tobytes())
    colors = cv2.resize(square, (40, 40), interpolation=cv2.INTER_AREA)
    fields = [cv2.resize(colors[window], (4, 4), interpolation=cv2.INTER_AREA).tobytes() for window in _OF_COLORS]
    return hashes, fields


def content_hash(data: bytes) -> bytes:
    """Of a file."""
    return xxhash.xxh3_128_digest(data)


def components(pixels: np.ndarray) -> int:
    """OpenCV's calls for what our detector knows of a picture's shapes: boxes and areas, edges and strokes. It then has
    to choose letters among them and to join these to rows, which no library does."""
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    ground = cv2.blur(grey, (65, 65), borderType=cv2.BORDER_REPLICATE)
    cv2.morphologyEx(grey, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
    shapes = 0
    for difference in (cv2.subtract(ground, grey), cv2.subtract(grey, ground)):
        _, mask = cv2.threshold(difference, 20, 1, cv2.THRESH_BINARY)
        shapes += cv2.connectedComponentsWithStats(mask, connectivity=8, ltype=cv2.CV_32S)[0]
        cv2.distanceTransform(mask, cv2.DIST_L2, 3)
    return shapes


def extremal_regions(pixels: np.ndarray) -> float:
    """The share of the picture under boxes of OpenCV's MSER."""
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    mask = np.zeros(grey.shape, np.uint8)
    for x, y, width, height in cv2.MSER.create().detectRegions(grey)[1]:
        cv2.rectangle(mask, (x, y), (x + width, y + height), 1, cv2.FILLED)
    return cv2.countNonZero(mask) / mask.size


class Network:
    """The share of the picture under boxes around regions of a text detector's probability map.

    Args:
        model: path of an ONNX file.
        size: of the picture's shorter side.
    """

    def __init__(self, model: str, size: int) -> None:
        self._network, self._size = cv2.dnn.readNetFromONNX(model), size

    def __call__(self, pixels: np.ndarray) -> float:
        scale = self._size / min(pixels.shape[:2])
        height, width = (round(side * scale / 32) * 32 for side in pixels.shape[:2])
        blob = cv2.dnn.blobFromImage(pixels, 1 / 58, (width, height), (124, 116, 104))
        self._network.setInput(blob)
        output = self._network.forward()
        probability = output.reshape(output.shape[-2:])
        outlines, _ = cv2.findContours((probability > 0.3).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        mask = np.zeros(probability.shape, np.uint8)
        for outline in outlines:
            cv2.fillConvexPoly(mask, np.rint(cv2.boxPoints(cv2.minAreaRect(outline))).astype(np.int32), 1)
        return cv2.countNonZero(mask) / mask.size


def probe(data: bytes) -> int:
    """What the container tells, and how many key frames there are."""
    import av

    with av.open(io.BytesIO(data), mode="r") as container:
        stream = container.streams.video[0]
        next(container.decode(stream))
    with av.open(io.BytesIO(data), mode="r") as container:
        return sum(packet.is_keyframe for packet in container.demux(container.streams.video[0]))


def motion(data: bytes) -> float:
    """The mean length of Farneback's flow at 2 fps."""
    before, speeds = None, []
    for i, luma in enumerate(_luma(data)):
        if i % (FPS // 2):
            continue
        image = _shrunk(luma, 128)
        if before is not None:
            flow = cv2.calcOpticalFlowFarneback(before, image, None, 0.5, 4, 15, 3, 5, 1.2, 0)  # type: ignore[call-overload]
            speeds.append(np.linalg.norm(flow, axis=2).mean())
        before = image
    return float(np.mean(speeds))


def static(data: bytes) -> list[float]:
    """How much frames at 4 fps differ."""
    before, changes = None, []
    for i, luma in enumerate(_luma(data)):
        if i % (FPS // 4):
            continue
        image = _shrunk(luma, 64)
        if before is not None:
            changes.append(cv2.norm(before, image, cv2.NORM_L1))
        before = image
    return changes


def cuts(data: bytes) -> list[float]:
    """Content detection at its simplest: small frames in HSV and how much each differs from the one before."""
    import av

    before, changes = None, []
    with av.open(io.BytesIO(data), mode="r") as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        for frame in container.decode(stream):
            image = cv2.cvtColor(_shrunk(frame.to_ndarray(format="rgb24"), 64), cv2.COLOR_RGB2HSV)
            if before is not None:
                changes.append(cv2.norm(before, image, cv2.NORM_L1))
            before = image
    return changes


def frames(data: bytes) -> int:
    """Decodes all frames and counts them."""
    return sum(1 for _ in _luma(data))


def _luma(data: bytes) -> Iterator[np.ndarray]:
    """The brightness of each frame, at full size."""
    import av

    with av.open(io.BytesIO(data), mode="r") as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        for frame in container.decode(stream):
            plane = frame.planes[0]
            yield np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, -1)[:, : plane.width]


def _shrunk(image: np.ndarray, side: int) -> np.ndarray:
    height, width = image.shape[:2]
    return cv2.resize(image, (width * side // height, side), interpolation=cv2.INTER_AREA)
