"""clip-retrieval's own code serves our databases, and ours reads what it wrote."""

import base64
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from shard_files import picture, write_tar

from data.index import ensure_indexed
from data.retrieval.database import Database
from data.retrieval.embedding import Embedding
from data.retrieval.field import Neighbours
from data.retrieval.index import Searcher, brute_force
from data.retrieval.looking import answer
from data.store import Store
from tests.data.curation.tiny_models import save_clip
from tests.foreign import ask, install
from tools.cli import execute

pytestmark = pytest.mark.slow

# What it needs and this environment lacks: its pins (numpy < 2 among them) are not kept. What loads models for it would
# bring torchvision and open_clip, and has a stand-in.
NEEDED = ["clip-retrieval==2.45.0", "autofaiss==2.18.0", "embedding-reader==1.8.1", "pandas==3.1.1", "h5py==3.16.0"]
NEEDED += ["Flask==3.1.3", "flask-restful==0.3.10", "flask-cors==6.0.5", "werkzeug", "itsdangerous", "blinker"]
NEEDED += ["aniso8601", "pytz", "prometheus-client", "fire", "termcolor", "python-dateutil", "six"]
NEEDED += ["setuptools==80.9.0"]  # pkg_resources
MODELS = """
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

def load_clip(clip_model, use_jit=False, device="cpu", warmup_batch_size=1, clip_cache_path=None):
    network = CLIPModel.from_pretrained(clip_model).eval()
    processor = AutoImageProcessor.from_pretrained(clip_model, backend="pil")
    words = AutoTokenizer.from_pretrained(clip_model)
    network.encode_image = lambda pixels: network.get_image_features(pixel_values=pixels).pooler_output
    network.encode_text = lambda tokens: network.get_text_features(input_ids=tokens).pooler_output
    def prepare(image):
        return processor(image.convert("RGB"), return_tensors="pt").pixel_values[0]
    def tokenize(texts):
        return words(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return network, prepare, tokenize
"""
# Its whole back end, asked through Flask's client in the place of a port.
SERVE = """
import json, sys
from flask import Flask
from clip_retrieval.clip_back import clip_back
folders, model, questions = sys.argv[1:]
told = {}
def answer(app, **_):
    client = app.test_client()
    for name in json.load(open(folders)):
        common = {"indice_name": name, "num_images": 5, "modality": "image"}
        told[name] = [client.post("/knn-service", json=common | one).get_json() for one in json.load(open(questions))]
Flask.run = answer
clip_back(folders, clip_model=model, enable_mclip_option=False, provide_aesthetic_embeddings=False,
    enable_faiss_memory_mapping=True, columns_to_return=["image_path", "caption"])
print(json.dumps(told))
"""
WRITE = """
import json, sys
json.JSONEncoder.default = lambda self, one: one.item()  # autofaiss takes numpy's numbers for Python's
from clip_retrieval.clip_inference.main import main
from clip_retrieval.clip_index import clip_index
shards, model, embeddings, index = sys.argv[1:]
main(shards, embeddings, input_format="webdataset", wds_image_key="png", enable_metadata=True, clip_model=model,
    num_prepro_workers=0, batch_size=8, output_partition_count=2)
clip_index(embeddings, index, max_index_memory_usage="100M", current_memory_available="1G", nb_cores=1)
print("\\n1")
"""


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Path:
    folder = install(tmp_path_factory.mktemp("clip_retrieval"), *NEEDED)
    (folder / "all_clip.py").write_text(MODELS)
    (folder / "sentence_transformers.py").write_text("class SentenceTransformer: ...")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    letters = np.random.default_rng(0).integers(97, 123, (60, 9), np.uint8)
    for shard in range(3):
        members = []
        for n in range(20 * shard, 20 * shard + 20):
            told = json.dumps({"url": f"http://a/{n}", "punsafe": 0.5})
            members += [(f"key{n:04d}.png", picture(30 + n, 40, form="PNG", seed=n))]
            members += [(f"key{n:04d}.txt", letters[n].tobytes()), (f"key{n:04d}.json", told.encode())]
        write_tar(folder / f"{shard:05d}.tar", members)
    return folder


def retrieve(database: Path, model: Path, *more: str) -> int:
    return execute(["retrieve", f"database={database}", f"embedding.model={model}", "log.wandb=null", *more])


