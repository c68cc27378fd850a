"""The retrieve job over small tars, with a tiny CLIP: what it writes, what it skips, and what it refuses."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from shard_files import picture, write_tar
from vectors import save_database, save_index

import data.retrieval.embedding
from conf.errors import ConfigError
from data.index import ensure_indexed
from data.parquet import to_parquet
from data.retrieval.database import Database
from data.retrieval.embedding import Embedding, PartWriter, Patches, embed_query
from data.retrieval.field import Neighbours
from data.retrieval.index import Searcher
from data.retrieval.looking import answer
from data.store import Store
from tests.data.curation.tiny_models import save_clip
from tools.cli import execute

ROOT = Path(__file__).parents[3]
PER_SHARD = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


def write_shards(folder: Path, shards: int = 3, start: int = 0) -> Path:
    for i in range(start, start + shards):
        members = []
        for n in range(PER_SHARD):
            number = i * PER_SHARD + n
            data = picture(30 + number, 40, form="PNG", seed=number)
            if number == 4:
                data = data[:100]  # cannot be decoded
            members += [(f"key{number:04d}.png", data), (f"key{number:04d}.txt", f"a red circle {number}".encode())]
        write_tar(folder / f"{i:05d}.tar", members)
    return folder


def command(database: Path, model: Path, *more: str) -> list[str]:
    return ["retrieve", f"database={database}", f"embedding.model={model}", "log.wandb=null", "max_errors=0.2", *more]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def expected(shards: Path, model: Path) -> dict[str, np.ndarray]:
    """Embeddings by key, by transformers, from Pillow's pictures one by one."""
    import tarfile

    import torch
    from transformers import AutoImageProcessor, AutoModel

    network, processor = (
        AutoModel.from_pretrained(model).eval(),
        AutoImageProcessor.from_pretrained(model, backend="pil"),
    )
    found = {}
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith("png") and member.name != "key0004.png":
                    image = Image.open(io.BytesIO(tar.extractfile(member).read()))
                    pixels = processor(image, return_tensors="pt").pixel_values
                    with torch.no_grad():
                        vector = network.get_image_features(pixel_values=pixels).pooler_output[0].numpy()
                    found[member.name[:7]] = vector / np.linalg.norm(vector)
    return found


def test_a_database_and_the_neighbours_of_its_samples(tmp_path, model, capsys):
    shards, folder = write_shards(tmp_path / "shards"), tmp_path / "db"
    more = [f"shards={shards}", f"neighbours_of={shards}", "embedding.texts=true", "k=3"]
    assert execute(command(folder, model, *more)) == 0
    said = capsys.readouterr().out
    assert "17 embeddings of 10 numbers" in said and "image.index: Flat" in said and "recall 1.000" in said
    names = {"img_emb", "text_emb", "metadata", "image.index", "text.index", "database.json"}
    assert {path.name for path in folder.iterdir()} == names

    database = Database(folder)
    told = database.metadata(range(17))
    keys = [one["image_path"] for one in told]
    true = expected(shards, model)
    assert keys == sorted(true)
    vectors = database.vectors(np.arange(17))
    assert np.abs(vectors - np.stack([true[key] for key in keys])).max() < 2e-3  # half precision
    assert told[5]["caption"] == "a red circle 6" and told[5]["shard"].endswith("00001.tar") and told[5]["row"] == 0
    captions = database.vectors(np.arange(17), "text")
    assert captions.shape == (17, 10) and not np.allclose(captions, vectors, atol=0.1)

    similar = vectors @ vectors.T
    for i, shard in enumerate(sorted(shards.glob("*.tar"))):
        table = pq.read_table(shard.with_name(f"{i:05d}.neighbours.parquet"))
        rows = [n for n in range(17) if told[n]["shard"].endswith(shard.name)]
        ids, similarities = (table[name].to_pylist() for name in ("neighbours", "neighbours_similarity"))
        assert [n for n, one in enumerate(ids) if one is None] == ([4] if i == 0 else [])
        for row, n in zip([n for n, one in enumerate(ids) if one is not None], rows, strict=True):
            assert ids[row][0] == n and similarities[row][0] == pytest.approx(1, abs=1e-3)
            assert np.allclose(similar[n, ids[row]], np.sort(similar[n])[::-1][:3], atol=2e-3)
            assert np.allclose(similarities[row], similar[n, ids[row]], atol=2e-3)


