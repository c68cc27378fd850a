"""Packed tars against the selection they are of: through the loader, through webdataset, and after kills."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
from PIL import Image

from conf.errors import ConfigError
from data.buckets import Bucket, Buckets
from data.index import ensure_indexed
from data.manifest import manifest_url, read_manifest
from data.scores import write_scores
from data.store import Store
from data.tars import TarData
from tests.data.shard_files import picture, sample, write_shard, write_tar
from tests.foreign import ask, install
from tools.cli import JOBS, execute

ROOT = Path(__file__).parents[2]
BUCKETS = Buckets([Bucket(16, 16)])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MILLRACE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)  # for runs/


def photo(width: int, height: int, seed: int) -> bytes:
    """A smooth picture, as JPEG: noise would not survive encoding."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
    return file.getvalue()


def write_sources(folder: Path) -> list[str]:
    """Two sources whose shards share keys, and the overrides that name them."""
    for shard in range(2):
        samples = [sample(i, width=24 + shard) for i in range(20)]
        write_shard(folder / "a" / f"{shard:05d}.tar", samples)
    write_shard(folder / "b" / "00000.tar", [sample(i, "b/", width=40) for i in range(15)])
    return [
        f"data.sources.a.shards={folder / 'a'}",
        "data.sources.a.where=index >= 3",
        f"data.sources.b.shards={folder / 'b'}",
    ]


def run(*overrides: str) -> int:
    return execute(["pack", "log.wandb=null", *overrides])


def tars(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.tar"))


def contents(folder: Path) -> dict[str, tuple[bytes, int | None]]:
    """Bytes of everything in the folder, hidden files too, and the tars' times."""
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns if p.suffix == ".tar" else None) for p in folder.iterdir()}


def epoch(sources: dict, **options) -> dict[str, tuple[torch.Tensor, str]]:
    """Picture and caption of each key, from an epoch of the real loader in centre crops."""
    data = TarData(sources, workers=0, crop="center", **options)
    split = data.open(BUCKETS)
    total = int(split.totals().sum())
    weights = {name: len(selection) for name, selection in split.selections.items()}
    for name, weight in weights.items():  # as many turns as samples: one epoch of each
        data.sources[name] = type(data.sources[name])(**{**vars(data.sources[name]), "weight": float(weight)})
    plan = split.plan(1, 1, seed=0)
    loader = split.loader(plan, range(1))
    served = [loader.step(step)[0] for step in range(total)]
    return {batch.keys[0]: (batch.images[0], batch.captions[0]) for batch in served}


def in_tar(folder: Path) -> dict[str, dict[str, bytes]]:
    found: dict[str, dict[str, bytes]] = {}
    for path in tars(folder):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                assert extension not in found.setdefault(key, {})
                file = tar.extractfile(member)
                assert file is not None
                found[key][extension] = file.read()
    return found


def test_an_epoch_of_the_packed_form_is_an_epoch_of_the_selection(tmp_path):
    write_shard(tmp_path / "in" / "0.tar", [sample(i) for i in range(30)])
    write_shard(tmp_path / "in" / "1.tar", [sample(i) for i in range(30, 45)])
    source = {"shards": str(tmp_path / "in"), "where": "index % 4 > 0"}
    given = [f"data.sources.x.{key}={value}" for key, value in source.items()]
    assert run(f"out={tmp_path / 'out'}", "samples_per_shard=10", "data.holdout=0.2", *given) == 0
    expected = epoch({"x": source}, holdout=0.2)
    packed = epoch({"x": {"shards": str(tmp_path / "out")}})
    assert packed.keys() == expected.keys() and 15 < len(packed) < 33
    for key, (image, caption) in packed.items():
        assert torch.equal(image, expected[key][0]) and caption == expected[key][1]
    assert run(f"out={tmp_path / 'all'}", "split=all", "data.holdout=0.2", *given) == 0
    assert run(f"out={tmp_path / 'held'}", "split=validation", "data.holdout=0.2", *given) == 0
    assert in_tar(tmp_path / "all").keys() == in_tar(tmp_path / "held").keys() | packed.keys()
    assert not in_tar(tmp_path / "held").keys() & packed.keys()


