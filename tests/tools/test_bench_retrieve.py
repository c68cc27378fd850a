import json

import pytest

from tools.cli import execute


@pytest.mark.parametrize("kind", ["auto", "ivf_sq8"])
def test_recall_is_measured_and_queries_are_compared(capsys, kind):
    small = ["rows=3000", "width=16", "clusters=30", "queries=50", "k=5", "repeats=2", f"kind={kind}"]
    assert execute(["bench", "retrieve", *(f"bench.{one}" for one in small)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["index"]["factory"] == ("Flat" if kind == "auto" else "IVF256,SQ8")
    assert told["recall"]["searcher"] >= (0.999 if kind == "auto" else 0.9)
    assert told["ratio"] == pytest.approx(told["queries_per_second"]["searcher"] / told["queries_per_second"]["faiss"])
    assert set(told["build_seconds"]) == {"train", "add", "merge_and_tune"}