@pytest.mark.parametrize(
    "lost", ["img_emb/img_emb_00001.npy", "text_emb/text_emb_00002.npy", "metadata/metadata_00000.parquet"]
)
@pytest.mark.parametrize("whole", [False, True])
def test_a_part_that_lost_a_file_is_made_anew(tmp_path, model, capsys, lost, whole):
    shards, folder = write_shards(tmp_path / "shards"), tmp_path / "db"
    line = command(folder, model, f"shards={shards}", "embedding.texts=true")
    assert execute(line) == 0
    before = files(folder)
    if whole:
        (folder / lost).unlink()
    else:
        (folder / lost).write_bytes(before[lost][:-10])
    error = "is missing" if whole else rf"has {len(before[lost]) - 10} bytes where {len(before[lost])} were written"
    with pytest.raises(ConfigError, match=rf"{lost} {error}: run `millrace retrieve database=.*db shards=\.\.\.`"):
        Database(folder)
    (folder / "image.index").unlink()
    assert execute(line) == 0 and "17 embeddings" in capsys.readouterr().out
    assert files(folder) == before
    # Nothing tells of the files but the part itself.
    if lost.endswith("npy"):
        (folder / "database.json").unlink()
        with pytest.raises(ConfigError, match=r"database\.json is missing: run `millrace"):
            Database(folder)
        (folder / lost).write_bytes(before[lost][:-10])
        assert execute(line) == 0 and files(folder) == before


def test_a_part_is_done_when_all_of_it_is_there(tmp_path, model):
    """As earlier versions wrote it, too, whose metadata tell no marks."""
    shards, folder = write_shards(tmp_path / "shards"), tmp_path / "db"
    assert execute(command(folder, model, f"shards={shards}")) == 0
    (manifest, *_) = ensure_indexed([str(shards / "00000.tar")], Store())
    writer = PartWriter(folder, Embedding(str(model)), Store(), 0.2)
    table = pq.read_table(folder / "metadata" / "metadata_00000.parquet")
    told = {"recipe": writer.embedding.recipe(), "shard": manifest.digest}
    (folder / "metadata" / "metadata_00000.parquet").write_bytes(to_parquet(table, told))
    assert writer.is_done(manifest, "00000")
    path = folder / "img_emb" / "img_emb_00000.npy"
    np.save(path, np.load(path)[1:])
    assert not writer.is_done(manifest, "00000")
    path.unlink()
    assert not writer.is_done(manifest, "00000")


def test_parts_that_the_database_does_not_tell_of_are_refused(tmp_path, model):
    shards, folder = write_shards(tmp_path / "shards"), tmp_path / "db"
    assert execute(command(folder, model, f"shards={shards}")) == 0
    other = folder / "img_emb" / "img_emb_00003.npy"
    other.write_bytes((folder / "img_emb" / "img_emb_00001.npy").read_bytes())
    with pytest.raises(ConfigError, match=r"img_emb_00003\.npy is none of the parts that .*database\.json tells of"):
        Database(folder)
    assert execute(command(folder, model, f"shards={shards}")) == 0 and not other.exists()