def test_members_are_copied_byte_for_byte_and_shared_keys_made_unique(tmp_path):
    overrides = write_sources(tmp_path)
    assert run(f"out={tmp_path / 'out'}", "samples_per_shard=10", *overrides) == 0
    packed = in_tar(tmp_path / "out")
    table = pa.concat_tables([pq.read_table(p.with_suffix(".parquet")) for p in tars(tmp_path / "out")]).to_pylist()
    assert len(packed) == len(table) == 2 * 17 + 15
    for row in table:
        folder = tmp_path / row["source"]
        with tarfile.open(folder / row["source_shard"]) as tar:
            members = {
                m.name.partition(".")[2]: tar.extractfile(m).read()
                for m in tar
                if m.name.startswith(row["source_key"] + ".")
            }
        own = packed[row["key"]]
        assert own["jpg"] == members["jpg"] and own["txt"] == members["txt"]
        if row["source"] == "b":  # its keys are nobody else's
            assert row["key"] == row["source_key"] and own["json"] == members["json"]
        else:
            assert row["key"].startswith(row["source_key"] + "-")
            assert json.loads(own["json"]) == json.loads(members["json"]) | {"key": row["key"]}
    order = [row["source"] for row in table]
    assert order != sorted(order)
    assert run(f"out={tmp_path / 'plain'}", "shuffle=false", *overrides) == 0
    plain = pq.read_table(tmp_path / "plain" / "00000.parquet").to_pylist()
    places = [(row["source"], row["source_shard"], row["source_key"]) for row in plain]
    assert places == sorted(places)


def test_other_libraries_read_the_shards_whole(tmp_path):
    overrides = write_sources(tmp_path)
    out = tmp_path / "out"
    assert run(f"out={out}", "samples_per_shard=12", *overrides) == 0
    # webdataset, decoding
    dataset = webdataset.WebDataset(list(map(str, tars(out))), shardshuffle=False, empty_check=False).decode("pil")
    read = {s["__key__"]: s for s in dataset}
    assert read.keys() == in_tar(out).keys()
    assert all({"jpg", "txt", "json"} <= s.keys() and s["jpg"].size[0] >= 24 for s in read.values())
    # sizes.json as open_clip's get_dataset_size sums it up
    sizes = json.loads((out / "sizes.json").read_text())
    assert sum(int(sizes[os.path.basename(path)]) for path in tars(out)) == len(read) == 49  # noqa: PTH119
    # img2dataset's names beside each shard, and its columns
    for path in tars(out):
        table = pq.read_table(out / f"{path.stem}.parquet")
        stats = json.loads((out / f"{path.stem}_stats.json").read_text())
        assert {"url", "caption", "key", "status", "error_message", "width", "height"} <= set(table.column_names)
        assert stats["count"] == stats["successes"] == table.num_rows == sizes[path.name]
        assert stats["failed_to_download"] == stats["failed_to_resize"] == 0
        assert stats["status_dict"] == {"success": table.num_rows}
        for row in table.to_pylist():
            own = read[row["key"]]
            assert (row["width"], row["height"]) == own["jpg"].size and row["caption"] == own["txt"]
            assert row["url"] == own["json"]["url"] and row["status"] == "success"
    # and the manifests are index's own
    store = Store()
    before = contents(out)
    manifests = ensure_indexed([str(path) for path in tars(out)], store)
    assert contents(out) == before and [m.rows for m in manifests] == list(sizes.values())


