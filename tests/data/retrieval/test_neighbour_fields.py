"""Neighbours of samples in a run's batches: their embeddings, pictures and captions."""

import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from shard_files import picture, write_tar
from vectors import save_database, write_neighbours

from conf.errors import ConfigError
from data.buckets import Bucket, Buckets
from data.index import ensure_indexed
from data.inspect import contact_sheet
from data.members import ContentError
from data.retrieval.database import Database
from data.retrieval.embedding import Embedding
from data.retrieval.field import NeighbourCaptions, NeighbourPictures, Neighbours
from data.retrieval.originals import Originals
from data.store import Store
from data.tars import Source, TarData
from tests.data.curation.tiny_models import save_clip
from tools.cli import execute

ROWS = 18


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


def noise(n: int) -> bytes:
    return picture(20, 16, form="PNG", seed=n % 16)


def blue(n: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 16), (0, 0, 10 * n + 5)).save(file, "PNG")
    return file.getvalue()


def middle(data: bytes) -> np.ndarray:
    """Pillow's (3, 16, 16)."""
    return np.asarray(Image.open(io.BytesIO(data)))[:, 2:18].transpose(2, 0, 1)


def write_shards(folder: Path, drawn: Callable[[int], bytes]) -> Path:
    """Three shards of six samples."""
    for shard in range(3):
        members = []
        for n in range(6 * shard, 6 * shard + 6):
            members += [(f"{n:04d}.png", drawn(n)), (f"{n:04d}.txt", f"caption {n}".encode())]
        write_tar(folder / f"{shard:05d}.tar", members)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model) -> Path:
    """Samples of noise, two of them copies of others, with neighbours among blue pictures, `away`, drawn at random, and
    among themselves, `own`."""
    folder = tmp_path_factory.mktemp("drawn")
    write_shards(folder / "shards", noise)
    write_shards(folder / "blue", blue)
    line = ["retrieve", f"embedding.model={model}", "log.wandb=null", f"runs={folder}/runs"]
    assert execute([*line, f"database={folder}/away", f"shards={folder}/blue"]) == 0
    write_neighbours(folder / "shards", Database(folder / "away"), 8)
    own = [f"shards={folder}/shards", f"neighbours_of={folder}/shards", "column=own", "k=8"]
    assert execute([*line, f"database={folder}/own", *own]) == 0
    return folder


def batches(folder: Path, workers: int = 0, start: int = 0, steps: int = 4, **fields):
    drawn = {"drawn": Source(f"{folder}/shards")}
    data = TarData(drawn, workers=workers, cache_folder=f"{folder}/cache", fields=fields)
    split = data.open(Buckets([Bucket(16, 16)]))
    loader = split.loader(split.plan(2, 3, seed=0), range(2))
    try:
        return [batch for step in range(start, start + steps) for batch in loader.step(step)]
    finally:
        loader.close()


def stored(folder: Path, name: str) -> dict[str, list[int]]:
    """The ids beside each key."""
    found = {}
    for shard in range(3):
        ids = pq.read_table(folder / "shards" / f"{shard:05d}.{name}.parquet")[name].to_pylist()
        found |= {f"{6 * shard + i:04d}": one for i, one in enumerate(ids)}
    return found


def test_pictures_and_captions_are_those_of_the_stored_rows(folder):
    database = f"{folder}/away"
    fields = {"pictures": NeighbourPictures(database, k=3), "captions": NeighbourCaptions(database, k=3)}
    found = batches(folder, **fields, vectors=Neighbours(database, k=3))
    true, opened, seen = stored(folder, "neighbours"), Database(database), 0
    for batch in found:
        assert batch.fields["pictures"].shape == (3, 3, 3, 16, 16)
        for i, key in enumerate(batch.keys):
            ids = true[key][:3]
            assert np.array_equal(batch.fields["pictures"][i].numpy(), np.stack([middle(blue(n)) for n in ids]))
            assert batch.fields["captions"][i] == [f"caption {n}" for n in ids]
            assert np.array_equal(batch.fields["vectors"][i].numpy(), opened.vectors(np.array(ids)))
            seen += 1
    assert seen == 24 and len({n for ids in true.values() for n in ids}) > 8


def test_they_are_the_same_by_workers_and_after_a_resumption(folder):
    fields = {"pictures": NeighbourPictures(f"{folder}/away"), "captions": NeighbourCaptions(f"{folder}/away")}
    whole = batches(folder, **fields)
    for others, part in ((batches(folder, 2, **fields), whole), (batches(folder, 0, 2, 2, **fields), whole[4:])):
        assert [b.keys for b in others] == [b.keys for b in part]
        for one, other in zip(part, others, strict=True):
            assert torch.equal(one.fields["pictures"], other.fields["pictures"])
            assert one.fields["captions"] == other.fields["captions"]