def test_what_is_done_is_skipped_and_what_changed_done_again(tmp_path, model):
    shards, folder = write_shards(tmp_path / "shards"), tmp_path / "db"
    more = [f"shards={shards}", f"neighbours_of={shards}", "k=3"]
    watched = [folder / "img_emb", folder / "metadata", folder / "image.index", *shards.glob("*.neighbours.parquet")]

    def times() -> dict[str, int]:
        found = [path for one in watched for path in (one.iterdir() if one.is_dir() else [one])]
        found += list(shards.glob("*.neighbours.parquet"))
        return {path.name: path.stat().st_mtime_ns for path in found if path.exists()}

    assert execute(command(folder, model, *more)) == 0
    before = times()
    assert execute(command(folder, model, *more)) == 0
    assert times() == before

    write_shards(shards, 1, start=3)
    assert execute(command(folder, model, *more)) == 0
    after = times()
    kept = {f"{kind}_{i:05d}.{end}" for i in range(3) for kind, end in (("img_emb", "npy"), ("metadata", "parquet"))}
    assert {name for name in before if after[name] == before[name]} == kept  # other rows, other neighbours

    for path in shards.glob("00003.*"):
        path.unlink()
    assert execute(command(folder, model, *more)) == 0
    assert Database(folder).rows == 17 and not (folder / "img_emb" / "img_emb_00003.npy").exists()


def test_neighbours_stay_those_of_the_database_wherever_its_model_lies(tmp_path, model):
    shards, folder = write_shards(tmp_path / "shards"), tmp_path / "db"
    assert execute(command(folder, model, f"shards={shards}", f"neighbours_of={shards}", "k=3")) == 0
    before = Database(folder)
    moved = shutil.copytree(model, tmp_path / "moved")
    assert execute(command(folder, moved, f"shards={shards}")) == 0
    assert Database(folder).told["model_name"] == str(moved) != before.told["model_name"]
    manifests = ensure_indexed([str(path) for path in sorted(shards.glob("*.tar"))], Store())
    Neighbours(str(folder), k=3).check(manifests, Store())
    kept = Database(folder).told
    image = kept["indexes"]["image"] | {"search": {"probes": 3}}
    changes = [{"model": "another"}, {"recipe": kept["recipe"] | {"batch": 3}}, {"parts": kept["parts"][:2]}]
    for change in (*changes, {"indexes": {"image": image}}):
        other = Database(folder)
        other.told |= change
        assert other.fingerprint != before.fingerprint


def test_another_model_makes_another_index(tmp_path, model):
    shards, folder = write_shards(tmp_path / "shards"), tmp_path / "db"
    other = save_clip(tmp_path / "other", seed=1)
    more = [f"shards={shards}", f"neighbours_of={shards}", "k=3", "index.kind=ivf_flat", "index.cells=4"]
    assert execute(command(folder, model, *more)) == 0
    first = Database(folder).vectors(np.arange(17))
    assert execute(command(folder, other, *more)) == 0
    database = Database(folder)
    vectors = database.vectors(np.arange(17))
    assert np.abs(vectors - first).max() > 0.1
    found, similarities = Searcher(database)(vectors, 1)
    assert found[:, 0].tolist() == list(range(17)) and similarities.min() > 0.999


def test_no_index_of_earlier_parts_outlives_a_kill(tmp_path, model):
    shards, folder = write_shards(tmp_path / "shards"), tmp_path / "db"
    assert execute(command(folder, model, f"shards={shards}")) == 0
    write_tar(shards / "00001.tar", [(f"key{n:04d}.png", picture(50, 50, form="PNG", seed=99 + n)) for n in range(6)])
    assert execute(command(folder, model, f"shards={shards}", "cluster.tasks=3", "cluster.task=1")) == 0
    with pytest.raises(
        ConfigError, match=r"db is not finished, as .* run `millrace retrieve database=.*db shards=\.\.\.`"
    ):
        Database(folder)