def test_shards_are_balanced_by_number_and_by_bytes(tmp_path):
    samples = [sample(i, width=10 + (37 * i) % 200, height=20 + i % 40) for i in range(60)]
    write_shard(tmp_path / "in" / "0.tar", samples)
    given = f"data.sources.x.shards={tmp_path / 'in'}"
    assert run(f"out={tmp_path / 'count'}", "samples_per_shard=11", given) == 0
    sizes = json.loads((tmp_path / "count" / "sizes.json").read_text())
    assert len(sizes) == 6 and set(sizes.values()) == {10}

    def bytes_of(path: Path) -> list[int]:
        found: dict[str, int] = {}
        with tarfile.open(path) as tar:
            for m in tar:
                key = m.name.partition(".")[0]
                found[key] = found.get(key, 0) + 512 + (m.size + 511) // 512 * 512
        return list(found.values())

    total = sum(bytes_of(tmp_path / "in" / "0.tar"))
    assert run(f"out={tmp_path / 'bytes'}", f"bytes_per_shard={total // 7}", given) == 0
    shards = [bytes_of(path) for path in tars(tmp_path / "bytes")]
    assert sum(map(sum, shards)) == total and len(shards) == 8
    assert max(map(sum, shards)) - min(map(sum, shards)) <= max(map(max, shards))


def test_pictures_are_resized_and_encoded_anew(tmp_path):
    made = [sample(i) | {"jpg": photo(96 + 8 * i, 64 + 16 * i, i)} for i in range(8)]
    png = io.BytesIO()
    Image.open(io.BytesIO(photo(80, 50, 99))).save(png, "PNG")
    made.append({"__key__": "png", "png": png.getvalue(), "txt": "a png"})
    made.append({"__key__": "tiny", "jpg": picture(20, 18), "txt": "small enough"})
    write_shard(tmp_path / "in" / "0.tar", made)
    given = f"data.sources.x.shards={tmp_path / 'in'}"
    assert run(f"out={tmp_path / 'out'}", "short_side=32", "quality=98", given) == 0
    packed = in_tar(tmp_path / "out")
    assert packed["tiny"]["jpg"] == made[-1]["jpg"]
    for one in made[:8]:
        new = packed[one["__key__"]]
        before, after = Image.open(io.BytesIO(one["jpg"])), Image.open(io.BytesIO(new["jpg"]))
        assert after.format == "JPEG" and min(after.size) == 32
        assert abs(max(after.size) - max(before.size) * 32 / min(before.size)) <= 0.5
        fields = json.loads(new["json"])
        assert (fields["width"], fields["height"]) == after.size
        assert (fields["original_width"], fields["original_height"]) == before.size
        assert {k: fields[k] for k in one["json"]} == one["json"]
    assert Image.open(io.BytesIO(packed["png"]["png"])).size == (51, 32)
    for one in made[:8]:  # as Pillow would resize it, but for what encoding costs
        pillow = Image.open(io.BytesIO(one["jpg"]))
        after = Image.open(io.BytesIO(packed[one["__key__"]]["jpg"]))
        difference = np.asarray(pillow.resize(after.size, Image.Resampling.BICUBIC)).astype(float) - np.asarray(after)
        assert np.abs(difference).mean() < 2
    # another format: all but those that have it already
    assert run(f"out={tmp_path / 'webp'}", "format=webp", given) == 0
    for one in in_tar(tmp_path / "webp").values():
        assert Image.open(io.BytesIO(one["webp"])).format == "WEBP" and not one.keys() & {"jpg", "png"}
    # and the tensors that training gets are the same but for what encoding costs
    expected, found = epoch({"x": {"shards": str(tmp_path / "in")}}), epoch({"x": {"shards": str(tmp_path / "webp")}})
    assert expected.keys() == found.keys() == in_tar(tmp_path / "in").keys()
    errors = {key: (found[key][0].float() - expected[key][0].float()).abs().mean().item() for key in found}
    assert max(error for key, error in errors.items() if key != "tiny") < 3, errors  # noise does not survive encoding
    assert run(f"out={tmp_path / 'jpg'}", "format=jpg", given) == 0
    assert in_tar(tmp_path / "jpg")["000003"]["jpg"] == made[3]["jpg"]


