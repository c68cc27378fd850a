"""Cut detection on videos edited with known cuts, and the clips that come of it."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from drawn_clips import decode, encode, faded, moving, texture
from edited_videos import Edited, edited, matches
from shard_files import write_tar

from data.clips import ensure_clips
from data.curate import Settings, curate
from data.curation.base import Failure, Media
from data.curation.cuts import Cuts
from data.curation.motion import Motion
from data.curation.static import Static
from data.index import ensure_indexed
from data.scores import open_scores, score_url
from data.selection import select
from data.store import Store
from data.video import cut
from tests.foreign import ask, install

TOLERANCE = 2


def cuts_of(data: bytes, **settings) -> list[int]:
    return Cuts(**settings).score([Media("key", {}, "video", data, 512)])[0]["cuts"]


def f1_by_kind(videos: list[Edited], found: list[list[int]]) -> dict[str, float]:
    """Each kind's F1 is charged with all that was found wrongly."""
    right = {"cut": 0, "fade": 0, "dissolve": 0}
    there = dict(right)
    wrong = 0
    for video, cuts in zip(videos, found, strict=True):
        matched = matches(cuts, [frame for frames in video.cuts.values() for frame in frames], TOLERANCE)
        wrong += len(cuts) - len(matched)
        for kind, frames in video.cuts.items():
            there[kind] += len(frames)
            right[kind] += len(matched & set(frames))
    return {kind: 2 * right[kind] / (there[kind] + right[kind] + wrong) for kind in right}


@pytest.mark.slow
def test_cuts_fades_and_dissolves_are_found_among_motion_flashes_and_changes_of_light():
    videos = [edited(seed) for seed in range(200, 224)]
    assert all(sum(len(video.cuts[kind]) for video in videos) >= 10 for kind in videos[0].cuts)
    f1 = f1_by_kind(videos, [cuts_of(video.data) for video in videos])
    assert f1["cut"] >= 0.95 and f1["fade"] >= 0.8 and f1["dissolve"] >= 0.5, f1


PYSCENEDETECT = """
import json, sys
from scenedetect import AdaptiveDetector, ContentDetector, SceneManager, ThresholdDetector, open_video

content, adaptive, fades = ContentDetector, AdaptiveDetector, ThresholdDetector
found = []
for kinds in ([content], [adaptive], [content, fades], [adaptive, fades]):
    found.append([])
    for path in sys.argv[1:]:
        manager = SceneManager()
        for kind in kinds:
            manager.add_detector(kind())
        manager.detect_scenes(open_video(path))
        found[-1].append([cut.frame_num for cut in manager.get_cut_list()])
print(json.dumps(found))
"""


@pytest.mark.slow
def test_more_is_found_than_by_pyscenedetect(tmp_path):
    libraries = install(tmp_path / "libraries", "scenedetect==0.7.2", "click==8.1.8", "platformdirs")
    videos = [edited(seed) for seed in range(200, 212)]
    paths = [tmp_path / f"{i}.mp4" for i in range(len(videos))]
    for path, video in zip(paths, videos, strict=True):
        path.write_bytes(video.data)
    ours = f1_by_kind(videos, [cuts_of(video.data) for video in videos])
    theirs = [f1_by_kind(videos, found) for found in ask(libraries, PYSCENEDETECT, *map(str, paths))]
    assert max(f1["cut"] for f1 in theirs) > 0.2  # it did look at them
    assert all(ours[kind] >= f1[kind] for f1 in theirs for kind in ours), (ours, theirs)


def test_each_detector_finds_what_the_faster_ones_miss():
    a, b = moving(texture(1), 60, 0.5), moving(texture(2), 60, 0.5)

    def joined(length: int) -> bytes:
        shares = np.linspace(0, 1, length + 2)[1:-1]
        mixed = [
            np.clip(x * (1 - s) + y * s, 0, 255).astype(np.uint8)
            for x, y, s in zip(a[60 - length :], b[:length], shares, strict=True)
        ]
        return encode([*a[: 60 - length], *mixed, *b[length:]])

    detectors = [
        {"spans": [0.0], "thresholds": [8.0], "contrast": [2.5]},
        {"spans": [0.16], "thresholds": [16.0], "contrast": [2.0]},
        {"spans": [0.8], "thresholds": [20.0], "contrast": [1.7]},
    ]
    for length, first in ((0, 0), (3, 1), (14, 2)):
        data, middle = joined(length), 60 - length + length // 2
        found = [bool(matches(cuts_of(data, **one), [middle], TOLERANCE)) for one in detectors]
        assert found.index(True) == first, (length, found)
        assert matches(cuts_of(data), [middle], TOLERANCE) and len(cuts_of(data)) == 1


