"""What cannot be packed: damaged samples, other selections, foreign folders."""

import json
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data.index import ensure_indexed
from data.scores import write_scores
from data.store import Store
from tests.data.packing.packed import contents, in_tar, run, tars, write_sources
from tests.data.shard_files import sample, write_shard
from tools.cli import execute


def spoil(path: Path, key: str, how: str) -> None:
    """Damage a picture within a tar that is indexed already."""
    with tarfile.open(path) as tar:
        member = tar.getmember(f"{key}.jpg")
    data = bytearray(path.read_bytes())
    if how == "payload":
        middle = member.offset_data + member.size // 3
        data[middle : member.offset_data + member.size] = bytes(member.offset_data + member.size - middle)
    else:
        header = tarfile.TarInfo("other.jpg")
        header.size = member.size
        data[member.offset_data - 512 : member.offset_data] = header.tobuf(tarfile.USTAR_FORMAT)
    stat = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_unreadable_samples_are_counted_listed_and_left_out(tmp_path, capsys):
    path = write_shard(tmp_path / "in" / "0.tar", [sample(i) for i in range(20)])
    ensure_indexed([str(path)], Store())
    spoil(path, "000003", "payload")
    spoil(path, "000011", "header")
    given = [f"data.sources.x.shards={tmp_path / 'in'}", "samples_per_shard=10", "shuffle=false"]
    assert run(f"out={tmp_path / 'out'}", *given) == 0
    shown = capsys.readouterr().out
    assert "18 samples" in shown and "2 samples could not be read" in shown
    assert "'000003' in 0.tar: " in shown and "'000011' in 0.tar: its .jpg is no longer at byte" in shown
    assert in_tar(tmp_path / "out").keys() == {f"{i:06d}" for i in range(20)} - {"000003", "000011"}
    rows = {
        r["key"]: r
        for name in ("00000", "00001")
        for r in pq.read_table(tmp_path / "out" / f"{name}.parquet").to_pylist()
    }
    assert rows["000003"]["status"] == "failed_to_resize" and rows["000003"]["width"] is None
    assert rows["000011"]["status"] == "failed_to_download" and "no longer at byte" in rows["000011"]["error_message"]
    stats = json.loads((tmp_path / "out" / "00000_stats.json").read_text())
    assert (stats["count"], stats["successes"], stats["failed_to_resize"]) == (10, 9, 1)
    assert json.loads((tmp_path / "out" / "sizes.json").read_text()) == {"00000.tar": 9, "00001.tar": 9}
    assert run(f"out={tmp_path / 'out'}", *given) == 0
    assert "'000003' in 0.tar: " in capsys.readouterr().out  # told again by a rerun, which reads no sample
    assert run(f"out={tmp_path / 'strict'}", "max_errors=0.05", *given) == 1
    shown = capsys.readouterr().err
    assert "more than max_errors allows" in shown and "000003" in shown
    assert not tars(tmp_path / "strict") and not list((tmp_path / "strict").glob(".*"))


def test_checksums_find_what_still_decodes(tmp_path):
    path = write_shard(tmp_path / "in" / "0.tar", [sample(i) for i in range(10)])
    ensure_indexed([str(path)], Store(), checksum="xxh128")
    stat, content = path.stat(), path.read_bytes()
    path.write_bytes(content.replace(b"caption 4", b"caption 7"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    given = [f"data.sources.x.shards={tmp_path / 'in'}", "data.checksum=xxh128"]
    assert run(f"out={tmp_path / 'out'}", *given) == 0
    [bad] = [r for r in pq.read_table(tmp_path / "out" / "00000.parquet").to_pylist() if r["status"] != "success"]
    assert bad["key"] == "000004" and bad["status"] == "failed_to_download"
    assert "its .txt has another checksum than when it was indexed" in bad["error_message"]
    assert execute(["index", f"shards={tmp_path / 'out'}", "verify=true"]) == 0


def test_scores_that_change_amid_a_pack_are_noticed(tmp_path, capsys):
    path = write_shard(tmp_path / "in" / "0.tar", [sample(i) for i in range(4)])
    [manifest] = ensure_indexed([str(path)], Store())
    given = [f"out={tmp_path / 'out'}", f"data.sources.x.shards={tmp_path / 'in'}"]
    for column, more in (("taste", ["columns=[taste]"]), ("words", ["data.sources.x.caption=words"])):
        for name in ("first", "second"):
            write_scores(manifest, column, pa.table({column: [name] * 4}), Store())
            given[0] = f"out={tmp_path / column}"
            assert run(*given, *more) == (0 if name == "first" else 2)
        assert "holds another pack (scores differ" in capsys.readouterr().err


def test_another_selection_or_foreign_tars_in_the_folder_are_refused(tmp_path, capsys):
    overrides = write_sources(tmp_path)
    out = f"out={tmp_path / 'out'}"
    assert run(out, *overrides) == 0
    before = contents(tmp_path / "out")
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    assert run(out, *overrides, "max_errors=0.5") == 0
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == times  # nothing to do, nothing done
    for change, named in {
        "data.sources.a.where=index >= 4": "sources",
        "seed=1": "seed",
        "samples_per_shard=7": "shards",
        "short_side=8": "pictures",
        "columns=[similarity]": "columns",
    }.items():
        capsys.readouterr()
        assert run(out, *overrides, change) == 2
        shown = capsys.readouterr().err
        assert "holds another pack" in shown and named in shown
    assert contents(tmp_path / "out") == before
    assert run(f"out={tmp_path / 'a'}", *overrides) == 2
    assert "holds tars that no pack has written" in capsys.readouterr().err
    for wrong in ("columns=[nothing]", "columns=[offsets]", "samples_per_shard=0", "quality=0", "cluster.task=1"):
        assert run(f"out={tmp_path / 'new'}", *overrides, wrong) == 2
        assert wrong.partition("=")[0] in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