def test_captions_and_scores_travel_in_txt_and_json(tmp_path):
    made = [sample(i) for i in range(6)]
    for one in made:
        one["json"] |= {"long": f"long {one['json']['index']}" if one["json"]["index"] else "", "AESTHETIC_SCORE": 1.0}
    del made[5]["json"]
    path = write_shard(tmp_path / "in" / "0.tar", made)
    store = Store()
    [manifest] = ensure_indexed([str(path)], store)
    scores = pa.table(
        {"taste": [0.5, float("nan"), 2.5, None, 4.5, 5.5], "vector": [[float(i), 1.0] for i in range(6)]}
    )
    write_scores(manifest, "taste", scores, store)
    given = [f"data.sources.x.shards={tmp_path / 'in'}", "columns=[taste,vector,aesthetic_score]"]
    assert run(f"out={tmp_path / 'one'}", "data.sources.x.caption=long", *given) == 0
    packed = in_tar(tmp_path / "one")
    assert [packed[f"{i:06d}"]["txt"].decode() for i in range(6)] == ["", "long 1", "long 2", "long 3", "long 4", ""]
    fields = [json.loads(packed[f"{i:06d}"]["json"]) for i in range(6)]
    assert [f["taste"] for f in fields] == [0.5, None, 2.5, None, 4.5, 5.5]
    assert [f["vector"] for f in fields] == [[float(i), 1.0] for i in range(6)]
    own = {name: value for name, value in made[2]["json"].items() if name != "AESTHETIC_SCORE"}
    assert fields[2] == own | {"taste": 2.5, "vector": [2.0, 1.0], "aesthetic_score": 1.0}
    assert [f.get("aesthetic_score") for f in fields] == [1.0] * 5 + [None]
    # in the packed shard they are columns: of the manifest, of the table, and so for a where clause
    assert (
        run(f"out={tmp_path / 'two'}", f"data.sources.y.shards={tmp_path / 'one'}", "data.sources.y.where=taste > 2")
        == 0
    )
    assert sorted(in_tar(tmp_path / "two")) == ["000002", "000004", "000005"]
    table = pq.read_table(tmp_path / "one" / "00000.parquet")
    assert table.schema.field("taste").type == pa.float64() and "vector" in table.column_names
    # a mix of captions is drawn from the packed form as from the selection
    mix = {"caption": 0.5, "long": 0.5}
    assert run(f"out={tmp_path / 'mix'}", "data.sources.x.caption={caption: 0.5, long: 0.5}", given[0]) == 0
    packed = in_tar(tmp_path / "mix")
    assert packed["000003"]["txt"] == b"caption 3" and json.loads(packed["000003"]["json"])["long"] == "long 3"
    drawn = epoch({"x": {"shards": str(tmp_path / "mix"), "caption": mix}})
    assert set(drawn) == set(packed) and any(c.startswith("long") for _, c in drawn.values())


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


OPEN_CLIP = """
import json, sys
from types import SimpleNamespace
from unittest.mock import MagicMock

# torchvision does not import beside torch's CPU build. open_clip's loader only calls the transform that it is given.
for name in ("", ".datasets", ".ops", ".ops.misc", ".transforms", ".transforms.functional"):
    sys.modules["torchvision" + name] = MagicMock()
from open_clip_train.data import get_dataset_size, get_wds_dataset

# The way that open_clip validates: its training wraps inner parts of a webdataset older than ours.
settings = SimpleNamespace(val_data=sys.argv[1], val_num_samples=None, batch_size=1, workers=1)
data = get_wds_dataset(settings, lambda picture: picture.size, is_train=False, tokenizer=lambda text: [text])
read = [[[int(side) for side in sizes[0]], texts[0]] for sizes, texts in data.dataloader]
print(json.dumps([get_dataset_size(sys.argv[1]), sorted(read)]))
"""

IMG2DATASET = """
import json, sys
from unittest.mock import MagicMock
import pyarrow

for name in ("albumentations", "exifread", "fire"):  # of its downloads and command line, not of its reader
    sys.modules[name] = MagicMock()
from img2dataset.reader import Reader

reader = Reader(sys.argv[1], "parquet", "url", "caption", None, None, ["key"], 1000, set(), sys.argv[2])
shards = [pyarrow.ipc.open_file(path).read_all() for _, path in reader]
print(json.dumps([row for shard in shards for row in shard.to_pylist()]))
"""


