"""Duplicates: hashes of pictures that were cropped, resized and compressed, against brute force and ground truth."""

from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.fft
from drawn import cropped, encoded, icon, media, natural
from shard_files import write_tar

from data.curate import curate
from data.curation.duplicates import Duplicates
from data.curation.groups import connect, gather, rank_groups
from data.curation.hamming import BITS, HammingIndex, choose_chunks
from data.curation.hashes import ContentHash, PerceptualHash
from data.index import ensure_indexed
from data.scores import score_url
from data.selection import select
from data.store import Store
from data.tasks import Tasks


def test_the_hash_is_the_sign_of_the_lowest_cosine_coefficients():
    pixels = natural(3, 32, 32)
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY).astype(np.float64)
    low = scipy.fft.dctn(grey, norm="ortho")[:8, :8].ravel()
    (scored,) = PerceptualHash(crops=[]).score([media(pixels)])
    bits = np.unpackbits(np.array([scored["phash"]], np.uint64).view(np.uint8))
    assert bits.tolist() == (low > np.median(low[1:])).tolist()
    assert scored["phash_windows"] == []


def test_a_picture_without_structure_has_no_hash():
    blank = np.full((50, 50, 3), 200, np.uint8)
    assert PerceptualHash().score([media(blank)]) == [{}]