def test_the_sample_itself_and_its_copies_are_left_out_of_all_three(folder):
    """Samples 16 and 17 are copies of 0 and 1."""
    database, twins = f"{folder}/own", {"0000": 16, "0001": 17, "0016": 0, "0017": 1}
    every = {"column": "own", "k": 4}
    for most, seen in ((None, True), (0.9999, False)):
        fields = {"pictures": NeighbourPictures(database, most_similar=most, **every)}
        fields |= {"captions": NeighbourCaptions(database, most_similar=most, **every)}
        found = batches(folder, **fields, vectors=Neighbours(database, most_similar=most, **every))
        for batch in found:
            for i, key in enumerate(batch.keys):
                captions, pictures = batch.fields["captions"][i], batch.fields["pictures"][i]
                ids = [int(one.split()[1]) for one in captions if one]
                assert ({int(key), twins.get(key, -1)} <= {*ids, -1}) == seen and len(ids) > 2
                expected = np.stack([middle(noise(n)) for n in ids])
                assert np.array_equal(pictures[: len(ids)].numpy(), expected) and not pictures[len(ids) :].any()
                vectors = batch.fields["vectors"][i].numpy()
                assert np.array_equal(vectors[: len(ids)], Database(database).vectors(np.array(ids)))
                assert not vectors[len(ids) :].any()


