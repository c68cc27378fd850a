"""Several sources through the whole `train` job."""

import json
from collections import Counter
from pathlib import Path

import pytest

from data.run_directory import read_jsonl
from tests.trainer.jobs import train_on
from tools.demo.scenes import write_tars


def test_sources_are_served_by_weight_on_any_ranks(tmp_path: Path):
    write_tars(tmp_path / "a", 40, seed=0)
    write_tars(tmp_path / "b", 80, seed=1)
    sources = [f"data.sources.{name}.shards={tmp_path}/{name}" for name in "ab"]
    sources += ["data.sources.a.weight=3", "data.sources.b.weight=1", "data.holdout=0.15"]
    sources += ["steps=8", "validation.every=8", "validation.samples=1000", "samples.every=8", "samples.count=3"]
    one = train_on(1, tmp_path, "name=one", *sources)
    two = train_on(2, tmp_path, "name=two", *sources)
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-4)
    assert two[-1]["val/loss"] == pytest.approx(one[-1]["val/loss"], rel=1e-4)
    lines = {name: read_jsonl(tmp_path / "runs" / name / "keys.jsonl") for name in ("one", "two")}
    assert lines["one"] == lines["two"] and len(lines["one"]) == 8 * 4
    # Rounds of four steps, in which every lane has three slices of a and one of b.
    for start in (0, 4):
        for lane in range(4):
            turns = Counter(r["source"] for r in lines["one"] if r["lane"] == lane and start <= r["step"] < start + 4)
            assert turns == {"a": 3, "b": 1}
    assert (tmp_path / "runs" / "one" / "samples" / "step_00000008.png").stat().st_size > 100
    # Other weights are another plan.
    record = json.loads((tmp_path / "runs/one/checkpoints/step_00000008/checkpoint.json").read_text())
    assert record["plan"]["segments"][0]["ingredients"]["turns of a"] == "3 of 4"