def flipped(hashes: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    """Hashes with up to so many of their bits flipped."""
    order = np.argsort(rng.random((len(hashes), BITS)), axis=1)
    chosen = np.arange(BITS) < rng.integers(most + 1, size=(len(hashes), 1))
    return hashes ^ np.bitwise_or.reduce(chosen * (np.uint64(1) << order.astype(np.uint64)), axis=1)


@pytest.mark.parametrize("distance", [0, 1, 5, 8, 11])
@pytest.mark.parametrize("count", [0, 1, 300, 20_000])
def test_near_hashes_are_found_as_by_comparing_all(tmp_path, monkeypatch, distance, count):
    monkeypatch.setattr("data.curation.hamming.CANDIDATES", 5000)
    rng = np.random.default_rng(distance)
    hashes = rng.integers(0, 1 << 64, count, dtype=np.uint64)
    hashes[count // 2 :] &= np.uint64(0xFFFF0F0F0000FFFF)  # as pictures' hashes, which are not spread evenly
    queries = np.concatenate([flipped(hashes[:200], 14, rng), rng.integers(0, 1 << 64, 50, dtype=np.uint64)])
    expected = np.argwhere(np.bitwise_count(queries[:, None] ^ hashes[None]) <= distance)
    index = HammingIndex(hashes, distance)
    index.save(tmp_path)
    for one in (index, HammingIndex.load(tmp_path)):
        found = {pair for a, b in one.search(queries) for pair in zip(a.tolist(), b.tolist(), strict=True)}
        assert found == set(map(tuple, expected.tolist()))
    assert len(expected) > 0 or count < 2


def test_a_search_compares_few_and_the_fewer_the_more_there_are():
    for count, share in ((10**5, 1 / 300), (10**7, 1 / 2_500)):
        chunks = choose_chunks(count, 8)
        assert sum(chunk.probes / 2**chunk.width for chunk in chunks) < share
        assert sum(chunk.radius + 1 for chunk in chunks) == 9  # the pigeonhole principle


def test_groups_are_connected_and_ranked():
    first = np.arange(7)
    connect(first, np.array([5, 2, 3]), np.array([2, 6, 1]))
    assert first.tolist() == [0, 1, 2, 1, 4, 2, 2]
    groups = rank_groups(first, [np.array([0, np.nan, 1, 0, 0, 2, 1]), np.array([0, 0, 1, 0, 0, 0, 2])])
    assert groups.rank.tolist() == [0, 1, 2, 0, 0, 0, 1]
    assert groups.alone.tolist() == [True, False, False, False, True, False, False]


def test_groups_gather_around_the_best_and_do_not_grow_by_chains():
    """0 - 1 - 2 - 3 - 4 are alike each to the next; 5 equals 2."""
    first = np.array([0, 1, 2, 3, 4, 2])
    a, b = np.array([0, 2, 3, 3]), np.array([1, 1, 2, 4])
    gathered = gather(first, [np.array([0, 1, 3, 2, 0, 4])], a, b)
    assert gathered.tolist() == [0, 1, 1, 1, 4, 1]
    nothing = np.array([], np.int64)
    assert gather(first, [np.zeros(6)], nothing, nothing).tolist() == first.tolist()


def write_variants(folder: Path, originals: int) -> dict[str, int]:
    """Two shards of pictures, each with five copies that differ; one half looks like photographs, the other is icons.
    Returns which original each key shows."""
    rng = np.random.default_rng(0)
    members: list[list[tuple[str, bytes]]] = [[], []]
    shows = {}
    for original in range(originals):
        size = rng.integers(200, 400, 2).tolist()
        pixels = icon(original) if original % 2 else natural(original, *size)
        small = cv2.resize(pixels, None, fx=0.4, fy=0.4, interpolation=cv2.INTER_AREA)
        mixed = cv2.resize(cropped(pixels, 0.06, rng), None, fx=0.7, fy=0.7, interpolation=cv2.INTER_AREA)
        files = {
            "png": encoded(pixels),
            "copy": encoded(pixels),
            "jpeg": encoded(pixels, 25),
            "small": encoded(small, 60),
            "crop": encoded(cropped(pixels, 0.07, rng), 80),
            "mixed": encoded(mixed, 40),
        }
        for place, (name, data) in enumerate(files.items()):
            key = f"{original:03d}-{name}"
            shows[key] = original
            form = "png" if name in ("png", "copy") else "jpg"
            members[(original + place) % 2].append((f"{key}.{form}", data))
    for shard, of_shard in enumerate(members):
        write_tar(folder / f"{shard}.tar", of_shard)
    return shows


@pytest.mark.slow
def test_near_duplicates_are_found_and_the_best_is_kept(tmp_path):
    shows = write_variants(tmp_path, 300)
    store = Store()
    manifests = ensure_indexed(store.expand(str(tmp_path)), store)
    curate(manifests, [ContentHash(), PerceptualHash(), Duplicates()], store)
    keys = [key for m in manifests for key in pq.read_table(m.url)["key"].to_pylist()]
    found = pa.concat_tables([pq.read_table(score_url(m.url, "duplicates")) for m in manifests]).to_pydict()
    groups = np.array([-1 - i if g is None else g for i, g in enumerate(found["duplicate_group"])])
    truth = np.array([shows[key] for key in keys])
    pairs = np.triu_indices(len(keys), 1)
    same = truth[pairs[0]] == truth[pairs[1]]
    joined = groups[pairs[0]] == groups[pairs[1]]
    for kind in range(2):
        ours = truth[pairs[0]] % 2 == kind
        right = (ours & same & joined).sum()
        recall, precision = right / (ours & same).sum(), right / (ours & joined).sum()
        print(f"{('photographs', 'icons')[kind]}: recall {recall:.4f}, precision {precision:.4f}")
        assert recall >= 0.95 and precision >= 0.98, (kind, recall, precision)

    selection = select(manifests, store, "duplicate_rank = 0", cache_folder=str(tmp_path / "cache"))
    at = [sum(m.rows for m in manifests[:s]) + row for s, row in selection.locate(np.arange(len(selection)))]
    assert len({truth[i] for i in at}) == 300
    sizes = pa.concat_tables([pq.read_table(m.url, columns=["width", "height"]) for m in manifests]).to_pydict()
    pixels = np.array(sizes["width"]) * np.array(sizes["height"])
    assert all(pixels[i] == pixels[groups == groups[i]].max() for i in at)


def test_what_has_the_same_outlines_in_other_colours_is_no_duplicate(tmp_path):
    members = []
    for name, color in (("red", (210, 40, 40)), ("green", (40, 140, 40)), ("dark red", (200, 50, 40))):
        pixels = np.full((90, 90, 3), 255, np.uint8)
        cv2.circle(pixels, (40, 50), 25, color, cv2.FILLED)
        members.append((f"{name}.png", encoded(pixels)))
    write_tar(tmp_path / "0.tar", members)
    store = Store()
    manifests = ensure_indexed(store.expand(str(tmp_path)), store)

    def groups(**options) -> list[int | None]:
        curate(manifests, [ContentHash(), PerceptualHash(), Duplicates(**options)], store)
        return pq.read_table(score_url(manifests[0].url, "duplicates"))["duplicate_group"].to_pylist()

    hashes = PerceptualHash().score([media(cv2.imdecode(np.frombuffer(d, np.uint8), 1)[..., ::-1]) for _, d in members])
    assert len({row["phash"] for row in hashes}) == 1
    assert groups() == [0, None, 0]
    assert groups(colors=None) == [0, 0, 0]
    assert groups(colors=1) == [None] * 3


@pytest.mark.slow
def test_the_result_does_not_depend_on_the_number_of_tasks(tmp_path):
    write_variants(tmp_path, 20)
    store = Store()
    manifests = ensure_indexed(store.expand(str(tmp_path)), store)
    found = []
    for tasks in (1, 2, 3):
        curate(manifests, [ContentHash(), PerceptualHash(), Duplicates()], store, tasks=Tasks(tasks))
        found.append([Path(score_url(m.url, "duplicates")).read_bytes() for m in manifests])
        for m in manifests:
            Path(score_url(m.url, "duplicates")).unlink()
    assert found[0] == found[1] == found[2]


def test_only_equal_files_are_duplicates_where_no_distance_is_given(tmp_path):
    shows = write_variants(tmp_path, 5)
    store = Store()
    manifests = ensure_indexed(store.expand(str(tmp_path)), store)
    curate(manifests, [ContentHash(), Duplicates(distance=None, best="key_hash")], store)
    rows = [
        (key, group)
        for m in manifests
        for key, group in zip(
            pq.read_table(m.url)["key"].to_pylist(),
            pq.read_table(score_url(m.url, "duplicates"))["duplicate_group"].to_pylist(),
            strict=True,
        )
    ]
    for original in range(5):
        of_one = {key: group for key, group in rows if shows[key] == original}
        assert of_one[f"{original:03d}-png"] == of_one[f"{original:03d}-copy"] is not None
        assert [key for key, group in of_one.items() if group is None] == [
            key for key in of_one if not key.endswith(("-png", "-copy"))
        ]


def test_a_filter_without_its_inputs_says_which_column_is_missing(tmp_path):
    write_variants(tmp_path, 1)
    store = Store()
    manifests = ensure_indexed(store.expand(str(tmp_path)), store)
    with pytest.raises(ValueError, match=r"'duplicates' needs the column 'content_hash'"):
        curate(manifests, [Duplicates()], store)


def test_duplicates_are_found_anew_when_a_shard_changes_and_only_then(tmp_path):
    write_variants(tmp_path, 3)
    store = Store()
    filters = [ContentHash(), PerceptualHash(), Duplicates()]
    manifests = ensure_indexed(store.expand(str(tmp_path)), store)
    curate(manifests, filters, store)
    urls = [Path(score_url(m.url, "duplicates")) for m in manifests]
    before = [url.stat().st_mtime_ns for url in urls]
    curate(manifests, filters, store)
    assert [url.stat().st_mtime_ns for url in urls] == before
    write_tar(tmp_path / "1.tar", [("new.png", encoded(natural(9)))])
    manifests = ensure_indexed(store.expand(str(tmp_path)), store)
    curate(manifests, filters, store)
    assert all(url.stat().st_mtime_ns > old for url, old in zip(urls, before, strict=True))
