"""Text area against text that the tests draw."""

import pickle

import cv2
import numpy as np
import pytest
from drawn import media, natural
from onnx_file import write_convolution
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from data.curation.text_area import TextArea, covered
from data.curation.text_detectors import CharacterMaps, Components, ProbabilityMap, _boxes, _rows, _runs

FONTS = [cv2.FONT_HERSHEY_SIMPLEX, cv2.FONT_HERSHEY_DUPLEX, cv2.FONT_HERSHEY_TRIPLEX, cv2.FONT_HERSHEY_COMPLEX]
WORDS = [
    "The",
    "quick",
    "brown",
    "foxes",
    "jumped",
    "over",
    "lazy",
    "dogs",
    "while",
    "seven",
    "wizards",
    "packed",
    "boxes",
]


def write_lines(pixels: np.ndarray, color: int, seed: int) -> float:
    """Draw lines of text; returns the share of the picture that boxes around their ink cover."""
    rng = np.random.default_rng(seed)
    boxes = np.zeros(pixels.shape[:2], bool)
    top = 10
    for _ in range(rng.integers(1, 8)):
        scale = rng.uniform(0.6, 1.6)
        font, thickness = FONTS[rng.integers(4)], max(1, round(scale * rng.uniform(1, 2)))
        words = rng.choice(WORDS, rng.integers(1, 5)).tolist()
        while (size := cv2.getTextSize(" ".join(words), font, scale, thickness))[0][0] > pixels.shape[1] - 20:
            words.pop()
        (width, height), below = size
        if top + height + below + 5 > pixels.shape[0]:
            break
        place = int(rng.integers(5, pixels.shape[1] - width - 4)), top + height
        ink = np.zeros(pixels.shape[:2], np.uint8)
        cv2.putText(ink, " ".join(words), place, font, scale, 255, thickness, cv2.LINE_AA)
        cv2.putText(pixels, " ".join(words), place, font, scale, (color,) * 3, thickness, cv2.LINE_AA)
        rows, columns = np.nonzero(ink > 64)
        boxes[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
        top += height + below + int(rng.integers(6, 40))
    return float(boxes.mean())


@pytest.mark.parametrize(
    ("ground", "color"),
    [
        (lambda seed: np.full((480, 640, 3), 255, np.uint8), 0),
        (lambda seed: np.full((480, 640, 3), 30, np.uint8), 240),
        (lambda seed: natural(seed, 480, 640) // 2, 255),
    ],
    ids=["black on white", "white on dark", "white on a picture"],
)
def test_the_area_of_drawn_text_is_found_within_a_fifth(ground, color):
    for seed in range(20):
        pixels = ground(seed)
        text_filter = TextArea(Components())
        assert text_filter.score([media(pixels)])[0]["text_area"] == 0
        expected = write_lines(pixels, color, seed)
        (scored,) = text_filter.score([media(pixels, quality=90)])
        assert scored["text_area"] == pytest.approx(expected, rel=0.2), seed


def test_shapes_that_are_no_text_are_not_counted():
    pixels = np.full((300, 400, 3), 220, np.uint8)
    cv2.circle(pixels, (90, 90), 60, (20, 40, 200), cv2.FILLED)
    cv2.rectangle(pixels, (200, 40), (380, 150), (10, 120, 10), cv2.FILLED)
    cv2.line(pixels, (0, 299), (399, 180), (0, 0, 0), 3)
    assert TextArea(Components()).score([media(pixels)])[0]["text_area"] == 0


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 1.0])
def test_boxes_of_shapes_are_those_that_opencv_counts(share):
    rng = np.random.default_rng(0)
    for size in ((1, 1), (1, 40), (40, 1), (30, 51)):
        mask = (rng.random(size) < share).astype(np.uint8)
        count, labels, expected, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
        row, start, end = _runs(mask)
        found = np.column_stack(_boxes(row, start, end, labels[row, start], count))
        assert found[1:].tolist() == expected[1:].tolist()  # 0 is the ground


