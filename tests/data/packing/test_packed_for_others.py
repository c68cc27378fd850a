"""Packed tars in the hands of webdataset, open_clip and img2dataset."""

import io
import json
import os
import tarfile

import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from data.index import ensure_indexed
from data.store import Store
from tests.data.packing.packed import contents, in_tar, run, tars, write_sources
from tests.data.shard_files import picture, write_tar
from tests.foreign import ask, install

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
