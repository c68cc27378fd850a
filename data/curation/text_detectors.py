"""Finding text in pictures: without a model, or with one that OpenCV's network module can run."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import xxhash

from data.curation.groups import connect
from data.curation.sharpness import shrink

_STRIDE = 32  # the sides of the networks' inputs are multiples of it


class TextDetector(ABC):
    """Finds text. Picklable; a model is loaded by the first `find`."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """All that changes what it finds, as JSON values."""

    @abstractmethod
    def find(self, image: np.ndarray) -> np.ndarray:
        """(N, 4, 2) float, corners (x, y) of boxes around words or lines, of a (H, W, 3) uint8 RGB picture."""


class Components(TextDetector):
    """Text as rows of at least three dark or bright shapes with sharp edges, alike in height, stroke and brightness: a
    detector of extremal regions (Neumann and Matas 2012, "Real-time scene text localization and recognition"), with a
    local threshold in the place of a search through all of them. For horizontal text of separate letters, higher than
    some 8 pixels; it does not see single letters, handwriting, or text that runs into a busy ground.

    (OpenCV's own MSER loses regions that are perfectly stable, such as flat letters on flat ground.)

    Args:
        size: pictures whose shorter side is longer than this many pixels are scaled down to it.
        contrast: grey levels between a shape's inside and outside, across its edge.
    """

    def __init__(self, size: int = 512, contrast: int = 60) -> None:
        if size < 32 or not 0 < contrast < 256:
            raise ValueError(f"size={size} must be at least 32, contrast={contrast} in 1 .. 255")
        self.size, self.contrast = size, contrast

    def settings(self) -> dict[str, Any]:
        return {"size": self.size, "contrast": self.contrast}

    def find(self, image: np.ndarray) -> np.ndarray:
        grey = cv2.cvtColor(shrink(image, self.size), cv2.COLOR_RGB2GRAY)
        ground = cv2.blur(grey, (65, 65), borderType=cv2.BORDER_REPLICATE)
        edges = cv2.morphologyEx(grey, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
        boxes = np.concatenate(
            [
                _rows(_shapes(difference, grey, edges, self.contrast))
                for difference in (cv2.subtract(ground, grey), cv2.subtract(grey, ground))
            ]
        )
        left, top, right, bottom = boxes.T * (image.shape[1] / grey.shape[1])
        return np.stack([left, top, right, top, right, bottom, left, bottom], 1).reshape(-1, 4, 2)


def _shapes(difference: np.ndarray, grey: np.ndarray, edges: np.ndarray, contrast: int) -> np.ndarray:
    """(N, 6): left, top, width, height, brightness and stroke of connected shapes that may be letters."""
    _, mask = cv2.threshold(difference, contrast // 3, 1, cv2.THRESH_BINARY)
    count, labels = cv2.connectedComponents(mask, connectivity=8, ltype=cv2.CV_32S)
    row, start, end = _runs(mask)
    first = row * mask.shape[1] + start  # number of a run's first pixel
    owner = labels.ravel().take(first)
    left, top, width, height, area = _boxes(row, start, end, owner, count)
    candidate = (height >= 7) & (height <= grey.shape[0] / 3) & (area >= 12)
    candidate &= (width <= 3 * height) & (12 * width >= height) & (area > 0.12 * width * height)

    rim = np.flatnonzero(mask != cv2.erode(mask, np.ones((3, 3), np.uint8)))
    steepness = np.bincount(labels.ravel().take(rim), edges.ravel().take(rim).astype(np.int16) - contrast, count)
    candidate &= steepness > 0
    if np.count_nonzero(candidate) < 3:  # too few for a row
        return np.empty((0, 6))

    chosen, run = np.flatnonzero(candidate), np.flatnonzero(candidate.take(owner))
    band = slice(max(0, top[chosen].min() - 1), (top + height)[chosen].max() + 1)  # rows of them and of their ground
    depth = cv2.distanceTransform(mask[band], cv2.DIST_L2, 3)
    length = end[run] - start[run]
    pixels, owner = _ranges(first[run] - band.start * mask.shape[1], length), np.repeat(owner[run], length)
    brightness, stroke = (
        np.bincount(owner, values.ravel().take(pixels), count)[chosen] / area[chosen] for values in (grey[band], depth)
    )
    return np.column_stack([left[chosen], top[chosen], width[chosen], height[chosen], brightness, stroke])


def _runs(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, first column and the column past the last one of each horizontal run of ones in a (H, W) mask of 0 and 1."""
    padded = cv2.copyMakeBorder(mask, 0, 1, 1, 0, cv2.BORDER_CONSTANT).ravel()  # so that each run ends in its row
    change = np.flatnonzero(padded[1:] != padded[:-1])
    length = mask.shape[1] + 1
    row = change[::2] // length
    before = row * length
    return row, change[::2] - before, change[1::2] - before


def _boxes(
    row: np.ndarray, start: np.ndarray, end: np.ndarray, owner: np.ndarray, count: int
) -> tuple[np.ndarray, ...]:
    """(count,) left, top, width, height and area of shapes, from the runs that they own. It takes a third of the time
    that OpenCV's own count of them takes, which goes pixel by pixel."""
    left, top = np.full((2, count), np.iinfo(np.int32).max)
    right, bottom = np.zeros((2, count), np.int64)
    np.minimum.at(left, owner, start)
    np.minimum.at(top, owner, row)
    np.maximum.at(right, owner, end)
    np.maximum.at(bottom, owner, row + 1)
    return left, top, right - left, bottom - top, np.bincount(owner, end - start, count)


def _ranges(start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """start[0], start[0] + 1, ... start[0] + length[0] - 1, start[1], ...: one after the other."""
    end = np.cumsum(length)
    return np.arange(end[-1] if len(end) else 0) + np.repeat(start - end + length, length)


def _rows(shapes: np.ndarray) -> np.ndarray:
    """(M, 4): left, top, right and bottom of rows of at least three shapes that look like each other."""
    if len(shapes) < 3:
        return np.empty((0, 4))
    left, top, width, height, brightness, stroke = shapes[np.argsort(shapes[:, 0], kind="stable")].T.copy()
    right, bottom = left + width, top + height
    # Pairs of a shape and one to its right that is near enough, as no shape goes with one of 2.2 times its height.
    follower = np.searchsorted(left, left, "right")
    count = np.searchsorted(left, right + 2.2 * height) - follower
    a, b = np.repeat(np.arange(len(left)), count), _ranges(follower, count)
    lower, higher = np.minimum(height[a], height[b]), np.maximum(height[a], height[b])
    gap = left[b] - right[a]
    overlap = np.minimum(bottom[a], bottom[b]) - np.maximum(top[a], top[b])
    alike = (gap < higher) & (gap > -0.3 * higher) & (overlap > 0.6 * lower) & (higher < 2.2 * lower)
    alike &= abs(brightness[a] - brightness[b]) < 25
    alike &= np.maximum(stroke[a], stroke[b]) < 1.6 * np.minimum(stroke[a], stroke[b])
    first = np.arange(len(left))
    connect(first, a[alike], b[alike])

    order, size = np.argsort(first, kind="stable"), np.bincount(first)
    size = size[size > 0]
    starts = np.cumsum(size) - size
    left, top = (np.minimum.reduceat(values[order], starts) for values in (left, top))
    right, bottom, tallest = (np.maximum.reduceat(values[order], starts) for values in (right, bottom, height))
    rows = (size >= 3) & (bottom - top < 2 * tallest) & (right - left > 1.5 * (bottom - top))
    return np.column_stack([left, top, right, bottom])[rows]


class _Network(TextDetector):
    """What detectors with a network have in common.

    Args:
        model: path of an ONNX file.
        size: length to which a picture's shorter side is scaled, in pixels; both sides are rounded to multiples of 32.
        mean: of the network's inputs, RGB, in 0 to 1.
        deviation: likewise.
    """

    def __init__(self, model: str, size: int, mean: list[float], deviation: list[float]) -> None:
        if not Path(model).is_file():
            raise ValueError(f"there is no text detection model at {model!r}")
        if size < _STRIDE or len(mean) != 3 or len(deviation) != 3:
            raise ValueError(f"size={size} must be at least {_STRIDE}; mean and deviation have three values")
        self.model, self.size, self.mean, self.deviation = model, size, mean, deviation
        self._network: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_network": None}

    def settings(self) -> dict[str, Any]:
        weights = xxhash.xxh3_128_hexdigest(Path(self.model).read_bytes())
        return {"weights": weights, "size": self.size, "mean": self.mean, "deviation": self.deviation}

    def _output(self, image: np.ndarray) -> np.ndarray:
        if self._network is None:
            self._network = cv2.dnn.readNetFromONNX(self.model)
        scale = self.size / min(image.shape[:2])
        height, width = (max(1, round(side * scale / _STRIDE)) * _STRIDE for side in image.shape[:2])
        pixels = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
        scaled = (pixels.astype(np.float32) / 255 - np.array(self.mean, np.float32)) / np.array(
            self.deviation, np.float32
        )
        self._network.setInput(np.ascontiguousarray(scaled.transpose(2, 0, 1)[None]))
        return self._network.forward()


class ProbabilityMap(_Network):
    """A network with one map, of the probability that a pixel is in the shrunk middle of a text, as DB has it (Liao et
    al. 2019, arXiv 1911.08947): regions above a threshold, grown by area * unclip / perimeter (section 3.5).

    Args:
        threshold: of the map.
        least: mean probability of a region that counts.
        unclip: by which regions are grown.
    """

    def __init__(
        self,
        model: str,
        size: int = 736,
        mean: list[float] = [0.485, 0.456, 0.406],  # noqa: B006
        deviation: list[float] = [0.229, 0.224, 0.225],  # noqa: B006
        threshold: float = 0.3,
        least: float = 0.6,
        unclip: float = 1.5,
    ) -> None:
        super().__init__(model, size, mean, deviation)
        self.threshold, self.least, self.unclip = threshold, least, unclip

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "threshold": self.threshold, "least": self.least, "unclip": self.unclip}

    def find(self, image: np.ndarray) -> np.ndarray:
        output = self._output(image)
        probability = output.reshape(output.shape[-2:])
        return _quads(probability > self.threshold, probability, self.least, self.unclip, image)


class CharacterMaps(_Network):
    """A network with two maps, of where characters are and of what links them, as CRAFT has it (Baek et al. 2019, arXiv
    1904.01941, section 3.3): regions where either is above its threshold.

    Args:
        threshold: of the character map.
        link: threshold of the affinity map.
        least: largest character score of a region that counts.
    """

    def __init__(
        self,
        model: str,
        size: int = 736,
        mean: list[float] = [0.485, 0.456, 0.406],  # noqa: B006
        deviation: list[float] = [0.229, 0.224, 0.225],  # noqa: B006
        threshold: float = 0.4,
        link: float = 0.4,
        least: float = 0.7,
    ) -> None:
        super().__init__(model, size, mean, deviation)
        self.threshold, self.link, self.least = threshold, link, least

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "threshold": self.threshold, "link": self.link, "least": self.least}

    def find(self, image: np.ndarray) -> np.ndarray:
        output = self._output(image)
        # (1, h, w, 2) in CRAFT's own export, (1, 2, h, w) in others.
        characters, links = np.moveaxis(output[0], -1, 0) if output.shape[-1] == 2 else output[0]
        regions = (characters > self.threshold) | (links > self.link)
        return _quads(regions, characters, self.least, None, image)


