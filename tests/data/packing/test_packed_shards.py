"""Packed tars against the selection they are of, through the loader and byte for byte."""

import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from conf.errors import ConfigError
from tests.data.packing.packed import epoch, in_tar, run, tars, write_sources
from tests.data.shard_files import picture, sample, write_shard, write_tar
from tools.cli import JOBS


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


def test_the_job_is_on_the_command_line():
    assert JOBS["pack"].module == "data.pack" and issubclass(ConfigError, ValueError)
