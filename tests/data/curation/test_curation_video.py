"""Clips in the curate job: decoded once for all, and judged by their first, middle and last frames."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from drawn_clips import decode, encode, moving, texture
from shard_files import picture, write_tar

from data.clips import ensure_clips
from data.curate import Settings, curate
from data.curation import video as curation_video
from data.curation.base import Failure, Filter, Media
from data.curation.cuts import Cuts
from data.curation.media import _batches, read_media
from data.curation.motion import Motion
from data.curation.passes import score_batch
from data.curation.probe import Probe
from data.curation.static import Static
from data.curation.video import combine
from data.index import ensure_indexed
from data.scores import open_scores
from data.store import Store
from data.video import Clip, open_clip


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


class Stills(Filter):
    """Keeps the pixels that it is shown of each sample."""

    name = "stills"
    media = "image"
    columns = pa.schema({})

    def __init__(self) -> None:
        self.seen: list[list[bytes]] = []

    def settings(self) -> dict[str, Any]:
        return {}

    def score(self, samples):
        self.seen.append([s.image.tobytes() for s in samples])
        return [{}] * len(samples)


class Middle(Stills):
    name = "middle"
    frames = ("middle",)


def shown(samples: list[Media], one: Stills, *others: Filter) -> list:
    """The frames that a filter is shown of each sample, in a pass with others; or why it is shown none."""
    outcomes = score_batch([one, *others], samples)[0]
    return [outcome if isinstance(outcome, Failure) else one.seen.pop(0) for outcome in outcomes]


@pytest.mark.parametrize("count", [1, 2, 3, 61])
def test_frames_are_those_of_the_whole_clip_whoever_else_watches(count):
    data = encode(moving(texture(1), count, 1.0), g=12, bf=2)
    whole = [frame.tobytes() for frame in decode(data)]
    three = [whole[0], whole[count // 2], whole[-1]]
    for filters, expected in (
        ([Stills()], three),
        ([Stills(), Static()], three),
        ([Stills(), Middle()], three),
        ([Middle(), Static(), Stills()], three[1:2]),
        ([Middle()], three[1:2]),
    ):
        assert shown([Media("key", {}, "video", data, 512)], *filters) == [expected]


def test_frames_of_damaged_clips_are_the_same_whoever_else_watches():
    data = bytearray(encode(moving(texture(1), 60, 1.0), g=12, bf=2, form="matroska"))
    with open_clip(bytes(data)) as clip:
        (place,) = [data.find(bytes(p)) for p in clip._packets if p.pts == clip.timeline.pts[12]]
    data[place : place + 2000] = bytes(2000)  # a key frame, past which the first frame lies
    samples = [Media("key", {}, "video", bytes(data), 512)]
    assert isinstance(score_batch([Static()], samples)[0][0], Failure)
    alone = shown(samples, Stills())
    assert len(alone[0]) == 3 and alone == shown(samples, Stills(), Static())
    samples[0].span = (12, 20)
    assert isinstance(shown(samples, Stills())[0], Failure) and isinstance(
        shown(samples, Stills(), Static())[0], Failure
    )


def test_only_groups_of_pictures_with_wanted_frames_are_decoded(monkeypatch):
    data = encode(moving(texture(1), 100, 1.0), g=10, bf=0, sc_threshold=0)
    decoded = []
    frames = Clip._decode
    monkeypatch.setattr(Clip, "_decode", lambda *a: (decoded.append(f) or f for f in frames(*a)))
    assert len(shown([Media("key", {}, "video", data, 512)], Stills())[0]) == 3
    assert len(decoded) == 1 + 1 + 10
    decoded.clear()
    shown([Media("key", {}, "video", data, 512)], Middle())
    assert len(decoded) == 1


def test_clips_of_one_video_are_read_opened_and_decoded_once(tmp_path, monkeypatch):
    videos = [
        encode([*moving(texture(i), 30, 0), *moving(texture(i + 5), 30, 1)], g=250, sc_threshold=0) for i in (1, 2)
    ]
    write_tar(tmp_path / "0.tar", [(f"{i}.mp4", data) for i, data in enumerate(videos)])
    store = Store()
    manifests = ensure_indexed([str(tmp_path / "0.tar")], store)
    curate(manifests, [Cuts()], store)
    (clips,) = ensure_clips(manifests, store)
    assert clips.rows == 4
    read, opened, decoded = [], [], []
    reading, opening, frames = Store.read, curation_video.open_clip, Clip._decode
    monkeypatch.setattr(Store, "read", lambda s, url, *a: read.append(a) or reading(s, url, *a))
    monkeypatch.setattr(curation_video, "open_clip", lambda data: opened.append(len(data)) or opening(data))
    monkeypatch.setattr(Clip, "_decode", lambda *a: (decoded.append(f) or f for f in frames(*a)))
    filters = [Stills(), Static()]
    samples = [s for batch in read_media(clips, store, [], frozenset({"video"}), 512, 3) for s in batch]
    assert samples[0].data is samples[1].data == videos[0] and samples[2].data is samples[3].data == videos[1]
    tar = [a for a in read if a and a[1] >= min(map(len, videos))]
    assert sum(size for _, size in tar) < len(videos[0]) + len(videos[1]) + 2048
    whole = [frame.tobytes() for data in videos for frame in decode(data)]
    expected = [[whole[30 * i + k] for k in (0, 15, 29)] for i in range(4)]
    assert shown(samples, *filters) == expected
    assert opened == [len(data) for data in videos] and len(decoded) == 120
    decoded.clear()
    assert shown(samples[::-1], *filters) == expected[::-1]


def test_large_videos_fill_a_batch_once_however_many_clips_they_have(monkeypatch):
    monkeypatch.setattr("data.curation.media.LARGEST_BATCH", 100)
    places = [(0, 60), (0, 60), (0, 60), (60, 30), (90, 20), (90, 20), (200, 150), (200, 150)]
    table = pa.table(
        {
            "extensions": [["mp4"]] * len(places),
            "offsets": [[offset] for offset, _ in places],
            "sizes": [[size] for _, size in places],
        }
    )
    parts = [(part.start, part.stop) for part in _batches(table, 5)]
    assert parts == [(0, 4), (4, 6), (6, 8)]


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