def follows(a: list[float], b: list[float]) -> bool:
    """Whether shape b may stand in a row to the right of shape a."""
    (left, top, width, height, brightness, stroke), other = a, b
    higher, lower = max(height, other[3]), min(height, other[3])
    return (
        other[0] > left
        and -0.3 * higher < other[0] - left - width < higher < 2.2 * lower
        and min(top + height, other[1] + other[3]) - max(top, other[1]) > 0.6 * lower
        and abs(brightness - other[4]) < 25
        and max(stroke, other[5]) < 1.6 * min(stroke, other[5])
    )


@pytest.mark.parametrize("count", [0, 2, 3, 40, 300])
def test_rows_are_those_of_all_pairs_of_shapes(count):
    rng = np.random.default_rng(count)
    lines = 20 * rng.integers(0, 10, count)
    shapes = np.column_stack(
        [
            rng.integers(0, 2 * count + 1, count),
            lines + rng.integers(0, 5, count),
            rng.integers(5, 13, (2, count)).T,
            rng.integers(0, 40, count),
            rng.uniform(1, 2, count),
        ]
    )
    alike = np.array([[follows(a, b) for b in shapes.tolist()] for a in shapes.tolist()]).reshape(count, count)
    _, group = connected_components(csr_array(alike), directed=False) if count else (0, np.zeros(0, int))
    expected = []
    for members in (shapes[group == one] for one in range(count)):
        if len(members) >= 3:
            left, top = members[:, :2].min(0)
            right, bottom = (members[:, :2] + members[:, 2:4]).max(0)
            if bottom - top < 2 * members[:, 3].max() and right - left > 1.5 * (bottom - top):
                expected.append([left, top, right, bottom])
    assert sorted(_rows(shapes).tolist()) == sorted(expected) and (len(expected) > 1 or count < 40)


def test_overlapping_boxes_count_once():
    quads = np.array([[[0, 0], [9, 0], [9, 9], [0, 9]], [[5, 0], [14, 0], [14, 9], [5, 9]]], float)
    assert covered(quads, (20, 20)) == pytest.approx(150 / 400)


WORD = (64, 96, 320, 160)  # left, top, right, bottom: a black box stands for a word


def page() -> np.ndarray:
    pixels = np.full((256, 448, 3), 255, np.uint8)
    left, top, right, bottom = WORD
    pixels[top:bottom, left:right] = 0
    return pixels


def test_a_network_of_two_maps_finds_words(tmp_path):
    """Character score 1 where it is dark; affinity is 0 throughout."""
    weights, bias = np.array([[-10.0] * 3, [0.0] * 3]), np.array([10.0, -20.0])
    model = write_convolution(tmp_path / "craft.onnx", weights, bias)
    detector = CharacterMaps(str(model), size=256, mean=[0, 0, 0], deviation=[1, 1, 1])
    (scored,) = TextArea(detector).score([media(page())])
    assert scored["text_area"] == pytest.approx(256 * 64 / (256 * 448), rel=0.03)
    larger = cv2.resize(page(), None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    assert TextArea(detector).score([media(larger, side=1024)])[0]["text_area"] == pytest.approx(
        scored["text_area"], rel=0.03
    )
    again = pickle.loads(pickle.dumps(detector))
    assert again.find(page()).tolist() == detector.find(page()).tolist()


def test_a_network_of_one_map_finds_regions_and_grows_them(tmp_path):
    model = write_convolution(tmp_path / "db.onnx", np.array([[-10.0] * 3]), np.array([10.0]))
    detector = ProbabilityMap(str(model), size=256, mean=[0, 0, 0], deviation=[1, 1, 1], unclip=1.5)
    (quad,) = detector.find(page())
    grown = 256 * 64 * 1.5 / (2 * (256 + 64))
    left, top, right, bottom = WORD
    expected = [left - grown, top - grown, right + grown, bottom + grown]
    assert [*quad.min(0), *quad.max(0)] == pytest.approx(expected, abs=1)


def test_other_weights_are_another_setting(tmp_path):
    settings = []
    for bias in (0.0, 1.0):
        model = write_convolution(tmp_path / "m.onnx", np.ones((1, 3)), np.array([bias]))
        settings.append(TextArea(ProbabilityMap(str(model))).settings())
    assert settings[0] != settings[1]
    with pytest.raises(ValueError, match=r"no text detection model at .*nowhere"):
        ProbabilityMap(str(tmp_path / "nowhere.onnx"))
