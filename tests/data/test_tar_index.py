"""The tar walk against Python's tarfile and the webdataset library, and against every kind of damage."""

import io
import random
import tarfile

import pytest
import webdataset
from shard_files import BLOCK, members_of, picture, sample, write_shard, write_tar

from data.ranged_file import RangedFile
from data.store import Store
from data.tar_index import TarDamageError, read_samples, split_name, walk


def in_memory(content: bytes, block: int = 4096) -> RangedFile:
    return RangedFile(lambda offset, size: content[offset : offset + size], len(content), block)


def samples_of(content: bytes):
    return read_samples(in_memory(content), lambda key, extension, member: None)


def layout(samples) -> dict[str, dict[str, tuple[int, int]]]:
    return {s.key: {e: (m.offset, m.size) for e, m in s.members.items()} for s in samples}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_walk_finds_what_tarfile_finds(tmp_path, form):
    long = "folder/" * 12 + "x" * (60 if form == tarfile.USTAR_FORMAT else 200)
    names = ["a.jpg", "b/c.d.txt", f"{long}.jpg", "plain", "é.txt" if form != tarfile.USTAR_FORMAT else "e.txt"]
    rng = random.Random(0)
    path = write_tar(
        tmp_path / "a.tar", [(n, rng.randbytes(rng.choice([0, 1, 511, 512, 513, 9000]))) for n in names], form
    )
    for block in (1, 512, 700, 1 << 20):
        found = [(m.name, m.offset, m.size) for m in walk(in_memory(path.read_bytes(), block))]
        assert found == members_of(path)


def test_global_pax_headers_and_folders_and_links_are_followed(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "of all"}) as tar:
        folder = tarfile.TarInfo("d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link = tarfile.TarInfo("d/l.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "m" * 150
        tar.addfile(link)
        real = tarfile.TarInfo("d/a.jpg")
        real.size = 3
        tar.addfile(real, io.BytesIO(b"abc"))
    assert [(m.name, m.offset, m.size) for m in walk(in_memory(path.read_bytes()))] == members_of(path)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_beyond_eight_gigabytes(form):
    """Sizes that octal digits cannot hold, in a tar that exists only as its headers."""
    size = 9 << 30
    header = tarfile.TarInfo("big.bin")
    header.size = size
    first = header.tobuf(form)
    header.name, header.size = "next.bin", 5
    last = header.tobuf(form) + b"hello".ljust(BLOCK, b"\0") + bytes(2 * BLOCK)
    total = len(first) + size + len(last)

    def fetch(offset: int, count: int) -> bytes:
        piece = bytearray(count)
        for at, content in ((0, first), (len(first) + size, last)):
            begin, end = max(offset, at), min(offset + count, at + len(content))
            if begin < end:
                piece[begin - offset : end - offset] = content[begin - at : end - at]
        return bytes(piece)

    found = list(walk(RangedFile(fetch, total, 4096)))
    assert [(m.name, m.size) for m in found] == [("big.bin", size), ("next.bin", 5)]
    assert found[1].offset == len(first) + size + len(last) - 3 * BLOCK


def test_samples_are_those_of_webdataset(tmp_path):
    names = [
        "a.jpg",
        "a.txt",
        "d/a.JPG",
        "d/a.cls.txt",
        "d.e/f.png",
        "./g.png",
        "nodot",
        "__meta__",
        "x/__h__/i.jpg",
        ".hid.jpg",
    ]
    path = write_tar(tmp_path / "a.tar", [(n, n.encode()) for n in names], tarfile.PAX_FORMAT)
    expected = {}
    for one in webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False):
        expected[one["__key__"]] = {e: v for e, v in one.items() if not e.startswith("__")}
    content = path.read_bytes()
    found, problems = samples_of(content)
    assert problems == []
    assert {s.key: {e: content[m.offset :][: m.size] for e, m in s.members.items()} for s in found} == expected


def test_hidden_files_are_no_samples():
    assert split_name("a/._b.jpg") is None
    assert split_name("a/b.jpg") == ("a/b", "jpg")


@pytest.fixture(scope="module")
def shard(tmp_path_factory) -> tuple[bytes, dict]:
    path = write_shard(tmp_path_factory.mktemp("whole") / "a.tar", [sample(i) for i in range(8)])
    content = path.read_bytes()
    found, problems = samples_of(content)
    assert len(found) == 8
    assert problems == []
    return content, layout(found)


def test_a_tar_cut_anywhere_never_gives_a_partial_sample(shard):
    content, whole = shard
    data_end = max(offset + size for members in whole.values() for offset, size in members.values())
    end = (data_end + BLOCK - 1) // BLOCK * BLOCK  # where the end marker begins
    edges = {
        o + d for m in whole.values() for o, s in m.values() for d in (-513, -512, -511, -1, 0, 1, s - 1, s, s + 1)
    }
    cuts = sorted({c for c in edges if 0 <= c <= end + BLOCK} | set(range(0, end + 2 * BLOCK, 97)))
    assert len(cuts) > 250
    for cut in cuts:
        found, problems = samples_of(content[:cut])
        for key, members in layout(found).items():
            assert members == whole[key], f"cut at {cut}"
            assert all(offset + size <= cut for offset, size in members.values())
        if cut < end + BLOCK:  # the end marker's first block is not whole
            assert [p.kind for p in problems] == [
                "missing end" if cut == end or is_boundary(cut, whole) else "truncated"
            ]
            assert len(found) < 8
        # no more than the sample that is cut, and the one before a cut at a border, is lost
        before = [k for k, m in whole.items() if max(o + s for o, s in m.values()) <= cut]
        assert len(found) >= len(before) - 1


