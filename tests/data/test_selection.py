"""Selections against DuckDB and numpy over all rows at once."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from shard_files import as_json, picture, write_tar

from data.index import ensure_indexed
from data.manifest_reader import ManifestReader
from data.scores import write_scores
from data.selection import Selection, select
from data.store import Store
from data.where import WhereError

SIZES = [1, 40, 3, 0, 77]  # of the shards; the empty one has no samples at all


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Store, manifests, and all rows of all shards in one table, with scores `motion` and `flow` of one filter."""
    folder = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    for s, size in enumerate(SIZES):
        members = []
        for i in range(size):
            members.append((f"{s}-{i}.png", picture(int(rng.integers(1, 40)), int(rng.integers(1, 40)), "PNG")))
            fields = {"similarity": float(rng.random()), "nsfw": "UNLIKELY" if i % 3 else "NSFW"}
            if s > 1:  # a field of some shards only, of two numeric types
                fields["views"] = i if s == 2 else i + 0.5
            members += [(f"{s}-{i}.json", as_json(fields)), (f"{s}-{i}.txt", b"a cat" if i % 2 else b"a dog")]
        if s == 1:
            members.append(("only-text.txt", b"no picture"))
        write_tar(folder / f"{s}.tar", members)
    store = Store()
    manifests = ensure_indexed(store.expand(str(folder)), store)
    parts = []
    for s, manifest in enumerate(manifests):
        motion = np.round(rng.normal(size=manifest.rows), 1)
        motion[::7] = np.nan
        scores = pa.table({"motion": motion, "flow": rng.random(manifest.rows).astype(np.float32)})
        write_scores(manifest, "motion", scores, store)
        part = pq.read_table(manifest.url).replace_schema_metadata(None)
        part = part.append_column("motion", pa.array([None if np.isnan(m) else m for m in motion], pa.float64()))
        part = part.append_column("flow", scores["flow"])
        part = part.append_column("shard", pa.array([s] * manifest.rows, pa.uint32()))
        parts.append(part.append_column("row", pa.array(range(manifest.rows), pa.uint32())))
    return store, manifests, pa.concat_tables(parts, promote_options="permissive")


def rows_of(selection: Selection) -> list[tuple[int, int]]:
    return selection.locate(np.arange(len(selection)))


def expected(table: pa.Table, where: str) -> list[tuple[int, int]]:
    query = f"SELECT shard, row FROM everything WHERE width IS NOT NULL AND ({where}) ORDER BY shard, row"
    with duckdb.connect() as database:
        return database.register("everything", table).execute(query).fetchall()


@pytest.mark.parametrize(
    ("where", "plain"),
    [
        (None, "true"),
        ("width >= 10 AND height * 2 < 50", None),
        ("caption = 'a cat' AND nsfw <> 'NSFW'", None),
        ("views > 3", None),
        ("Motion > 0 OR FLOW < 0.25", "motion > 0 OR flow < 0.25"),
        ("motion > quantile(0.25)", "motion > (SELECT quantile_disc(motion, 0.25) FROM everything)"),
        ("flow <= quantile(1)", "flow <= (SELECT max(flow) FROM everything)"),
        ("flow > quantile(0)", "flow > (SELECT min(flow) FROM everything)"),
        (
            "width * height BETWEEN quantile(0.1) AND quantile(0.9)",
            "width * height BETWEEN (SELECT quantile_disc(width * height, 0.1) FROM everything) AND "
            "(SELECT quantile_disc(width * height, 0.9) FROM everything)",
        ),
        ("list_contains(extensions, 'json')", None),
    ],
)
@pytest.mark.parametrize("held", [True, False])
def test_selections_are_what_duckdb_selects(world, tmp_path, monkeypatch, where, plain, held):
    monkeypatch.setattr("data.scan.CHUNK_ROWS", 30)
    monkeypatch.setattr("data.scan.VALUES_HELD", 1 << 20 if held else 0)
    store, manifests, table = world
    selection = select(manifests, store, where, cache_folder=str(tmp_path))
    rows = rows_of(selection)
    assert rows == expected(table, plain or where)
    everything = {(r["shard"], r["row"]): r for r in table.to_pylist()}
    assert selection.width.tolist() == [everything[r]["width"] for r in rows]
    assert selection.height.tolist() == [everything[r]["height"] for r in rows]
    assert selection.row.dtype == np.uint32
    assert selection.width.dtype == np.uint16
    counts = selection.counts
    assert counts.total == table.num_rows == counts.held_out + counts.filtered + counts.without_size + counts.selected