@pytest.mark.slow
def test_open_clip_and_img2dataset_read_what_was_packed(tmp_path):
    overrides = write_sources(tmp_path)
    out = tmp_path / "out"
    assert run(f"out={out}", "samples_per_shard=25", *overrides) == 0
    packed = in_tar(out)
    libraries = tmp_path / "libraries"
    versions = ["open_clip_torch==3.3.0", "ftfy==6.3.1", "img2dataset==1.47.0", "pandas==3.1.1", "python-dateutil"]
    install(libraries, *versions, "wcwidth", "six")

    (count, shards), read = ask(libraries, OPEN_CLIP, str(out / "{00000..00001}.tar"))
    pairs = [(Image.open(io.BytesIO(own["jpg"])).size, own["txt"].decode()) for own in packed.values()]
    assert (count, shards) == (len(packed), 2) == (49, 2)  # by sizes.json
    assert read == sorted([list(size), text] for size, text in pairs)

    rows = ask(libraries, IMG2DATASET, str(out / "00000.parquet"), str(tmp_path))
    with tarfile.open(out / "00000.tar") as tar:
        assert [row["key"] for row in rows] == [name[:-4] for name in tar.getnames() if name.endswith(".txt")]
    for row in rows:
        own = packed[row["key"]]
        assert (row["caption"], row["url"]) == (own["txt"].decode(), json.loads(own["json"])["url"])


@pytest.mark.parametrize(("member", "damaged"), [("txt", b"caf\xe9"), ("json", b'{"width": '), ("json", b"\xff{}")])
def test_texts_that_readers_would_stop_at_are_left_out(tmp_path, capsys, member, damaged):
    whole = {"jpg": picture(24, 16, seed=0), "txt": b"a caption", "json": b"{}"}
    samples = {"0": whole, "1": whole | {member: damaged}, "2": whole}
    parts = [(f"{key}.{name}", data) for key, members in samples.items() for name, data in members.items()]
    write_tar(tmp_path / "in" / "0.tar", parts)
    given = [f"data.sources.x.shards={tmp_path / 'in'}", "max_errors=0.5"]
    assert run(f"out={tmp_path / 'out'}", *given) == 0
    assert f"its .{member} cannot be read" in capsys.readouterr().out
    files = [str(path) for path in tars(tmp_path / "out")]
    read = webdataset.WebDataset(files, shardshuffle=False, empty_check=False).decode("pil")
    assert {found["__key__"] for found in read} == {"0", "2"}
    assert run(f"out={tmp_path / 'as_is'}", "verify=false", *given) == 0
    assert in_tar(tmp_path / "as_is")["1"][member] == damaged


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


def test_members_keep_their_order_and_long_keys_their_length(tmp_path):
    keys = ["two", "x/" * 60 + "long", "schön"]  # the first picture is the sample's; names beyond 100 bytes, not ASCII
    members = []
    for i, key in enumerate(keys):
        members += [(f"{key}.png", picture(20 + i, 30, "PNG", seed=i)), (f"{key}.jpg", picture(24, 24, seed=9 + i))]
    write_tar(tmp_path / "in" / "0.tar", members, tarfile.GNU_FORMAT)
    assert run(f"out={tmp_path / 'out'}", "shuffle=false", f"data.sources.x.shards={tmp_path / 'in'}") == 0
    with tarfile.open(tmp_path / "out" / "00000.tar") as tar:
        assert [(m.name, tar.extractfile(m).read()) for m in tar] == members  # type: ignore[union-attr]
    expected, found = epoch({"x": {"shards": str(tmp_path / "in")}}), epoch({"x": {"shards": str(tmp_path / "out")}})
    assert set(found) == set(keys) and all(torch.equal(found[key][0], expected[key][0]) for key in keys)


