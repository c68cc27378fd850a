"""Manifests of tars that webdataset and tarfile wrote, read back and held against the tars themselves."""

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from PIL import Image
from shard_files import as_json, members_of, picture, sample, serve, write_shard, write_tar

from data.describe import describe
from data.index import index_shard
from data.manifest import PROBLEMS_KEPT, checksum_of, manifest_url, read_manifest
from data.manifest_reader import ManifestReader
from data.scores import open_scores, score_url, write_scores
from data.store import Store, StoreError


def index(path: Path, store: Store | None = None, **options):
    store = store or Store()
    return index_shard(str(path), manifest_url(str(path), store), store, **options)


def rows_of(path: Path) -> list[dict]:
    table, _, _ = describe(str(path), Store())
    return table.to_pylist()


def test_rows_are_the_samples(tmp_path):
    samples = [sample(i) for i in range(40)]
    path = write_shard(tmp_path / "a.tar", samples)
    manifest = index(path, checksum="sha256")
    assert manifest.url == f"{tmp_path}/a.manifest.parquet"
    assert (manifest.rows, manifest.problems) == (40, ())
    content = path.read_bytes()
    rows = pq.read_table(manifest.url).to_pylist()
    for row, one in zip(rows, samples, strict=True):
        assert row["key"] == one["__key__"]
        assert row["key_hash"] == xxhash.xxh64_intdigest(row["key"].encode())
        members = dict(
            zip(row["extensions"], zip(row["offsets"], row["sizes"], row["checksums"], strict=True), strict=True)
        )
        assert members.keys() == one.keys() - {"__key__"}
        for offset, size, checksum in members.values():
            assert hashlib.sha256(content[offset : offset + size]).digest() == checksum
        offset, size, _ = members["jpg"]
        assert content[offset : offset + size] == one["jpg"]
        assert (row["width"], row["height"]) == Image.open(path_to_picture(tmp_path, one["jpg"])).size
        assert row["caption"] == one["txt"]
        assert (row["url"], row["similarity"], row["index"]) == tuple(one["json"].values())
    found = [
        (f"{r['key']}.{e}", o, s)
        for r in rows
        for e, o, s in zip(r["extensions"], r["offsets"], r["sizes"], strict=True)
    ]
    assert found == members_of(path)


def path_to_picture(folder: Path, content: bytes) -> Path:
    path = folder / "picture.jpg"
    path.write_bytes(content)
    return path


def test_fields_of_laion_and_img2dataset_have_one_name(tmp_path):
    laion = {"URL": "u", "TEXT": "t", "WIDTH": 900, "HEIGHT": 800, "similarity": "0.3", "punsafe": 0.1,
             "pwatermark": None, "AESTHETIC_SCORE": 5, "hash": -7, "NSFW": "UNLIKELY"}  # fmt: skip
    img2dataset = {"url": "u", "caption": "t", "original_width": 900, "original_height": 800, "similarity": 0.3,
                   "punsafe": 0.1, "aesthetic": 5.0, "hash": -7, "nsfw": "UNLIKELY", "width": 1, "height": 1,
                   "key": "0", "exif": "{}", "sizes": 3}  # fmt: skip
    path = write_tar(
        tmp_path / "a.tar",
        [
            ("a.jpg", picture(8, 6)),
            ("a.json", as_json(laion)),
            ("b.jpg", picture(8, 6)),
            ("b.json", as_json(img2dataset)),
        ],
    )
    first, second = rows_of(path)
    for row in (first, second):
        assert (row["width"], row["height"]) == (8, 6)  # measured, not told
        names = ("url", "caption", "original_width", "original_height", "similarity", "aesthetic_score", "hash", "nsfw")
        assert tuple(row[n] for n in names) == ("u", "t", 900, 800, 0.3, 5.0, -7, "UNLIKELY")
    assert second["json_sizes"] == 3
    assert not {"exif", "text", "json_key", "pwatermark"} & first.keys()


def test_field_types_hold_all_their_values(tmp_path):
    values = [{"a": 1, "b": True, "c": 1, "d": "x", "e": [1], "f": 1 << 70}, {"a": 2.5, "c": 2, "d": 3}, {"a": None}]
    path = write_tar(tmp_path / "a.tar", [(f"{i}.json", as_json(v)) for i, v in enumerate(values)])
    table, _, _ = describe(str(path), Store())
    types = {n: str(table.schema.field(n).type) for n in "abcdef"}
    assert types == {"a": "double", "b": "bool", "c": "int64", "d": "string", "e": "string", "f": "double"}
    assert table["d"].to_pylist() == ["x", "3", None]
    assert table["a"].to_pylist() == [1.0, 2.5, None]


def test_the_caption_file_goes_before_the_json(tmp_path):
    path = write_tar(
        tmp_path / "a.tar", [("a.txt", b" of the file\n"), ("a.json", as_json({"caption": "of the json"}))]
    )
    assert rows_of(path)[0]["caption"] == "of the file"


