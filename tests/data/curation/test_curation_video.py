"""Clips in the curate job: decoded once for all, and judged by their first, middle and last frames."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from drawn_clips import decode, encode, moving, texture
from shard_files import picture, write_tar

from data.curate import Settings, curate
from data.curation.base import Failure, Filter, Media
from data.curation.motion import Motion
from data.curation.probe import Probe
from data.curation.static import Static
from data.curation.video import combine
from data.index import ensure_indexed
from data.scores import open_scores
from data.store import Store
from data.video import Clip


class Brightness(Filter):
    """Of pictures: the mean of each channel, a flag and a number that is none."""

    name = "brightness"
    media = "image"
    columns = pa.schema({"mean": pa.float32(), "vector": pa.list_(pa.float32()), "size": pa.int64()})

    def settings(self) -> dict[str, Any]:
        return {}

    def score(self, samples):
        return [{"mean": float(s.image.mean()), "vector": s.image.mean((0, 1)), "size": s.image.size} for s in samples]


def scores(manifest, name: str, store: Store) -> list[dict]:
    with open_scores(manifest, name, store) as file:
        return file.read().to_pylist()


def test_all_filters_share_one_decoding_and_pictures_filters_see_three_frames(tmp_path, monkeypatch):
    clip = encode([*moving(texture(1), 20, 0), *moving(texture(2), 20, 1), *moving(texture(3), 21, 0)])
    members = [("a.mp4", clip), ("b.jpg", picture(40, 30)), ("c.mp4", clip[:400]), ("d.txt", b"text")]
    write_tar(tmp_path / "0.tar", members)
    store = Store()
    (manifest,) = ensure_indexed([str(tmp_path / "0.tar")], store)
    decoded = []
    frames = Clip.frames
    monkeypatch.setattr(Clip, "frames", lambda clip, *span: decoded.append(span) or frames(clip, *span))
    filters = [Brightness(), Motion(), Static(), Probe()]
    scored = curate([manifest], filters, store, Settings(max_errors=0.5))
    assert decoded == [(0, 61)]
    whole = decode(clip)
    shown = [whole[0], whole[30], whole[60]]
    a, b, c, d = scores(manifest, "brightness", store)
    assert a["mean"] == pytest.approx(np.mean(shown), abs=0.1)
    vectors = np.mean([frame.mean((0, 1)) for frame in shown], 0)
    np.testing.assert_allclose(a["vector"] / np.linalg.norm(a["vector"]), vectors / np.linalg.norm(vectors), atol=1e-3)
    assert a["size"] == whole[0].size and b["size"] == 40 * 30 * 3
    assert c == d == dict.fromkeys(("mean", "vector", "size"))
    assert [row["motion"] is not None for row in scores(manifest, "motion", store)] == [True, False, False, False]
    assert [row["still"] is not None for row in scores(manifest, "static", store)] == [True, False, False, False]
    for name in ("brightness", "motion", "static", "probe"):
        assert scored[name][0].error_counts == (("no picture or clip", 1), ("undecodable clip", 1)), name


def test_scores_of_frames_are_combined_by_their_kind():
    frames = [{"n": 1.0, "v": [3.0, 4.0], "h": 7}, {"n": None, "v": [4.0, 3.0], "h": 8}, {"n": 2.0, "v": None, "h": 9}]
    combined = combine(frames, ["n", "v", "h"])
    assert combined["n"] == 1.5 and combined["h"] == 8
    np.testing.assert_allclose(combined["v"], np.array([1, 1]) / np.sqrt(2) * 5, rtol=1e-6)
    assert combine([frames[0], Failure("why")], ["n"]) == Failure("why")


def test_probe_tells_what_the_encoder_was_told():
    data = encode(moving(texture(1), 50, 1), g=20, sc_threshold=0, pixel_format="yuv444p")
    told = Probe().score([Media("key", {}, "video", data, 512)])[0]
    assert (told["codec"], told["pixel_format"], told["sound"], told["rotation"]) == ("h264", "yuv444p", False, 0)
    assert (told["counted_frames"], told["key_frames"]) == (50, 3)
    assert told["key_interval"] == pytest.approx(0.8, abs=0.01)
    assert told["fps_spread"] == pytest.approx(1, abs=0.01)
    assert told["bit_rate"] == pytest.approx(8 * len(data) / 2, rel=0.15)
    irregular = encode(moving(texture(1), 6, 1), times=[0, 1, 2, 7, 8, 9])
    assert Probe().score([Media("key", {}, "video", irregular, 512)])[0]["fps_spread"] == pytest.approx(5, abs=0.01)