def test_its_back_end_answers_from_our_folders_as_we_do(theirs, model, shards, tmp_path):
    kinds = {
        "flat": ["index.kind=flat"],
        "ivf_flat": ["index.kind=ivf_flat", "index.cells=8", "index.recall=0.8", "index.k=5"],
        "hnsw": ["index.kind=hnsw", "index.links=4"],
    }
    for kind, chosen in kinds.items():
        if kind != "flat":
            shutil.copytree(tmp_path / "flat", tmp_path / kind)
        assert retrieve(tmp_path / kind, model, f"shards={shards}", "embedding.texts=true", *chosen) == 0
    assert Database(tmp_path / "ivf_flat").told["indexes"]["image"]["search"]["probes"] in range(2, 8)
    (tmp_path / "folders.json").write_text(json.dumps({kind: str(tmp_path / kind) for kind in kinds}))
    vectors = np.random.default_rng(0).standard_normal((20, 10)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    (tmp_path / "a.png").write_bytes(shown := picture(70, 40, form="PNG", seed=100))
    questions = [{"embedding_input": one.tolist(), "modality": side} for side in ("image", "text") for one in vectors]
    questions += [{"text": "a red circle"}, {"image": base64.b64encode(shown).decode()}]
    (tmp_path / "questions.json").write_text(json.dumps(questions))

    told = ask(theirs, SERVE, str(tmp_path / "folders.json"), str(model), str(tmp_path / "questions.json"))
    assert told.keys() == kinds.keys()
    embedding = Embedding(str(model))
    for kind, answers in told.items():
        database = Database(tmp_path / kind)
        images, texts = Searcher(database), Searcher(database, "text")
        expected = [*zip(*images(vectors, 5), strict=True), *zip(*texts(vectors, 5), strict=True)]
        expected += [answer(asked, images, embedding, 5) for asked in ("a red circle", str(tmp_path / "a.png"))]
        for found, (ids, similarities) in zip(answers, expected, strict=True):
            assert [one["id"] for one in found] == ids.tolist()
            assert np.allclose([one["similarity"] for one in found], similarities, atol=1e-3)
            rows = database.metadata(ids.tolist())
            assert [(one["image_path"], one["caption"]) for one in found] == [
                (row["image_path"], row["caption"]) for row in rows
            ]


def test_a_folder_that_it_wrote_is_a_database(theirs, model, shards, tmp_path, capsys):
    folder, index = tmp_path / "embeddings", tmp_path / "index"
    ask(theirs, WRITE, f"{shards}/{{00000..00002}}.tar", str(model), str(folder), str(index))
    assert retrieve(folder, model, f"neighbours_of={shards}", "k=4") == 2
    assert "where clip-retrieval wrote its index to another folder, link it there" in capsys.readouterr().err
    (folder / "image.index").symlink_to(index / "image.index")
    assert retrieve(folder, model, f"neighbours_of={shards}", "k=4") == 0

    database = Database(folder)
    assert (database.rows, database.width, len(database.parts), database.sides) == (60, 10, 2, ["image", "text"])
    rows = database.metadata(range(60))
    assert sorted(one["image_path"] for one in rows) == [f"key{n:04d}" for n in range(60)]
    assert (
        len({one["caption"] for one in rows}) == 60 and rows[7]["url"] == f"http://a/{int(rows[7]['image_path'][3:])}"
    )
    own = {one["image_path"]: i for i, one in enumerate(rows)}
    vectors = database.vectors(np.arange(60))
    true = brute_force(database, "image", vectors, 4)
    for shard in range(3):
        ids = pq.read_table(shards / f"{shard:05d}.neighbours.parquet")["neighbours"].to_pylist()
        for n, found in enumerate(ids, 20 * shard):
            place = own[f"key{n:04d}"]
            assert found[0] == place
            assert np.allclose(vectors[place] @ vectors[found].T, vectors[place] @ vectors[true[place]].T, atol=2e-3)
    field = Neighbours(str(folder), k=3, most_similar=0.999)
    field.check(ensure_indexed([str(path) for path in sorted(shards.glob("*.tar"))], Store()), Store())
    assert np.allclose(field.given("[3, 17]", (8, 8))[:2], vectors[[3, 17]])