@pytest.mark.slow
def test_tasks_and_kills_end_with_the_same_files(tmp_path, model):
    shards = write_shards(tmp_path / "shards", 4)
    index = ["index.kind=ivf_flat", "index.cells=4", "embedding.batch=4"]
    more = [f"shards={shards}", f"neighbours_of={shards}", "k=3", *index]
    one, two = tmp_path / "one", tmp_path / "two"
    assert execute(command(one, model, *more)) == 0
    neighbours = {path.name: path.read_bytes() for path in shards.glob("*.neighbours.parquet")}
    for path in shards.glob("*.neighbours.parquet"):
        path.unlink()

    line = [sys.executable, "-m", "tools.cli", *command(two, model, *more, "cluster.tasks=2")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for pattern in ("img_emb/*.npy", "*.work/*", "image.index"):
        process = subprocess.Popen(line, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 240
        while process.poll() is None and not list(two.glob(pattern)):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(line, env=environment, check=True)
    first, second = files(one), files(two)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []
    assert {path.name: path.read_bytes() for path in shards.glob("*.neighbours.parquet")} == neighbours


def test_a_task_of_an_array_embeds_its_own_shards(tmp_path, model, capsys):
    shards, folder = write_shards(tmp_path / "shards"), tmp_path / "db"
    more = [f"shards={shards}", f"neighbours_of={shards}", "k=3", "cluster.tasks=2"]
    assert execute(command(folder, model, *more, "cluster.task=1")) == 0
    assert "without cluster.task builds the index" in capsys.readouterr().out
    assert [path.name for path in (folder / "img_emb").iterdir()] == ["img_emb_00001.npy"]
    assert execute(command(folder, model, *more)) == 0
    assert Database(folder).rows == 17


def test_patches_are_squares_whose_places_follow_from_keys(tmp_path, model):
    shards, folder = write_shards(tmp_path / "shards", 1), tmp_path / "db"
    patches = "embedding.patches={_target_: data.retrieval.embedding.Patches, per_picture: 2, size: 24}"
    assert execute(command(folder, model, f"shards={shards}", patches)) == 0
    database = Database(folder)
    assert database.rows == 10
    told = database.metadata(range(10), ["image_path", "patch"])
    assert told[0]["image_path"] == told[1]["image_path"] and told[0]["patch"] != told[1]["patch"]
    assert [tuple(one["patch"]) for one in told[:2]] == Patches(2, 24).places("key0000", 40, 30)
    image = np.array(Image.open(io.BytesIO(picture(30, 40, form="PNG", seed=0))))
    left, top, right, bottom = told[1]["patch"]
    assert (right - left, bottom - top) == (24, 24)
    (vector,) = Embedding(str(model)).embedder().images([image[top:bottom, left:right]])
    assert np.abs(vector - database.vectors(np.array([1]))[0]).max() < 2e-3


def test_patches_lie_within_pictures_smaller_than_they_are():
    for left, top, right, bottom in Patches(50, 256).places("key", 100, 60):
        assert left >= 0 and right <= 60 and top >= 0 and bottom <= 100 and right - left == bottom - top == 60


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["neighbours_of={shards}", "k=18"], "k=18 neighbours of a database of 17 rows"),
        (["neighbours_of={shards}", "embedding.model={other}"], "holds embeddings of another model than"),
        (["database={empty}", "neighbours_of={shards}"], "has no img_emb/: make one with `millrace retrieve"),
        (["database=s3://bucket/db", "neighbours_of={shards}"], "give a folder, not a URL"),
        ([], "there is nothing to do"),
        (["shards={shards}", "max_errors=0.1"], "1 of the 6 samples of .*00000.tar cannot be embedded"),
        (["shards={shards}", "index.memory_gib=1e-9", "index.kind=flat"], "memory_gib=1e-09 is too little"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, model, change, message, capsys):
    shards, folder = write_shards(tmp_path / "shards"), tmp_path / "db"
    assert execute(command(folder, model, f"shards={shards}")) == 0
    if "max_errors=0.1" in change:
        for path in folder.glob("*/*"):
            path.unlink()
    other = save_clip(tmp_path / "other", seed=1)
    told = [one.format(shards=shards, other=other, empty=tmp_path / "empty") for one in change]
    assert execute(command(folder, model, *told)) in (1, 2)
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("kept", ["**/*.*", "img_emb/*.npy", "image.index", "metadata/*.parquet"])
def test_a_database_of_others_is_not_written_over(tmp_path, model, capsys, kept):
    shards, folder = write_shards(tmp_path / "shards"), tmp_path / "db"
    save_index(save_database(folder, [np.eye(10)] * 2))
    for path in set(folder.rglob("*.*")) - set(folder.glob(kept)):
        path.unlink()
    before = files(folder)
    assert before and execute(command(folder, model, f"shards={shards}")) == 2
    assert "was not written by Millrace, which would write over it" in capsys.readouterr().err
    assert files(folder) == before


def test_a_first_part_of_ours_without_its_metadata_is_written_over(tmp_path, model, monkeypatch):
    shards, folder = write_shards(tmp_path / "shards"), tmp_path / "db"
    with monkeypatch.context() as patched:
        patched.setattr(data.retrieval.embedding, "to_parquet", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            execute(command(folder, model, f"shards={shards}"))
    assert (folder / "img_emb" / "img_emb_00000.npy").exists() and not (folder / "metadata").exists()
    assert execute(command(folder, model, f"shards={shards}")) == 0 and Database(folder).rows == 17


def test_damage_is_told_of(tmp_path, model, capsys):
    shards, folder = write_shards(tmp_path / "shards"), tmp_path / "db"
    assert execute(command(folder, model, f"shards={shards}")) == 0
    told = json.loads((folder / "database.json").read_text())
    for path, content, message in [
        (folder / "image.index", b"nonsense", "image.index is damaged"),
        (folder / "img_emb" / "img_emb_00001.npy", b"nonsense", "img_emb_00001.npy has 8 bytes where"),
        (folder / "database.json", b"{", "database.json is damaged"),
        (folder / "database.json", json.dumps(told | {"version": 9}).encode(), "is of version 9"),
    ]:
        whole = path.read_bytes()
        path.write_bytes(content)
        assert execute(command(folder, model, f"neighbours_of={shards}", "k=2")) == 2
        assert message in capsys.readouterr().err
        path.write_bytes(whole)


def test_neighbours_of_a_text_of_a_picture_and_rows_are_what_sampling_is_given(tmp_path, model):
    shards, folder = write_shards(tmp_path / "shards"), tmp_path / "db"
    assert execute(command(folder, model, f"shards={shards}")) == 0
    database = Database(folder)
    vectors = database.vectors(np.arange(17))
    (tmp_path / "a.png").write_bytes(picture(36, 40, form="PNG", seed=6))
    embedder = Embedding(str(model)).embedder()
    (text,), own = embedder.texts(["a red circle"]), vectors[5]
    nearest = {"text": np.argsort(-(vectors @ text))[:3], "own": np.argsort(-(vectors @ own))[:3]}
    field = Neighbours(str(folder), k=3)
    assert np.allclose(field.given("a red circle", (8, 8)), vectors[nearest["text"]], atol=1e-5)
    assert np.allclose(field.given(str(tmp_path / "a.png"), (8, 8)), vectors[nearest["own"]], atol=1e-5)
    assert nearest["own"][0] == 5
    assert np.allclose(field.given("[2, 0]", (8, 8)), vectors[[2, 0]], atol=1e-5)
    assert np.allclose(field.given("~5", (8, 8)), vectors[nearest["own"]], atol=1e-5)
    asked = replace(field, query=True)
    assert np.allclose(asked.given("a red circle", (8, 8)), [text, *vectors[nearest["text"][:2]]], atol=1e-5)
    assert np.allclose(replace(asked, k=1).given("a red circle", (8, 8)), [text], atol=1e-5)
    with pytest.raises(ConfigError, match="k=18 neighbours of a database of 17 rows"):
        replace(field, k=18).given("a red circle", (8, 8))
    wrong = ["[3, 1", "[]", "[1.7]", "[true]", "[[3]]", "[-1]", "[17]", "~x", "~", "~1.5", "~[3]", "~3, 4"]
    for text in wrong:
        with pytest.raises(ValueError, match=r"^rows are given as \[3, 17\], or one as ~17, from 0 to 16 of"):
            field.given(text, (8, 8))
    save_database(tmp_path / "theirs", [np.eye(10)])
    with pytest.raises(ValueError, match="does not tell the model that made it"):
        Neighbours(str(tmp_path / "theirs"), k=3).given("a red circle", (8, 8))


def test_texts_are_embedded_by_the_model_that_made_the_database_from_anywhere(tmp_path, model, monkeypatch):
    shutil.copytree(model, tmp_path / "clip")
    shards, folder = write_shards(tmp_path / "shards"), tmp_path / "db"
    monkeypatch.chdir(tmp_path)
    assert execute(command(folder, Path("clip"), f"shards={shards}")) == 0
    monkeypatch.chdir(shards)
    assert Neighbours(str(folder), k=3).given("a red circle", (8, 8)).shape == (3, 10)
    shutil.rmtree(tmp_path / "clip")
    save_clip(tmp_path / "clip", seed=1)
    with pytest.raises(ConfigError, match=r"/clip is no longer the model that made the database .*db: put"):
        Neighbours(str(folder), k=3).given("a red circle", (8, 8))
    assert Neighbours(str(folder), k=3).given("[3, 1, 2]", (8, 8)).shape == (3, 10)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("{folder}/photo.png", "query: .*photo.png is named as a picture, and there is no such file"),
        ("photo.JPG", "query: photo.JPG is named as a picture, and there is no such file"),
        ("{folder}/broken.png", "query: .*broken.png cannot be read as a picture: "),
        ("{folder}/notes.txt", "query: .*notes.txt cannot be read as a picture: "),
    ],
)
def test_a_picture_that_is_not_there_or_cannot_be_decoded_is_told_of(tmp_path, model, capsys, query, message):
    shards, folder = write_shards(tmp_path / "shards", 1), tmp_path / "db"
    assert execute(command(folder, model, f"shards={shards}")) == 0
    (tmp_path / "broken.png").write_bytes(picture(40, 40, form="PNG")[:100])
    (tmp_path / "notes.txt").write_text("a red circle")
    assert execute(command(folder, model, f"query={query.format(folder=tmp_path)}", "k=3")) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_long_text_with_a_period_is_a_text(model):
    embedder = Embedding(str(model)).embedder()
    text = "a red circle. " + "It is red " * 40
    assert np.array_equal(embed_query(text, embedder), embedder.texts([text]))
    assert np.array_equal(embed_query("a picture of Mr. Png", embedder), embedder.texts(["a picture of Mr. Png"]))