def test_a_patch_is_read_as_it_was_embedded_and_fewer_neighbours_leave_zeros(tmp_path, model):
    write_tar(tmp_path / "shards" / "0.tar", [(f"{n}.png", picture(40, 30, form="PNG", seed=n)) for n in range(3)])
    patches = "embedding.patches={_target_: data.retrieval.embedding.Patches, per_picture: 2, size: 24}"
    line = ["retrieve", f"database={tmp_path}/db", f"shards={tmp_path}/shards", f"embedding.model={model}", patches]
    assert execute([*line, "log.wandb=null"]) == 0
    database = Database(tmp_path / "db")
    field = NeighbourPictures(str(tmp_path / "db"), k=4)
    given = field.given("[3, 0]", (24, 24))
    for place, row in enumerate((3, 0)):
        (told,) = database.metadata([row])
        image = np.asarray(Image.open(io.BytesIO(picture(40, 30, form="PNG", seed=row // 2))))
        left, top, right, bottom = told["patch"]
        assert np.array_equal(given[place].permute(1, 2, 0).numpy(), image[top:bottom, left:right])
    assert given.shape == (4, 3, 24, 24) and not given[2:].any()
    assert torch.equal(field.blank((8, 12)), torch.zeros(4, 3, 8, 12, dtype=torch.uint8))
    assert replace(field, size=10).given("[5]", (24, 24)).shape == (4, 3, 10, 10)
    captions = NeighbourCaptions(str(tmp_path / "db"), k=2)
    assert captions.given("[5]", (8, 8)) == ["", ""] == captions.blank((8, 8))


def test_the_samples_own_patches_are_left_out_wherever_their_shard_lies(tmp_path, model, capsys):
    """By brute force over all patches but the sample's own, which are no copies of the whole picture."""
    for shard in range(3):
        members = [(f"{n}.png", picture(40, 30, form="PNG", seed=n)) for n in range(4 * shard, 4 * shard + 4)]
        write_tar(tmp_path / "shards" / f"{shard}.tar", members)
    patches = "embedding.patches={_target_: data.retrieval.embedding.Patches, per_picture: 3, size: 29}"
    line = ["retrieve", f"database={tmp_path}/db", f"embedding.model={model}", "log.wandb=null"]
    assert execute([*line, f"shards={tmp_path}/shards", patches]) == 0
    asked = shutil.copytree(tmp_path / "shards", tmp_path / "elsewhere")
    assert execute([*line, f"neighbours_of={asked}", "k=8"]) == 0
    assert execute([*line, f"neighbours_of={asked}", "k=8", "column=others", "without_itself=true"]) == 0

    database = Database(tmp_path / "db")
    told = [(one["shard"], one["row"]) for one in database.metadata(range(36), ["shard", "row"])]
    vectors, seen = database.vectors(np.arange(36)), 0
    for shard in range(3):
        images = [np.asarray(Image.open(io.BytesIO(picture(40, 30, form="PNG", seed=4 * shard + n)))) for n in range(4)]
        similar = Embedding(str(model)).embedder().images(images) @ vectors.T
        table, every = (pq.read_table(asked / f"{shard}.{name}.parquet") for name in ("others", "neighbours"))
        for row in range(4):
            own = np.array([of == (f"{tmp_path}/shards/{shard}.tar", row) for of in told])
            seen += np.isin(every["neighbours"][row].as_py(), np.flatnonzero(own)).sum()
            ids, similarities = (table[name][row].as_py() for name in ("others", "others_similarity"))
            assert len({*ids} - {*np.flatnonzero(own)}) == 8 and own.sum() == 3
            assert np.allclose(similarities, np.sort(similar[row, ~own])[:-9:-1], atol=2e-3)
            assert np.allclose(similarities, similar[row, ids], atol=2e-3)
    assert seen > 12, "they would be there"
    # All that there is: 33 patches of others.
    assert execute([*line, f"neighbours_of={asked}", "k=36", "column=others", "without_itself=true"]) == 0
    (ids, similarities) = (pq.read_table(asked / "0.others.parquet")[i][0].as_py() for i in (0, 1))
    assert sorted(ids) == [-1] * 3 + list(range(3, 36)) and ids[33:] == [-1] * 3 and similarities[33:] == [0] * 3

    write_tar(tmp_path / "shards" / "1.tar", [("other.png", picture(40, 30, form="PNG", seed=99))])
    assert execute([*line, f"neighbours_of={tmp_path}/shards", "without_itself=true"]) != 0
    assert "1.tar is no longer what the database" in capsys.readouterr().err
    save_database(tmp_path / "theirs", [np.eye(10)])
    line[1] = f"database={tmp_path}/theirs"
    assert execute([*line, f"neighbours_of={asked}", "k=8", "column=others", "without_itself=true"]) == 2
    assert "does not tell the shards that it was made of" in capsys.readouterr().err


def test_rows_that_no_longer_match_their_shards_are_refused(tmp_path, model, capsys):
    shards = write_shards(tmp_path / "blue", blue)
    line = ["retrieve", f"database={tmp_path}/db", f"embedding.model={model}", "log.wandb=null"]
    assert execute([*line, f"shards={shards}"]) == 0
    database = Database(tmp_path / "db")
    originals = Originals(database, Store())
    whole = (shards / "00001.tar").read_bytes()
    write_tar(shards / "00001.tar", [("a.png", noise(7)), *[(f"{n}.png", blue(n)) for n in range(5)]])
    with pytest.raises(ContentError, match=r"its neighbour 8, '0008': its \.png is no longer at byte"):
        originals.picture(8, (16, 16))
    message = r"00001\.tar is no longer what the database .*db was made of: run `millrace retrieve"
    with pytest.raises(ConfigError, match=message):
        Originals(database, Store())
    assert execute([*line, "query=a red circle"]) == 2
    assert "is no longer what the database" in capsys.readouterr().err
    (shards / "00001.tar").write_bytes(whole)
    assert Originals(database, Store()).picture(8, (16, 16))[0, 0].tolist() == [0, 0, 85]
    (tmp_path / "db" / "metadata" / "metadata_00002.parquet").unlink()
    with pytest.raises(ConfigError, match=r"metadata_00002\.parquet is missing: run `millrace"):
        Originals(Database(tmp_path / "db"), Store())


def test_what_a_database_does_not_tell_is_refused(folder, tmp_path):
    other = save_database(tmp_path / "db", [np.eye(20, dtype=np.float32)])
    shards = write_shards(tmp_path / "shards", noise)
    write_neighbours(shards, other, 4)
    manifests = ensure_indexed([str(path) for path in sorted(shards.glob("*.tar"))], Store())
    with pytest.raises(ConfigError, match="do not tell the shards that its pictures are in"):
        NeighbourPictures(str(tmp_path / "db")).check(manifests, Store())
    field = NeighbourCaptions(str(tmp_path / "db"))
    field.check(manifests, Store())
    assert field.given("[3, 5]", (8, 8)) == ["caption of 0_3", "caption of 0_5", "", ""]
    path = tmp_path / "db" / "metadata" / "metadata_00000.parquet"
    pq.write_table(pq.read_table(path).drop_columns("caption"), path)
    with pytest.raises(ConfigError, match="have no captions"):
        NeighbourCaptions(str(tmp_path / "db")).check(manifests, Store())


def test_a_contact_sheet_shows_what_embeddings_are_of(folder, tmp_path):
    """In blues of neighbours and of nothing else."""
    data = TarData(
        {"drawn": Source(f"{folder}/shards", fields={"of_source": Neighbours(f"{folder}/away", k=1)})},
        fields={"neighbours": Neighbours(f"{folder}/away", k=3)},
        workers=0,
        cache_folder=f"{folder}/cache",
    )
    data.show_fields()
    split = data.open(Buckets([Bucket(16, 16)]))
    batch = split.loader(split.plan(2, 3, seed=0), range(2)).step(0)[0]
    assert set(batch.fields) == {"neighbours", "neighbours, shown", "of_source", "of_source, shown"}
    assert batch.fields["neighbours, shown"].shape == (3, 3, 3, 128, 128)
    contact_sheet([batch], tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png")).reshape(-1, 3)
    seen = {b for r, g, b in np.unique(sheet, axis=0).tolist() if r == g == 0 and b % 10 == 5}
    true = stored(folder, "neighbours")
    assert {10 * n + 5 for key in batch.keys for n in true[key][:3]} == seen
    captions = replace(batch, fields={"captions": [["a", "b"]] * 3})
    contact_sheet([captions], tmp_path / "words.png")
    contact_sheet([replace(batch, fields={})], tmp_path / "none.png")
    assert Image.open(tmp_path / "words.png").size[1] > Image.open(tmp_path / "none.png").size[1]