def _quads(regions: np.ndarray, score: np.ndarray, least: float, unclip: float | None, image: np.ndarray) -> np.ndarray:
    """Corners of the smallest rectangles around regions of a map, in the image's pixels.

    Args:
        regions: (h, w) bool.
        score: (h, w). A region counts if its score is at least `least`: the mean with `unclip`, else the largest.
        unclip: rectangles are grown by area * unclip / perimeter on each side.
    """
    scale = np.array([image.shape[1] / score.shape[1], image.shape[0] / score.shape[0]])
    outlines, _ = cv2.findContours(regions.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    quads = []
    for outline in outlines:
        x, y, w, h = cv2.boundingRect(outline)
        inside = np.zeros((h, w), np.uint8)
        cv2.drawContours(inside, [outline], 0, 1, cv2.FILLED, offset=(-x, -y))
        scores = score[y : y + h, x : x + w][inside > 0]
        if (scores.max() if unclip is None else scores.mean()) < least:
            continue
        # An outline runs through the middles of pixels, half a pixel within the region's edge.
        center, (width, height), angle = cv2.minAreaRect(outline)
        width, height = width + 1, height + 1
        grown = 2 * width * height * unclip / (2 * (width + height)) if unclip is not None else 0
        quads.append((cv2.boxPoints((center, (width + grown, height + grown), angle)) + 0.5) * scale)
    return np.array(quads).reshape(-1, 4, 2)