def test_a_question_is_answered_by_a_sheet_and_a_page_shows_neighbours(tmp_path, model, capsys):
    shards, folder = write_shards(tmp_path / "shards"), tmp_path / "db"
    assert execute(command(folder, model, f"shards={shards}", "index.kind=ivf_flat", "index.cells=4")) == 0
    sheet = tmp_path / "sheet.png"
    assert execute(command(folder, model, "query=a red circle", f"out={sheet}", "k=8")) == 0
    assert Image.open(sheet).size[0] == 6 * 144 and "the nearest to 'a red circle'" in capsys.readouterr().out
    (tmp_path / "a.png").write_bytes(picture(36, 40, form="PNG", seed=6))
    (ids, similarities) = answer(str(tmp_path / "a.png"), Searcher(Database(folder)), Embedding(str(model)), 3)
    assert ids[0] == 5 and similarities[0] == pytest.approx(1, abs=1e-3)
    assert execute(command(folder, model, f"report={tmp_path}/report", "k=3")) == 0
    page = (tmp_path / "report" / "report.md").read_text()
    assert "| search | recall@3 | ms a query, one thread |" in page
    recalls = [float(line.split("|")[2]) for line in page.splitlines() if "probes" in line]
    assert recalls == sorted(recalls) and recalls[-1] == 1.0
    searched = [line.split("|")[1] for line in page.splitlines() if "probes" in line]
    assert len(searched) == len(set(searched)) > 1 and " probes 4, " in searched[-1]  # all of the cells
    assert page.count("neighbours_") == 12