def test_quantiles_of_many_values_are_exact(world, tmp_path, monkeypatch):
    """Heavy tails, ties, infinities and negative numbers, at many probabilities."""
    from data.scan import _from_ordered_bits, _ordered_bits

    values = np.concatenate(
        [np.random.default_rng(0).standard_cauchy(999), np.zeros(50), [-0.0, np.inf, -np.inf, 5e-324]]
    )
    bits = _ordered_bits(values)
    assert [_from_ordered_bits(int(b)) for b in bits] == values.tolist()
    assert values[np.argsort(bits, kind="stable")].tolist() == np.sort(values).tolist()


def test_splits_are_by_the_hash_of_the_key_alone(world, tmp_path):
    store, manifests, table = world
    keys = {(r["shard"], r["row"]): r["key"] for r in table.to_pylist()}
    train = select(manifests, store, holdout=0.2, split="train", cache_folder=str(tmp_path))
    validation = select(manifests, store, holdout=0.2, split="validation", cache_folder=str(tmp_path))
    assert sorted(rows_of(train) + rows_of(validation)) == expected(table, "true")
    for selection, held_out in ((train, False), (validation, True)):
        for place in rows_of(selection):
            assert (xxhash.xxh64_intdigest(keys[place].encode()) < 0.2 * 2**64) == held_out
    assert train.fingerprint != validation.fingerprint
    fewer = select(manifests[1:], store, holdout=0.2, split="validation", cache_folder=str(tmp_path))
    assert rows_of(fewer) == [(s - 1, r) for s, r in rows_of(validation) if s > 0]


def test_a_selection_is_made_once_and_found_again(world, tmp_path, monkeypatch):
    store, manifests, _ = world
    first = select(manifests, store, "width > 5", cache_folder=str(tmp_path))
    monkeypatch.setattr("data.selection._materialise", None)  # would fail if it were made again
    again = select(manifests, store, "width > 5", cache_folder=str(tmp_path))
    assert (again.fingerprint, rows_of(again)) == (first.fingerprint, rows_of(first))
    thawed = pickle.loads(pickle.dumps(first))
    assert rows_of(thawed) == rows_of(first)
    assert len(pickle.dumps(first)) < 1000
    assert [p.name for p in (tmp_path / "selections").iterdir()] == [first.folder.name]


def test_the_fingerprint_is_of_the_rows(world, tmp_path):
    store, manifests, _ = world

    def fingerprint(where=None, which=manifests, **options) -> str:
        return select(which, store, where, cache_folder=str(tmp_path), **options).fingerprint

    assert fingerprint("width > 5") == fingerprint("5 < width")
    assert (
        len(
            {
                fingerprint(),
                fingerprint("width > 5"),
                fingerprint(which=manifests[:2]),
                fingerprint(which=manifests[::-1]),
            }
        )
        == 4
    )


def test_equally_many_other_rows_have_another_fingerprint(world, tmp_path):
    store, manifests, _ = world
    one, other = (select(manifests, store, f"key = '1-{i}'", cache_folder=str(tmp_path)).fingerprint for i in (0, 1))
    assert one != other


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("wdth > 3", "no column 'wdth'; did you mean 'width'"),
        ("width > ", "not one SQL condition"),
        ("width + caption > 3", "caption|VARCHAR"),
        ("nofunction(width)", "nofunction"),
        ("sum(width) > 3", "aggregate"),
        ("caption", "'a .*'|a dog|a cat|BOOL"),
        ("read_text('/etc/passwd') IS NOT NULL AND width > 0", "read_text"),
    ],
)
def test_wrong_clauses_are_one_clear_sentence(world, tmp_path, where, words):
    store, manifests, _ = world
    with pytest.raises(ValueError, match=words) as raised:
        select(manifests, store, where, cache_folder=str(tmp_path))
    assert "\n" not in str(raised.value)
    assert not any(p.name.startswith(".") for p in (tmp_path / "selections").glob("*"))