def test_tasks_and_arrays_of_tasks_give_the_same_bytes(tmp_path, monkeypatch):
    overrides = [*write_sources(tmp_path), "samples_per_shard=8", "short_side=12"]
    assert run(f"out={tmp_path / 'one'}", *overrides) == 0
    monkeypatch.setattr("data.pack.ROWS_HELD", 10)  # of one shard at a time
    for task in (2, 0, 1):
        assert not (tmp_path / "array" / "sizes.json").exists()
        assert run(f"out={tmp_path / 'array'}", "cluster.tasks=3", f"cluster.task={task}", *overrides) == 0
    assert contents(tmp_path / "array") == contents(tmp_path / "one")
    assert run(f"out={tmp_path / 'two'}", "cluster.tasks=2", *overrides) == 0
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    deleted = tars(tmp_path / "two")[1]
    deleted.unlink()
    assert run(f"out={tmp_path / 'two'}", *overrides) == 0
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.slow
def test_killed_at_random_moments_and_run_again_it_ends_with_the_same_bytes(tmp_path):
    made = [sample(i) | {"jpg": photo(700, 500, i)} for i in range(60)]
    write_shard(tmp_path / "in" / "0.tar", made)
    overrides = [f"data.sources.x.shards={tmp_path / 'in'}", "samples_per_shard=4", "short_side=300"]
    assert run(f"out={tmp_path / 'whole'}", *overrides) == 0
    expected = contents(tmp_path / "whole")
    out = tmp_path / "out"
    command = [sys.executable, "-P", "-m", "tools.cli", "pack", "log.wandb=null", f"out={out}", *overrides]
    rng = random.Random(0)
    kills = 0
    for tasks in (1, 2, 1):
        goal = len(list(out.glob("*"))) + rng.randint(1, 18) if out.exists() else rng.randint(1, 18)
        process = subprocess.Popen(
            [*command, f"cluster.tasks={tasks}"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        while process.poll() is None and (not out.exists() or len(list(out.iterdir())) < goal):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        for path in out.glob("[0-9]*") if out.exists() else ():
            assert path.read_bytes() == expected[path.name][0]  # whole, whatever the moment
    assert kills >= 2
    assert run(f"out={out}", *overrides) == 0
    assert contents(out) == expected


def test_a_bucket_is_packed_from_and_to(tmp_path):
    import boto3
    from moto.server import ThreadedMotoServer

    overrides = [*write_sources(tmp_path), "samples_per_shard=20"]
    assert run(f"out={tmp_path / 'local'}", *overrides) == 0
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    try:
        client = boto3.client(
            "s3", endpoint_url=endpoint, aws_access_key_id="x", aws_secret_access_key="x", region_name="us-east-1"
        )
        client.create_bucket(Bucket="bucket")
        for path in sorted(tmp_path.glob("[ab]/*.tar")):
            client.put_object(Bucket="bucket", Key=str(path.relative_to(tmp_path)), Body=path.read_bytes())
        remote = [o.replace(str(tmp_path), "s3://bucket") for o in overrides]
        options = f"data.storage_options={{s3: {{endpoint_url: '{endpoint}', key: x, secret: x}}}}"
        assert run("out=s3://bucket/out/", *remote, options) == 0
        names = {o["Key"]: o["ETag"] for o in client.list_objects_v2(Bucket="bucket", Prefix="out/")["Contents"]}
        for name, (content, _) in contents(tmp_path / "local").items():
            body = client.get_object(Bucket="bucket", Key=f"out/{name}")["Body"].read()
            assert body == content or name.endswith(".manifest.parquet")  # which names the state of its shard
        assert run("out=s3://bucket/out/", *remote, options) == 0
        assert {
            o["Key"]: o["ETag"] for o in client.list_objects_v2(Bucket="bucket", Prefix="out/")["Contents"]
        } == names
        store = Store({"s3": {"endpoint_url": endpoint, "key": "x", "secret": "x"}})
        url = "s3://bucket/out/00000.tar"
        manifest = read_manifest(url, manifest_url(url, store), store)
        assert manifest is not None and manifest.identity == str(store.identity(url))
    finally:
        server.stop()


def test_the_job_is_on_the_command_line():
    assert JOBS["pack"].module == "data.pack" and issubclass(ConfigError, ValueError)
