"""Timelines of clips and their parts, against PyAV decoding the whole clip."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "curation"))
from drawn_clips import decode, encode, moving, texture

from data.video import Clip, VideoError, cut, open_clip, read_timeline

KINDS: dict[str, dict] = {
    "with B-frames": {"g": 12, "bf": 3},
    "without": {"g": 12, "bf": 0},
    "open groups": {"g": 12, "bf": 3, "x264-params": "open-gop=1"},
    "Matroska": {"g": 12, "bf": 3, "form": "matroska"},
    "VP9": {"codec": "libvpx-vp9", "form": "webm", "g": 10, "deadline": "realtime"},
    "MPEG-4 in AVI": {"codec": "mpeg4", "form": "avi", "g": 10},
    "MPEG transport stream": {"form": "mpegts", "g": 12, "bf": 3},
}


def clip(kind: str, count: int = 40) -> bytes:
    return encode(moving(texture(1), count, 1.7, 0.6), **KINDS[kind])


def equal(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_any_part_decodes_to_the_frames_of_the_whole(kind):
    data = clip(kind)
    whole, timeline = decode(data), read_timeline(data)
    assert len(timeline) == len(whole) == 40
    np.testing.assert_allclose(timeline.seconds, np.arange(41) / 25, atol=1e-3)
    for start, end in ((0, 40), (0, 5), (1, 2), (11, 13), (12, 24), (13, 40), (39, 40), (23, 37)):
        with open_clip(data) as opened:
            for _ in range(2):  # a clip may be decoded more than once
                part = [frame.to_ndarray(format="rgb24") for frame in opened.frames(start, end)]
                assert equal(part, whole[start:end]), (start, end)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_an_open_clip_are_the_same_in_any_order(kind):
    data = clip(kind)
    whole = decode(data)
    parts = [(0, 5), (5, 11), (11, 12), (30, 31), (31, 40), (39, 40), (3, 9), (2, 4), (14, 26), (26, 27), (13, 14)]
    with open_clip(data) as opened:
        for start, end in parts:
            part = [frame.to_ndarray(format="rgb24") for frame in opened.frames(start, end)]
            assert equal(part, whole[start:end]), (start, end)
        next(opened.frames(20, 30))  # a reader that breaks off
        assert equal([frame.to_ndarray(format="rgb24") for frame in opened.frames(22, 24)], whole[22:24])


def test_decoding_goes_on_where_it_was_unless_a_key_frame_is_nearer(monkeypatch):
    begun = []
    begin = Clip._decode
    monkeypatch.setattr(Clip, "_decode", lambda clip, skipped: begun.append(skipped) or begin(clip, skipped))
    with open_clip(encode(moving(texture(1), 40, 1.0), g=12, bf=0, sc_threshold=0)) as opened:
        for start, end, at in ((0, 5, 0), (5, 7, None), (9, 12, None), (12, 14, None), (20, 21, None), (30, 31, 24)):
            assert len(list(opened.frames(start, end))) == end - start
            assert begun == ([at] if at is not None else [])
            begun.clear()
        list(opened.frames(30, 31))
        assert begun == [24]


def test_damage_is_told_to_all_who_ask_for_damaged_frames_and_to_no_others():
    data = clip("Matroska")
    whole = decode(data)
    with open_clip(data) as opened:
        (key,) = [data.find(bytes(packet)) for packet in opened._packets if packet.pts == opened.timeline.pts[12]]
    with open_clip(data[:key] + bytes(2000) + data[key + 2000 :]) as opened:
        for start, end in ((0, 20), (14, 16), (12, 13)):
            with pytest.raises(VideoError, match="cannot decode"):
                list(opened.frames(start, end))
        for start, end in ((0, 5), (24, 30)):
            assert equal([frame.to_ndarray(format="rgb24") for frame in opened.frames(start, end)], whole[start:end])


@pytest.mark.parametrize("kind", KINDS)
def test_packets_are_cut_out_at_key_frames_without_changing_a_pixel(kind):
    data = clip(kind)
    whole, timeline = decode(data), read_timeline(data)
    for start, end in ((0, 40), (5, 33), (10, 30), (0, 7)):
        found = timeline.copyable(start, end)
        if kind == "open groups" and start > 0:  # frames shown before a key frame come after it
            assert found is None
            continue
        begin, stop = found
        assert start <= begin < stop <= end
        assert end - stop < 5, "the end need not be at a key frame"
        part = cut(data, begin, stop, reencode=False)
        assert equal(decode(part), whole[begin:stop]), (begin, stop)
        np.testing.assert_allclose(read_timeline(part).seconds, np.arange(stop - begin + 1) / 25, atol=2e-3)
        assert cut(data, begin, stop, reencode=False) == part
    assert timeline.copyable(1, 6) is None
    with pytest.raises(VideoError, match="depend on others"):
        cut(data, 1, 6, reencode=False)


def test_encoding_anew_gives_exactly_the_frames_asked_for_at_their_times():
    times = [0, 1, 2, 4, 5, 8, 9, 10, 11, 14, 15, 16, 17, 18, 19, 20]  # not of equal length
    data = encode(moving(texture(1), len(times), 4.0), times=times, g=6)
    whole = decode(data)
    part = cut(data, 3, 12, reencode=True, crf=8)
    again = decode(part)
    assert len(again) == 9
    for i, frame in enumerate(again):
        errors = [np.abs(frame.astype(int) - other).mean() for other in whole]
        assert np.argmin(errors) == 3 + i and errors[3 + i] < 2
    np.testing.assert_allclose(read_timeline(part).seconds[:-1], (np.array(times[3:12]) - 4) / 25, atol=1e-3)
    assert cut(data, 3, 12, reencode=True, crf=8) == part
    for kind in ("Matroska", "VP9", "MPEG-4 in AVI"):  # to the end, where decoders still hold frames
        assert len(decode(cut(clip(kind), 25, 40, reencode=True))) == 15


def test_wrong_parts_and_damaged_clips_are_refused_with_a_reason():
    data = clip("with B-frames")
    for start, end in ((0, 41), (5, 5), (-1, 3)):
        with pytest.raises(VideoError, match="not a part"):
            cut(data, start, end, reencode=True)
    for damaged in (b"", b"no clip", data[:500]):
        with pytest.raises(VideoError):
            read_timeline(damaged)