def test_nothing_selected_says_why(world, tmp_path):
    store, manifests, table = world
    with pytest.raises(
        ValueError, match=rf"empty: of {table.num_rows} rows in 5 shards .* are not kept by where='width > 999'"
    ):
        select(manifests, store, "width > 999", cache_folder=str(tmp_path))
    with pytest.raises(ValueError, match=r"empty: .* outside the validation split \(holdout=0.0\)"):
        select(manifests, store, split="validation", cache_folder=str(tmp_path))
    with pytest.raises(ValueError, match="no shards"):
        select([], store)
    with pytest.raises(ValueError, match="holdout"):
        select(manifests, store, holdout=1.0)


def test_scores_of_some_shards_only_are_an_error(world, tmp_path):
    store, manifests, _ = world
    write_scores(manifests[0], "blur", pa.table({"blur": [0.5] * manifests[0].rows}), store)
    with pytest.raises(ValueError, match=r"1\.tar has no scores of the filter 'blur'"):
        select(manifests, store, "blur < 1", cache_folder=str(tmp_path))
    Path(manifests[0].url.replace("manifest", "blur")).unlink()


def test_new_scores_make_a_new_selection(tmp_path):
    path = write_tar(tmp_path / "a.tar", [(f"{i}.png", picture(3, 3, "PNG")) for i in range(9)])
    store = Store()
    manifests = ensure_indexed([str(path)], store)
    found = []
    for scores in (np.arange(9.0), np.arange(9.0)[::-1]):
        write_scores(manifests[0], "motion", pa.table({"motion": scores}), store)
        found.append([r for _, r in rows_of(select(manifests, store, "motion >= 6", cache_folder=str(tmp_path)))])
    assert found == [[6, 7, 8], [0, 1, 2]]


def test_fields_of_clashing_types_are_a_clear_error(tmp_path):
    for i, value in enumerate(("text", 3)):
        write_tar(tmp_path / f"{i}.tar", [("a.png", picture(3, 3, "PNG")), ("a.json", as_json({"odd": value}))])
    store = Store()
    with pytest.raises(ValueError, match="different types"):
        select(ensure_indexed(store.expand(str(tmp_path)), store), store, "odd > 1", cache_folder=str(tmp_path))


def test_sides_beyond_sixteen_bits(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.png", picture(70_000, 1, "PNG")), ("b.png", picture(2, 3, "PNG"))])
    store = Store()
    selection = select(ensure_indexed([str(path)], store), store, cache_folder=str(tmp_path))
    assert (selection.width.tolist(), selection.height.tolist()) == ([70_000, 2], [1, 3])


def test_positions_lead_to_members_through_a_reader(world, tmp_path):
    store, manifests, _ = world
    selection = select(manifests, store, "caption = 'a cat'", cache_folder=str(tmp_path))
    reader = ManifestReader(store, selection.manifests, selection.digests)
    for shard, row in selection.locate([5, 0, len(selection) - 1]):
        values = reader.rows(shard, [row], ["key", "caption", "motion"])
        assert values["caption"] == ["a cat"]
        assert values["key"][0].startswith(f"{shard}-")
    with pytest.raises(IndexError):
        selection.locate([len(selection)])


RACE = """
import sys
from data.index import ensure_indexed
from data.selection import select
from data.store import Store
store = Store()
manifests = ensure_indexed(store.expand(sys.argv[1]), store)
print(select(manifests, store, "width > 2", cache_folder=sys.argv[1]).fingerprint)
"""


def test_processes_that_index_and_select_at_once_agree(tmp_path):
    for s in range(6):
        write_tar(tmp_path / f"{s}.tar", [(f"{s}-{i}.png", picture(3, 3, "PNG")) for i in range(50)])
    command = [sys.executable, "-c", RACE, str(tmp_path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ)) for _ in range(3)]
    told = {process.communicate(timeout=120)[0] for process in running}
    assert [p.returncode for p in running] == [0, 0, 0]
    assert len(told) == 1
    assert list(tmp_path.rglob(".*")) == []


def test_where_errors_are_value_errors():
    assert issubclass(WhereError, ValueError)
