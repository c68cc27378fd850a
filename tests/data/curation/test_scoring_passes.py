"""Filters that look at no pixels, in passes with others and alone."""

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from drawn import media

from data.curation.base import Failure, Filter, Media
from data.curation.hashes import ContentHash
from data.curation.passes import score_batch
from data.curation.sharpness import Sharpness


class Length(Filter):
    """Of the caption. Keeps how many samples it gets at a time."""

    name = "length"
    media = "none"
    columns = pa.schema({"length": pa.int64()})

    def __init__(self) -> None:
        self.calls: list[int] = []

    def settings(self):
        return {}

    def score(self, samples):
        self.calls.append(len(samples))
        return [{"length": len(sample.caption)} for sample in samples]


def samples() -> list[Media]:
    picture = media(np.full((16, 16, 3), 200, np.uint8))
    return [
        Media("text", {"caption": "four"}, None, b"", 512),
        Media("a", {"caption": "one"}, "image", picture.data, 512),
        Media("nothing", {}, None, b"", 512),
        Media("b", {}, "video", b"bytes", 512),
    ]


@pytest.mark.parametrize("others", [[], [Sharpness()]], ids=["alone", "with a filter of pictures"])
def test_what_is_not_decoded_is_handed_over_at_once(others):
    length, none = Length(), Failure("no picture or clip")
    lengths, hashes, *_ = score_batch([length, ContentHash(), *others], samples())
    assert length.calls == [4] and [one["length"] for one in lengths] == [4, 3, 0, 0]
    _, a, _, b = (xxhash.xxh3_128_digest(sample.data) for sample in samples())
    assert hashes == [none, {"content_hash": a}, none, {"content_hash": b}]


def test_nothing_is_decoded_for_a_hash():
    broken = Media("key", {}, "image", b"no picture", 512)
    assert score_batch([ContentHash()], [broken]) == [[{"content_hash": xxhash.xxh3_128_digest(b"no picture")}]]
    assert score_batch([ContentHash()], [Media("key", {}, None, b"", 512)]) == [[Failure("no picture or clip")]]
