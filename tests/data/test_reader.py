"""From tars to batches: what is delivered, what goes to quarantine, and what stops a run."""

import io
import os
import pickle
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.buckets import BucketList, Square
from data.reader import BadSliceError
from data.store import Store, StoreError
from data.tars import Source, TarData, TarSplit
from tests.data.shard_files import members_of, picture, serve, write_shard, write_tar


def png(index: int, size: int = 16) -> bytes:
    """A picture that tells its index: all of its pixels are (index, 7, 9)."""
    file = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), (index, 7, 9), np.uint8)).save(file, "PNG")
    return file.getvalue()


def plain(index: int) -> dict:
    return {"__key__": f"{index:03d}", "png": png(index), "txt": f"number {index}"}


def open_data(folder: Path, *, size: int = 16, **options) -> TarSplit:
    shards = options.pop("shards", str(folder))
    source = options.pop("source", {})
    options = {"workers": 0, "cache_folder": str(folder / "cache")} | options
    return TarData({"numbers": {"shards": shards, **source}}, **options).open(Square(size))


def step_of(split, lanes=2, slice_size=4, step=0, **options):
    return split.loader(split.plan(lanes, slice_size, seed=3), range(lanes), **options).step(step)


def overwrite(tar: Path, name: str, change) -> None:
    """Change a member's payload in place; size and headers stay, and so does the manifest's idea of the tar."""
    (offset, size) = next((o, s) for n, o, s in members_of(tar) if n == name)
    content = bytearray(tar.read_bytes())
    content[offset : offset + size] = change(bytes(content[offset : offset + size]))
    with tar.open("r+b") as file:
        file.write(content)


def test_pictures_captions_and_keys_of_a_sample_stay_together(tmp_path):
    write_shard(tmp_path / "0.tar", [plain(i) for i in range(10)])
    write_shard(tmp_path / "1.tar", [plain(i) for i in range(10, 20)])
    split = open_data(tmp_path)
    seen = []
    for batch in step_of(split, lanes=5):
        for key, caption, image in zip(batch.keys, batch.captions, batch.images, strict=True):
            assert caption == f"number {int(key)}"
            assert image[0].unique().tolist() == [int(key)] and image[1].unique().tolist() == [7]
            seen.append(key)
    assert sorted(seen) == [f"{i:03d}" for i in range(20)]


def test_original_sizes_and_crops_are_those_of_the_sample(tmp_path):
    sizes = {f"{i}": (20 + 3 * i, 61 - 4 * i) for i in range(8)}
    write_shard(
        tmp_path / "0.tar", [{"__key__": k, "png": picture(w, h, "PNG"), "txt": k} for k, (h, w) in sizes.items()]
    )
    batch = step_of(open_data(tmp_path), lanes=1, slice_size=8)[0]
    for key, original, (top, left) in zip(batch.keys, batch.original_size.tolist(), batch.crop.tolist(), strict=True):
        height, width = sizes[key]
        assert tuple(original) == (height, width)
        scale = 16 / min(height, width)
        assert 0 <= top <= round(height * scale) - 16 and 0 <= left <= round(width * scale) - 16
    assert batch.crop.max() > 0