def test_clips_leave_out_the_frames_of_a_fade():
    a, b = moving(texture(1), 60, 0.5), moving(texture(2), 60, 0.5)
    a[-10:] = faded(a[-10:], np.linspace(1, 0, 11)[:-1])
    b[:12] = faded(b[:12], np.linspace(0, 1, 13)[1:])
    data = encode([*a, *[np.zeros_like(a[0])] * 6, *b])
    told = Cuts().score([Media("key", {}, "video", data, 512)])[0]
    first, second = told["clips"]
    assert told["shots"] == 2 and told["cuts"] == pytest.approx([63], abs=TOLERANCE)
    assert first["start_frame"] == 0 and first["end_frame"] == pytest.approx(51, abs=2)
    assert second["start_frame"] == pytest.approx(77, abs=2) and second["end_frame"] == 126


def test_settings_are_checked_and_damaged_videos_are_failures():
    with pytest.raises(ValueError, match="entry for each detector"):
        Cuts(spans=[0.0])
    with pytest.raises(ValueError, match="must rise"):
        Cuts(spans=[0.5, 0.0, 0.8])
    data = encode(moving(texture(1), 20, 1.0))
    assert isinstance(Cuts().score([Media("key", {}, "video", data[:200], 512)])[0], Failure)
    assert cuts_of(encode(moving(texture(1), 1, 1.0))) == []


def test_clips_are_samples_to_filters_selections_and_cutting(tmp_path):
    shots = [moving(texture(i), 30 + 10 * i, speed) for i, speed in enumerate((0, 1, 0, 2))]
    videos = [encode([*shots[0], *shots[1]]), encode([*shots[2], *shots[3], *shots[1]]), b"no video"]
    members = [
        ("a.mp4", videos[0]),
        ("a.json", b'{"start": 7, "place": "x"}'),
        ("b.mp4", videos[1]),
        ("c.mp4", videos[2]),
    ]
    write_tar(tmp_path / "0.tar", members)
    store = Store()
    manifests = ensure_indexed([str(tmp_path / "0.tar")], store)
    with pytest.raises(ValueError, match=r"filter=\[cuts\]"):
        ensure_clips(manifests, store)

    settings = Settings(max_errors=0.5)
    curate(manifests, [Cuts()], store, settings)
    (clips,) = ensure_clips(manifests, store)
    rows = pq.read_table(clips.url).to_pylist()
    assert [row["key"] for row in rows] == ["a-0", "a-1", "b-0", "b-1", "b-2"]
    assert [row["video"] for row in rows] == ["a", "a", "b", "b", "b"]
    assert [(row["start_frame"], row["end_frame"]) for row in rows] == [
        (0, 30),
        (30, 70),
        (0, 50),
        (50, 110),
        (110, 150),
    ]
    assert [row["start"] for row in rows] == pytest.approx([0, 1.2, 0, 2, 4.4])
    assert [row["frames"] for row in rows] == [30, 40, 50, 60, 40]
    assert [row["duration"] for row in rows] == pytest.approx([1.2, 1.6, 2, 2.4, 1.6])
    assert rows[0]["key_hash"] == rows[1]["key_hash"] != rows[2]["key_hash"]
    assert (rows[0]["json_start"], rows[0]["place"], rows[2]["place"]) == (7, "x", None)
    # The encoder set key frames at the cuts, so that clips can be copied but for a few frames at most.
    for row in rows:
        part = cut(videos["ab".index(row["video"])], row["copy_start_frame"], row["copy_end_frame"], reencode=False)
        assert len(decode(part)) == row["copy_end_frame"] - row["copy_start_frame"] > row["frames"] - 8

    curate([clips], [Motion(), Static()], store, settings)
    assert score_url(clips.url, "motion") != score_url(manifests[0].url, "motion")
    with open_scores(clips, "motion", store) as file:
        motion = file.read()["motion"].to_pylist()
    drawn = [100 * speed * 25 / 120 for speed in (0, 1, 0, 2, 1)]
    np.testing.assert_allclose(motion, drawn, rtol=0.1, atol=0.1)
    chosen = select([clips], store, "motion > 1 AND still < 0.5 AND frames >= 40", cache_folder=str(tmp_path / "cache"))
    assert [row for _, row in chosen.locate(np.arange(len(chosen)))] == [1, 3, 4]

    written = (tmp_path / "0.clips.manifest.parquet").read_bytes()
    assert ensure_clips(manifests, store) == [clips]
    assert (tmp_path / "0.clips.manifest.parquet").read_bytes() == written
    curate(manifests, [Cuts(spans=[0.0], thresholds=[1e4], contrast=[2.5])], store, settings)
    (fewer,) = ensure_clips(manifests, store)
    assert fewer.rows == 2
    with pytest.raises(ValueError, match="another state"):
        open_scores(fewer, "motion", store)
