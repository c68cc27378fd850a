import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import pytest

import tools.bench.retrieve
from data.retrieval.index import Searcher
from tools.cli import execute

SMALL = ["rows=3000", "width=16", "clusters=30", "queries=50", "k=5", "repeats=2"]


def benched(capsys, *more: str) -> dict[str, Any]:
    assert execute(["bench", "retrieve", *(f"bench.{one}" for one in (*SMALL, *more))]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("kind", ["auto", "ivf_sq8"])
def test_recall_is_measured(capsys, kind):
    told = benched(capsys, f"kind={kind}")
    assert told["index"]["factory"] == ("Flat" if kind == "auto" else "IVF256,SQ8")
    assert told["recall"]["searcher"] >= (0.999 if kind == "auto" else 0.9)
    assert set(told["build_seconds"]) == {"train", "add", "merge_and_tune"}


def test_queries_a_second_are_of_the_time_that_each_way_takes(capsys, monkeypatch):
    clock = [0.0]

    class Slow(Searcher):
        def __call__(self, *args):
            clock[0] += 2.0
            return super().__call__(*args)

    class Bare:
        def __init__(self, path):
            self.index = faiss.read_index(path)

        def search(self, *args):
            clock[0] += 1.0
            return self.index.search(*args)

    monkeypatch.setattr(tools.bench.retrieve, "Searcher", Slow)
    monkeypatch.setattr(tools.bench.retrieve, "faiss", SimpleNamespace(read_index=Bare))
    monkeypatch.setattr(tools.bench.retrieve, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    told = benched(capsys)
    assert told["queries_per_second"] == {"searcher": 25.0, "faiss": 50.0} and told["ratio"] == 0.5


def test_rows_of_a_subspace_lie_in_it_but_for_noise_and_take_several_cells_to_find(capsys, tmp_path):
    queries = tools.bench.retrieve._write(Path(tmp_path), 1000, 64, 10, 1.0, 8, 500)
    energy = np.linalg.svd(queries, compute_uv=False) ** 2
    assert 0.97 < energy[:8].sum() / energy.sum() < 0.999
    assert np.allclose(np.linalg.norm(queries, axis=1), 1, atol=1e-5)
    cells = ["kind=ivf_flat", "width=64", "clusters=300"]
    hard = benched(capsys, *cells, "dimension=12", "spread=1.0")["index"]
    easy = benched(capsys, *cells, "spread=0.1")["index"]
    assert easy["search"]["probes"] <= 2 < 8 < hard["search"]["probes"] and hard["recall"] >= 0.95
