"""The whole path without any download: a CLIP is trained on scenes, searched by text, gives neighbours to train with,
and its joint space draws what a text asks for."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.retrieval.database import Database
from data.retrieval.embedding import Embedding
from data.retrieval.index import Searcher
from data.retrieval.looking import answer
from data.run_directory import read_jsonl
from tools import cli
from tools.demo.scenes import COLOURS, write_tars

QUIET = ["log.wandb=null", "rehearse=false", "threads=1"]


@pytest.mark.slow
def test_from_pictures_to_pictures_of_what_is_asked(tmp_path: Path, capsys):
    write_tars(tmp_path / "train", 600, seed=0)
    write_tars(tmp_path / "others", 300, seed=1)
    runs = [f"runs={tmp_path}/runs", f"data.cache_folder={tmp_path}/cache"]
    source = f"data.sources.scenes.shards={tmp_path}/train"
    length = ["steps=200", "batch=32", "lanes=4", "schedule.lr=2e-3", "schedule.warmup=20", "validation.every=200"]
    every = ["checkpoint.every=200", "samples.every=200", "validation.samples=60"]
    arguments = ["train", "experiment=demo/clip", "scale=tiny", "name=clip", source, *length, *every, *runs, *QUIET]
    assert cli.execute(arguments) == 0, capsys.readouterr().err
    row = read_jsonl(tmp_path / "runs/clip/metrics.jsonl")[-1]
    assert row["val/text_to_image"] > 3 * row["val/chance"] and row["val/image_to_text"] > 3 * row["val/chance"]
    assert (tmp_path / "runs/clip/samples/step_00000200.png").stat().st_size > 500

    model, database = tmp_path / "runs/clip/clip", tmp_path / "database"
    retrieve = [
        "retrieve",
        f"database={database}",
        f"embedding.model={model}",
        "log.wandb=null",
        f"runs={tmp_path}/runs",
    ]
    shards = [f"shards={tmp_path}/others", f"neighbours_of={tmp_path}/train", "k=8"]
    assert cli.execute([*retrieve, *shards]) == 0, capsys.readouterr().err
    searcher, embedding = Searcher(Database(database)), Embedding(str(model))
    asked = [f"a {colour} {shape} in the centre" for colour in COLOURS for shape in ("circle", "square")]
    found = []
    for text in asked:
        ids, _ = answer(text, searcher, embedding, 1)
        (told,) = Database(database).metadata([int(ids[0])])
        found.append(text.split()[1] in told["caption"])
    assert np.mean(found) >= 2 / 3, found  # by chance: a sixth for one object, a third for two

    arguments = ["train", "experiment=rdm/imagenet", "scale=tiny", "name=rdm", source, "steps=8", *runs, *QUIET]
    arguments += [f"data.fields.neighbours.database={database}", "samples.every=null", "validation.every=8"]
    arguments += ["schedule.warmup=0", "schedule.lr=2e-3"]
    assert cli.execute(arguments) == 0, capsys.readouterr().err
    arguments = [f"source={tmp_path}/runs/rdm", f"out={tmp_path}/out", f"runs={tmp_path}/runs"]
    arguments += ["fields.neighbours=['a red circle in the centre','a blue square in the centre']", "sampler.steps=2"]
    assert cli.execute(["sample", *arguments]) == 0, capsys.readouterr().err
    one, other = (np.asarray(Image.open(tmp_path / "out" / f"0000{i}.png"), dtype=int) for i in range(2))
    assert one.shape == other.shape and np.abs(one - other).max() > 0
