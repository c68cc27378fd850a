"""Sharpness and blankness against their definitions in numpy, and against pictures of known order."""

import cv2
import numpy as np
import pytest
from drawn import media, natural
from scipy import ndimage

from data.curation.blank import Blank
from data.curation.sharpness import Sharpness


def test_sharpness_is_the_variance_of_the_laplacian():
    pixels = natural(0)
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY).astype(np.float64)
    expected = ndimage.laplace(grey, mode="mirror").var()
    (scored,) = Sharpness().score([media(pixels)])
    assert scored["sharpness"] == pytest.approx(expected, rel=1e-6)


def test_the_more_a_picture_is_blurred_the_lower_its_sharpness():
    pictures = [natural(1), *(cv2.GaussianBlur(natural(1), (0, 0), sigma) for sigma in (0.7, 1.5, 3.0))]
    values = [scored["sharpness"] for scored in Sharpness().score([media(p) for p in pictures])]
    assert values == sorted(values, reverse=True) and values[0] > 10 * values[-1]


def test_sharpness_is_judged_at_one_size():
    large, small = natural(2, 480, 640), natural(2, 240, 320)
    a, b = Sharpness(240).score([media(large), media(cv2.resize(large, (320, 240), interpolation=cv2.INTER_AREA))])
    assert a["sharpness"] == pytest.approx(b["sharpness"])
    assert Sharpness(240).score([media(small)]) == Sharpness(512).score([media(small)])


def test_blank_pictures_are_uniform_whatever_their_colour():
    white, dark = np.full((80, 90, 3), 255, np.uint8), np.full((80, 90, 3), (10, 5, 0), np.uint8)
    marked = white.copy()
    marked[:8, :9] = 0  # one hundredth
    noisy = np.clip(100 + np.random.default_rng(0).normal(size=(80, 90, 1)), 0, 255).astype(np.uint8).repeat(3, 2)
    scored = Blank().score([media(p) for p in (white, dark, marked, noisy, natural(0))])
    assert [s["uniformity"] for s in scored[:3]] == [1, 1, pytest.approx(0.99)]
    assert scored[3]["uniformity"] > 0.99 > 0.3 > scored[4]["uniformity"]
    assert scored[2]["contrast"] == pytest.approx(255 * np.sqrt(0.01 * 0.99))
    grey = cv2.cvtColor(natural(0), cv2.COLOR_RGB2GRAY).astype(int)
    assert scored[4]["uniformity"] == max(np.mean(abs(grey - middle) <= 4) for middle in range(4, 252))