def test_a_crop_equals_cropping_by_hand(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 40, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    write_shard(tmp_path / "0.tar", [{"__key__": f"{i}", "png": file.getvalue()} for i in range(12)])
    batch = step_of(open_data(tmp_path, flip=True), lanes=1, slice_size=12)[0]
    flips = batch.fields["flip"]
    assert 0 < int(flips.sum()) < 12
    for image, (top, left), flip in zip(batch.images, batch.crop.tolist(), flips, strict=True):
        whole = pixels[:, ::-1] if flip else pixels
        assert top == 0
        assert np.array_equal(image.permute(1, 2, 0).numpy(), whole[:, left : left + 16])


def test_images_have_their_buckets_shape(tmp_path):
    write_shard(
        tmp_path / "0.tar",
        [{"__key__": f"{i}", "jpg": picture(*((60, 30) if i % 2 else (30, 60)))} for i in range(16)],
    )
    data = TarData({"s": Source(str(tmp_path))}, workers=0, cache_folder=str(tmp_path / "cache"))
    split = data.open(BucketList([[32, 16], [16, 32]]))
    batches = step_of(split, lanes=4)
    assert Counter(batch.target_size for batch in batches) == {(32, 16): 2, (16, 32): 2}
    for batch in batches:
        wide = batch.original_size[:, 1] > batch.original_size[:, 0]
        assert wide.all() if batch.target_size == (16, 32) else not wide.any()


def test_the_background_shows_through_transparent_pictures(tmp_path):
    file = io.BytesIO()
    Image.new("RGBA", (16, 16), (9, 9, 9, 0)).save(file, "PNG")
    write_shard(tmp_path / "0.tar", [{"__key__": f"{i}", "png": file.getvalue()} for i in range(4)])
    batch = step_of(open_data(tmp_path, source={"background": [1, 2, 3]}), lanes=1)[0]
    assert batch.images.unique(dim=0).tolist() == torch.tensor([1, 2, 3]).view(1, 3, 1, 1).expand(1, 3, 16, 16).tolist()


def test_captions_come_from_weighted_columns_and_fall_back_where_one_is_empty(tmp_path):
    samples = []
    for i in range(200):
        told = {"synthetic": f"s{i}"} if i % 2 else {}
        samples.append({"__key__": f"{i:03d}", "png": png(i % 200), "txt": f"o{i}", "json": told})
    write_shard(tmp_path / "0.tar", samples)
    split = open_data(tmp_path, source={"caption": {"caption": 1.0, "Synthetic": 3.0}})
    batch = step_of(split, lanes=1, slice_size=200)[0]
    kinds: Counter[tuple[bool, str]] = Counter()
    for key, caption in zip(batch.keys, batch.captions, strict=True):
        assert int(caption[1:]) == int(key)
        kinds[int(key) % 2 == 1, caption[0]] += 1
    assert kinds[False, "o"] == 100
    assert 60 <= kinds[True, "s"] <= 90  # of 100, with probability 3/4


def test_a_sample_without_a_caption_has_an_empty_one(tmp_path):
    write_shard(tmp_path / "0.tar", [{"__key__": f"{i}", "png": png(i)} for i in range(4)])
    assert step_of(open_data(tmp_path), lanes=1)[0].captions == [""] * 4


def test_a_caption_column_that_is_nowhere_is_an_error(tmp_path):
    write_shard(tmp_path / "0.tar", [plain(i) for i in range(4)])
    with pytest.raises(ValueError, match=r"^source 'numbers': there is no caption column 'blip'"):
        open_data(tmp_path, source={"caption": "blip"})


BAD = {
    "undecodable": (lambda data: data[:40] + bytes(len(data) - 40), "cannot decode image"),
    "no image": (lambda data: b"x" * len(data), "cannot identify image"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_content_is_replaced_by_another_member_of_the_slice(tmp_path, name):
    change, reason = BAD[name]
    tar = write_shard(tmp_path / "0.tar", [plain(i) for i in range(20)])
    split = open_data(tmp_path)
    good = [step_of(split, lanes=5, step=s) for s in range(3)]
    overwrite(tar, "007.png", change)
    overwrite(tar, "012.png", change)
    loader = split.loader(split.plan(5, 4, seed=3), range(5))
    for step in range(3):
        for lane, (batch, before) in enumerate(zip(loader.step(step), good[step], strict=True)):
            for slot, key in enumerate(before.keys):
                if key in ("007", "012"):
                    assert batch.keys[slot] in set(before.keys) - {"007", "012"}
                else:
                    assert batch.keys[slot] == key
                    assert torch.equal(batch.images[slot], before.images[slot])
                assert batch.images[slot, 0].unique().tolist() == [int(batch.keys[slot])]
                assert batch.captions[slot] == f"number {int(batch.keys[slot])}"
            assert batch.draws == before.draws, lane
    lines = loader.drain().quarantine
    assert Counter(line.key for line in lines) == {"007": 3, "012": 3}
    assert loader.quarantined == 6
    for line in lines:
        assert good[line.step][line.lane].keys[line.slot] == line.key
        assert line.shard == str(tar) and line.source == "numbers" and reason in line.reason
    assert loader.drain().quarantine == []


def test_a_bomb_goes_to_quarantine(tmp_path):
    write_shard(tmp_path / "0.tar", [plain(i) for i in range(3)] + [plain(3) | {"png": png(3, size=64)}])
    loader = (split := open_data(tmp_path, max_pixels=1000)).loader(split.plan(1, 4, seed=0), range(1))
    assert "003" not in loader.step(0)[0].keys
    (line,) = loader.drain().quarantine
    assert line.key == "003" and "64 x 64 pixels exceeds max_pixels=1000" in line.reason


def test_flipped_bytes_are_caught_by_checksums(tmp_path):
    # A flipped pixel of an uncompressed picture: nothing but a checksum can tell.
    def bmp(i: int) -> dict:
        file = io.BytesIO()
        Image.new("RGB", (16, 16), (i, 0, 0)).save(file, "BMP")
        return {"__key__": f"{i:03d}", "bmp": file.getvalue()}

    tar = write_shard(tmp_path / "0.tar", [bmp(i) for i in range(8)])
    for checksum in (None, "xxh128", "sha256"):
        split = open_data(tmp_path, checksum=checksum)
        original = tar.read_bytes()
        stat = tar.stat()
        overwrite(tar, "005.bmp", lambda data: data[:-1] + bytes([data[-1] ^ 1]))
        loader = split.loader(split.plan(1, 8, seed=0), range(1))
        loader.step(0)
        reasons = [(line.key, line.reason) for line in loader.drain().quarantine]
        if checksum is None:
            assert reasons == []
        else:
            assert reasons == [("005", "its .bmp has another checksum than when it was indexed")]
        tar.write_bytes(original)
        os.utime(tar, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_tar_that_changed_under_the_run_gives_no_wrong_pictures(tmp_path):
    samples = [plain(i) for i in range(8)]
    write_shard(tmp_path / "0.tar", samples)
    split = open_data(tmp_path)
    # Samples 4 and 5 change places: every read still gives a whole picture, but of another sample.
    samples[4], samples[5] = samples[5], samples[4]
    write_shard(tmp_path / "0.tar", samples)
    loader = split.loader(split.plan(1, 8, seed=0), range(1))
    (batch,) = loader.step(0)
    assert {"004", "005"}.isdisjoint(batch.keys)
    assert {line.key for line in loader.drain().quarantine} == {"004", "005"}
    for key, image in zip(batch.keys, batch.images, strict=True):
        assert image[0].unique().tolist() == [int(key)]


def test_long_and_foreign_names_are_read(tmp_path):
    names = ["x" * 150, "é" * 10, "ordinary", "folder/" + "y" * 95]
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        folder = tmp_path / str(form)
        write_tar(folder / "0.tar", [(f"{name}.png", png(i)) for i, name in enumerate(names)], form)
        (batch,) = step_of(open_data(folder), lanes=1)
        assert sorted(batch.keys) == sorted(names)
        for key, image in zip(batch.keys, batch.images, strict=True):
            assert image[0].unique().tolist() == [names.index(key)]


def test_a_sample_without_a_picture_is_not_selected(tmp_path):
    samples = [plain(i) for i in range(5)]
    del samples[2]["png"]
    write_shard(tmp_path / "0.tar", samples)
    (batch,) = step_of(open_data(tmp_path), lanes=1)
    assert sorted(batch.keys) == ["000", "001", "003", "004"]


def test_a_slice_with_no_good_member_is_an_error(tmp_path):
    tar = write_shard(tmp_path / "0.tar", [plain(i) for i in range(4)])
    split = open_data(tmp_path)
    for i in range(4):
        overwrite(tar, f"00{i}.png", lambda data: bytes(len(data)))
    with pytest.raises(
        BadSliceError, match=r"none of the 4 samples of slice \(step 0, lane 0\) of source 'numbers'"
    ) as e:
        step_of(split, lanes=1)
    again = pickle.loads(pickle.dumps(e.value))
    assert str(again) == str(e.value)
    assert sorted(line.key for line in again.quarantine) == ["000", "001", "002", "003"]
    assert {line.replaced_by for line in again.quarantine} == {None}


def test_a_truncated_tar_stops_the_run(tmp_path):
    tar = write_shard(tmp_path / "0.tar", [plain(i) for i in range(4)])
    split = open_data(tmp_path)
    with tar.open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(StoreError, match=r"0\.tar: .*shorter than its manifest says"):
        step_of(split, lanes=1)


def test_a_store_that_fails_for_a_while_changes_nothing_and_one_that_fails_for_good_stops_the_run(tmp_path):
    write_shard(tmp_path / "tars" / "0.tar", [plain(i) for i in range(16)])
    local = open_data(tmp_path / "tars")
    expected = step_of(local)
    with serve(tmp_path / "tars") as server:
        data = TarData(
            {"numbers": Source(f"{server.url}/0.tar")},
            workers=0,
            manifest_folder=str(tmp_path / "manifests"),
            cache_folder=str(tmp_path / "cache"),
        )
        data.store = Store(attempts=3, timeout=5)
        split = data.open(Square(16))
        server.failures = 2
        batches = step_of(split)
        assert server.failures == 0
        for batch, same in zip(batches, expected, strict=True):
            assert batch.keys == same.keys and torch.equal(batch.images, same.images)
        server.failures = 1000
        with pytest.raises(StoreError, match=r"0\.tar: .* after 3 attempts"):
            step_of(split)


def test_what_a_source_does_not_take_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"data\.sources\.a\.shard is no key"):
        TarData({"a": {"shard": "x"}})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"data\.sources\.a\.shards is missing"):
        TarData({"a": {}})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"data\.sources\.a: background"):
        TarData({"a": {"shards": "x", "background": [1]}})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"data\.sources is empty: name a source"):
        TarData({})
