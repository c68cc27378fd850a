"""Clips of videos as packed samples."""

import json
import sys
import tarfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "curation"))
import numpy as np
from drawn_clips import decode, encode, moving, texture
from shard_files import write_tar

from conf.compose import compose
from data import pack
from data.curate import curate
from data.curation.cuts import Cuts
from data.index import ensure_indexed
from data.store import Store


@pytest.mark.parametrize("how", ["copy", "encode"])
def test_clips_are_cut_out_of_their_videos(tmp_path, how):
    shots = [moving(texture(i), 30 + 10 * i, 1.0) for i in range(3)]
    video = encode([*shots[0], *shots[1], *shots[2]], form="matroska")
    members = [("a.json", b'{"key": "a", "place": "x"}'), ("a.mkv", video), ("a.txt", b"a caption")]
    write_tar(tmp_path / "in" / "0.tar", members)
    store = Store()
    curate(ensure_indexed([str(tmp_path / "in" / "0.tar")], store), [Cuts()], store)
    out = tmp_path / "out"
    config = compose(
        "pack",
        [
            f"out={out}",
            f"data.sources.v.shards={tmp_path}/in",
            "data.sources.v.manifest=clips",
            "data.sources.v.where='frames > 30'",
            f"data.cache_folder={tmp_path}/cache",
            f"runs={tmp_path}/runs",
            "log.wandb=null",
            f"clips={how}",
            "columns=[start]",
            "shuffle=false",
        ],
    )
    pack.run(config)
    with tarfile.open(out / "00000.tar") as tar:
        packed = {name: tar.extractfile(name).read() for name in tar.getnames()}
    extension = "mkv" if how == "copy" else "mp4"
    assert sorted(packed) == sorted(f"a-{n}.{e}" for n in (1, 2) for e in ("json", "txt", extension))
    whole = decode(video)
    for n, start, end in ((1, 30, 70), (2, 70, 120)):
        frames = decode(packed[f"a-{n}.{extension}"])
        told = json.loads(packed[f"a-{n}.json"])
        assert told == {"key": f"a-{n}", "place": "x", "start": pytest.approx(start / 25)}
        assert packed[f"a-{n}.txt"] == b"a caption"
        if how == "encode":
            assert len(frames) == end - start
            assert all(np.abs(a.astype(int) - b).mean() < 3 for a, b in zip(frames, whole[start:end], strict=True))
        else:
            assert end - start - 8 < len(frames) <= end - start
            assert all(any(np.array_equal(frame, w) for w in whole[start:end]) for frame in (frames[0], frames[-1]))