def is_boundary(cut: int, whole: dict) -> bool:
    return cut > 0 and any(offset - BLOCK == cut for members in whole.values() for offset, _ in members.values())


def test_cuts_within_long_names_and_pax_headers(tmp_path):
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        members = [(f"{'k' * 120}{i}.{e}", bytes([i]) * 700) for i in range(3) for e in ("jpg", "txt")]
        content = write_tar(tmp_path / f"{form}.tar", members, form).read_bytes()
        whole = layout(samples_of(content)[0])
        assert len(whole) == 3
        for cut in range(0, len(content) - 10240, 64):
            for key, found in layout(samples_of(content[:cut])[0]).items():
                assert found == whole[key]


def test_every_flipped_byte_of_a_header_is_noticed(shard):
    """Any one byte that the checksum covers. (Its own trailing NUL and blank, and the terminators, carry nothing.)"""
    content, whole = shard
    third = list(whole)[2]
    header = whole[third]["jpg"][0] - BLOCK
    kept = {k: whole[k] for k in list(whole)[:1]}
    for position in range(BLOCK):
        if position in (154, 155):
            continue
        damaged = bytearray(content)
        damaged[header + position] ^= 0x55
        found, problems = samples_of(bytes(damaged))
        assert [p.kind for p in problems] == ["bad header"], position
        assert problems[0].offset == header
        assert layout(found).items() >= kept.items()
        assert layout(found).items() <= whole.items()


def test_flipped_bytes_of_a_payload_are_not_in_the_headers(shard):
    """What the format cannot tell: the reason why there are checksums."""
    content, whole = shard
    offset, size = whole["000003"]["jpg"]
    damaged = bytearray(content)
    damaged[offset + size // 2] ^= 0xFF
    found, problems = samples_of(bytes(damaged))
    assert layout(found) == whole
    assert problems == []


def test_a_hole_of_zeros_over_a_header_is_damage_and_not_the_end(shard):
    content, whole = shard
    header = whole["000003"]["jpg"][0] - BLOCK
    damaged = content[:header] + bytes(BLOCK) + content[header + BLOCK :]
    found, problems = samples_of(damaged)
    assert [p.kind for p in problems] == ["bad header"]
    assert list(layout(found)) == ["000000", "000001"]


def test_interleaved_members_are_reported_and_their_samples_not_used():
    content = tar_of([("a.jpg", b"1"), ("b.jpg", b"2"), ("a.txt", b"3"), ("b.txt", b"4"), ("c.jpg", b"5")])
    found, problems = samples_of(content)
    assert [s.key for s in found] == ["c"]
    assert sorted((p.kind, p.key) for p in problems) == [("interleaved", "a"), ("interleaved", "b")]


def test_of_duplicate_keys_the_first_is_used():
    pair = [("a.jpg", b"1"), ("a.txt", b"2")]
    for between in ([("b.jpg", b"5")], []):
        found, problems = samples_of(tar_of([*pair, *between, *pair, ("c.jpg", b"6")]))
        assert [s.key for s in found] == ["a", *[n[0] for n, _ in between], "c"]
        assert found[0].members["jpg"].offset == BLOCK
        assert [(p.kind, p.key) for p in problems] == [("duplicate key", "a")]


def test_what_is_no_tar_is_said_to_be_none(tmp_path):
    for content, words in (
        (b"", "0 bytes"),
        (picture(9, 9), "not a tar"),
        (b"short", "ends after 5 bytes"),
        (random.Random(0).randbytes(4096), "not a tar"),
    ):
        with pytest.raises(TarDamageError, match=words):
            list(walk(in_memory(content)))
    path = tmp_path / "a.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a"))
    with pytest.raises(TarDamageError, match="gzip"):
        list(walk(in_memory(path.read_bytes().ljust(1024, b"\0"))))


def test_names_that_are_not_utf8_are_reported():
    content = bytearray(tar_of([("aa.jpg", b"1"), ("b.jpg", b"2")]))
    info = tarfile.TarInfo("a\udcff.jpg")
    info.size = 1
    content[:BLOCK] = info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape")
    found, problems = samples_of(bytes(content))
    assert [s.key for s in found] == ["b"]
    assert [p.kind for p in problems] == ["bad name"]


def test_a_local_shard_is_read_by_its_headers(tmp_path):
    """Of pictures of a megabyte, next to nothing is read."""
    path = write_tar(tmp_path / "a.tar", [(f"{i}.bin", bytes(1 << 20)) for i in range(20)])
    store, read = Store(), []
    file = store.open(str(path))
    fetch = file._fetch
    file._fetch = lambda offset, size: read.append(size) or fetch(offset, size)
    assert len(read_samples(file, lambda key, extension, member: None)[0]) == 20
    assert sum(read) < 0.03 * path.stat().st_size


def tar_of(members: list[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, payload in members:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return file.getvalue()