def test_precomputed_samples_take_their_size_from_the_json(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.npy", b"xxxx"), ("a.json", as_json({"width": 640, "height": 480}))])
    assert (rows_of(path)[0]["width"], rows_of(path)[0]["height"]) == (640, 480)


def test_what_is_wrong_is_told_and_whole_samples_stay(tmp_path):
    members = [
        ("a.jpg", picture(8, 6)), ("a.txt", b"a"), ("b.jpg", b"no picture"), ("b.txt", b"b"), ("c.txt", b"c"),
        ("d.webp", picture(9, 5, "WEBP")), ("d.txt", b"d"),
        ("e.jpg", picture(3, 3)), ("e.txt", b"e"), ("e.json", b"{oh"),
        ("f.jpg", picture(3, 3)), ("f.txt", b"\xff"), ("f.json", b"[1]"),
    ]  # fmt: skip
    path = write_tar(tmp_path / "a.tar", members)
    manifest = index(path)
    assert {(p.kind, p.key) for p in manifest.problems} == {
        ("unreadable media", "b"),
        ("missing member", "c"),
        ("bad json", "e"),
        ("bad json", "f"),
    }
    rows = rows_of(path)
    assert [r["width"] for r in rows] == [8, None, None, 9, 3, 3]
    assert rows[-1]["caption"] == "�"


def test_problems_beyond_the_limit_are_counted(tmp_path):
    path = write_tar(tmp_path / "a.tar", [(f"{i}.jpg", b"none") for i in range(PROBLEMS_KEPT + 7)])
    manifest = index(path)
    assert len(manifest.problems) == PROBLEMS_KEPT
    assert dict(manifest.problem_counts) == {"unreadable media": PROBLEMS_KEPT + 7}
    assert read_manifest(str(path), manifest.url, Store()) == manifest


def test_a_changed_shard_is_indexed_again_and_no_other(tmp_path):
    path = write_shard(tmp_path / "a.tar", [sample(i) for i in range(3)])
    first = index(path)
    written = Path(first.url).stat().st_mtime_ns
    assert index(path) == first
    assert Path(first.url).stat().st_mtime_ns == written
    write_shard(path, [sample(i) for i in range(4)])
    second = index(path)
    assert (first.rows, second.rows) == (3, 4)
    assert first.identity != second.identity
    assert index(path, checksum="xxh128").checksum == "xxh128"
    assert index(path).checksum == "xxh128"
    assert index(path).digest == second.digest


def test_a_manifest_that_is_no_parquet_is_made_anew(tmp_path):
    path = write_shard(tmp_path / "a.tar", [sample(i) for i in range(3)])
    (tmp_path / "a.manifest.parquet").write_bytes(b"half a manif")
    assert index(path).rows == 3
    pq.write_table(pa.table({"x": [1]}), tmp_path / "a.manifest.parquet")
    assert index(path).rows == 3


def test_the_digest_tells_the_samples_apart(tmp_path):
    digests = set()
    for i, change in enumerate(
        [{}, {"txt": "another"}, {"jpg": picture(99, 9)}, {"__key__": "k"}, {"json": {"url": "v"}}]
    ):
        digests.add(index(write_shard(tmp_path / f"{i}.tar", [sample(0) | change, sample(1)])).digest)
    assert len(digests) == 5
    again = index(write_shard(tmp_path / "elsewhere" / "b.tar", [sample(0), sample(1)]))
    assert again.digest in digests


@pytest.mark.parametrize("algorithm", ["xxh128", "sha256"])
def test_checksums_tell_a_flipped_byte_of_a_payload(tmp_path, algorithm):
    path = write_shard(tmp_path / "a.tar", [sample(i) for i in range(3)])
    table, _, _ = describe(str(path), Store(), algorithm)
    row = table.to_pylist()[1]
    member = row["extensions"].index("jpg")
    payload = bytearray(path.read_bytes()[row["offsets"][member] :][: row["sizes"][member]])
    assert checksum_of(bytes(payload), algorithm) == row["checksums"][member]
    payload[50] ^= 1
    assert checksum_of(bytes(payload), algorithm) != row["checksums"][member]
    with pytest.raises(ValueError, match="checksum must be one of"):
        describe(str(path), Store(), "md5")


def test_manifests_in_a_folder_of_their_own_do_not_collide(tmp_path):
    for folder in ("one/x", "two/x"):
        write_shard(tmp_path / folder / "a.tar", [sample(0, folder[0])])
    store = Store()
    urls = {manifest_url(f"{tmp_path}/{f}/x/a.tar", store, f"{tmp_path}/m") for f in ("one", "two")}
    assert len(urls) == 2
    assert all(url.startswith(f"{tmp_path}/m/x-") and url.endswith("/a.manifest.parquet") for url in urls)
    with serve(tmp_path) as server:
        shard = f"{server.url}/one/x/a.tar"
        with pytest.raises(ValueError, match="manifest_folder"):
            manifest_url(shard, store)
        manifest = index_shard(shard, manifest_url(shard, store, f"{tmp_path}/m"), store)
        assert manifest.rows == 1


def test_a_remote_shard_is_read_in_few_large_ranges_past_large_members(tmp_path):
    small = [(f"{i:03d}.{e}", c) for i in range(50) for e, c in (("jpg", picture(20, 20)), ("txt", b"t"))]
    large = [("w.bin", bytes(30 << 20)), ("x.jpg", picture(5, 5))]
    path = write_tar(tmp_path / "a.tar", small + large)
    store = Store()
    with serve(tmp_path) as server:
        shard = f"{server.url}/a.tar"
        table, _, problems = describe(shard, store)
        ranges = [r for _, r in server.requests if r]
    assert (table.num_rows, [p.kind for p in problems]) == (52, ["missing member"] * 2)
    assert len(ranges) == 2
    local, _, _ = describe(str(path), store)
    assert table == local


def test_scores_are_joined_and_refused_when_the_shard_changed(tmp_path):
    path = write_shard(tmp_path / "a.tar", [sample(i) for i in range(5)])
    store, manifest = Store(), index(path)
    with pytest.raises(ValueError, match=r"no scores.*'motion'"):
        open_scores(manifest, "motion", store)
    for scores, name in (({"m": [1.0]}, "motion"), ({"key": list("abcde")}, "motion"), ({"m": [1] * 5}, "manifest")):
        with pytest.raises(ValueError, match=r"scores for the|names of the manifest|name of a filter"):
            write_scores(manifest, name, pa.table(scores), store)
    write_scores(manifest, "motion", pa.table({"m": np.arange(5.0)}), store)
    assert Path(score_url(manifest.url, "motion")).name == "a.motion.parquet"
    assert open_scores(manifest, "motion", store).read()["m"].to_pylist() == [0, 1, 2, 3, 4]
    reader = ManifestReader(store, [manifest.url])
    assert reader.rows(0, [3, 1], ["m", "key", "none"]) == {
        "m": [3, 1],
        "key": ["000003", "000001"],
        "none": [None] * 2,
    }
    write_shard(path, [sample(i + 1) for i in range(5)])
    with pytest.raises(ValueError, match=r"a\.motion\.parquet.*changed since.*'motion' again"):
        open_scores(index(path), "motion", store)


def test_a_reader_gives_rows_in_any_order_within_its_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("data.parquet.ROW_GROUP", 16)
    monkeypatch.setattr("data.manifest_reader.ROW_GROUP", 16)
    monkeypatch.setattr("data.manifest_reader.OPEN_MANIFESTS", 2)
    store, urls, tables = Store(), [], []
    for s in range(4):
        manifest = index(write_tar(tmp_path / f"{s}.tar", [(f"{s}-{i}.txt", b"t%d" % i) for i in range(50)]))
        urls.append(manifest.url)
        tables.append(pq.read_table(manifest.url))
        assert pq.ParquetFile(manifest.url).num_row_groups == 4
    reader = pickle.loads(pickle.dumps(ManifestReader(store, urls, memory=4000)))
    rng = np.random.default_rng(0)
    for _ in range(60):
        shard = int(rng.integers(4))
        rows = rng.integers(0, 50, rng.integers(0, 9))
        columns = ["key", "offsets", "caption"][: rng.integers(1, 4)]
        assert reader.rows(shard, rows, columns) == tables[shard].select(columns).take(rows).to_pydict()
        assert reader._held <= 4000 or len(reader._groups) == 1
        assert len(reader._files) <= 2
    with pytest.raises(IndexError, match="50 rows"):
        reader.rows(0, [50], ["key"])


def test_a_reader_notices_a_manifest_that_was_written_anew(tmp_path):
    path = write_shard(tmp_path / "a.tar", [sample(i) for i in range(5)])
    before = index(path)
    write_shard(path, [sample(i + 1) for i in range(5)])
    after = index(path)
    assert ManifestReader(Store(), [after.url], [after.digest]).rows(0, [0], ["key"]) == {"key": ["000001"]}
    with pytest.raises(ValueError, match="written anew"):
        ManifestReader(Store(), [after.url], [before.digest]).rows(0, [0], ["key"])


def test_a_shard_that_changes_while_it_is_read_is_an_error(tmp_path, monkeypatch):
    path = write_shard(tmp_path / "a.tar", [sample(i) for i in range(3)])

    class Changing(Store):
        def open(self, url, block=None):
            file = super().open(url, block)
            with path.open("ab") as appended:
                appended.write(b"more")
            return file

    with pytest.raises(StoreError, match="changed while"):
        describe(str(path), Changing())


def test_metadata_are_plain_json(tmp_path):
    manifest = index(write_shard(tmp_path / "a.tar", [sample(0)]))
    told = json.loads(pq.read_schema(manifest.url).metadata[b"millrace"])
    assert told["shard"] == "a.tar"
    assert told["identity"] == manifest.identity
    assert pq.read_metadata(manifest.url).row_group(0).column(0).compression == "ZSTD"
