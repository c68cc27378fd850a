"""The curate job over real tars, as users run it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shard_files import picture, write_tar

import conf
from conf.compose import compose
from conf.schema import build, check
from data.curate import Config, Settings, curate
from data.curation.columns import COLUMNS
from data.curation.sharpness import Sharpness
from data.decode import decode_image
from data.index import ensure_indexed
from data.scores import read_scored, score_url
from data.selection import select
from data.store import Store

CURATE = [sys.executable, "-m", "tools.cli", "curate", "log.wandb=null"]


def job(*overrides: str) -> subprocess.CompletedProcess:
    command = [*CURATE, *overrides]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def write_shards(folder: Path, count: int = 2, size: int = 10) -> list[Path]:
    """Shards of noise pictures; every fifth sample is no picture but text."""
    return [
        write_tar(
            folder / f"{s:05d}.tar",
            [
                (
                    f"{s}-{i:03d}.{'txt' if i % 5 == 4 else 'jpg'}",
                    b"text" if i % 5 == 4 else picture(40 + i, 30, seed=i),
                )
                for i in range(size)
            ],
        )
        for s in range(count)
    ]


def scores_of(folder: Path, name: str = "sharpness") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob(f"*.{name}.parquet"))}


def times_of(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in folder.glob("*.parquet")}


def test_the_job_scores_skips_what_is_done_and_redoes_what_changed(tmp_path):
    write_shards(tmp_path)
    command = [f"shards={tmp_path}", "max_errors=0.2", "filter=[sharpness]"]
    first = job(*command)
    assert first.returncode == 0, first.stderr
    assert "2 shards, 20 samples" in first.stdout
    assert "sharpness: 2 of 2 shards scored, 4 errors" in first.stdout
    assert "no picture or clip (4)" in first.stdout
    before, content = times_of(tmp_path), scores_of(tmp_path)
    assert job(*command).returncode == 0
    assert times_of(tmp_path) == before
    assert job(*command, "filter.sharpness.size=24").returncode == 0
    after = times_of(tmp_path)
    assert {name for name in after if after[name] != before[name]} == set(content)
    assert scores_of(tmp_path) != content
    assert job(*command, "cluster.tasks=2").returncode == 0
    assert scores_of(tmp_path) == content

    store = Store()
    manifests = ensure_indexed(store.expand(str(tmp_path)), store)
    values = [v for m in manifests for v in pq.read_table(score_url(m.url, "sharpness"))["sharpness"].to_pylist()]
    kept = [i for i, value in enumerate(values) if value is not None and value > sorted(filter(None, values))[3]]
    selection = select(manifests, store, "sharpness > quantile(0.25)", cache_folder=str(tmp_path / "cache"))
    assert [shard * 10 + row for shard, row in selection.locate(np.arange(len(selection)))] == kept


def test_a_single_task_scores_its_own_shards_and_a_last_run_the_rest(tmp_path):
    write_shards(tmp_path, 4, 5)
    command = [f"shards={tmp_path}", "max_errors=0.2", "filter=duplicates"]
    part = job(*command, "cluster.tasks=3", "cluster.task=0", f"report={tmp_path / 'report'}")
    assert part.returncode == 0 and "without cluster.task writes it" in part.stdout
    assert not (tmp_path / "report").exists()
    assert list(scores_of(tmp_path, "content_hash")) == ["00000.content_hash.parquet", "00003.content_hash.parquet"]
    assert not scores_of(tmp_path, "duplicates")
    done = job(*command)
    assert len(scores_of(tmp_path, "duplicates")) == 4, done.stderr


@pytest.mark.parametrize("damaged", [1, 3])
def test_errors_are_listed_and_too_many_stop_the_job(tmp_path, damaged):
    pictures = [(f"{i:02d}.jpg", picture(40, 30, seed=i)) for i in range(20)]
    for i in range(damaged):
        name, data = pictures[5 * i]
        pictures[5 * i] = name, data[: len(data) // 2]
    write_tar(tmp_path / "a.tar", pictures)
    done = job(f"shards={tmp_path}", "filter=[sharpness,blank]")
    if damaged == 3:
        assert done.returncode == 1
        assert len(done.stderr.strip().splitlines()[-1:]) == 1
        for words in ("'sharpness' failed on 3 of the 20", "a.tar", "max_errors=0.1", "undecodable picture", "'00'"):
            assert words in done.stderr
        assert not scores_of(tmp_path)
        return
    assert done.returncode == 0, done.stderr
    assert "sharpness: 1 of 1 shards scored, 1 errors" in done.stdout and "undecodable picture (1)" in done.stdout
    (listed,) = [line for line in done.stdout.splitlines() if "a.tar: 00: " in line]  # once, however many filters fail
    assert "cannot decode" in listed and listed.endswith(" (sharpness, blank)")
    store = Store()
    (manifest,) = ensure_indexed(store.expand(str(tmp_path)), store)
    scored = read_scored(manifest, "sharpness", store)
    assert scored.error_counts == (("undecodable picture", 1),)
    assert [(e.row, e.key) for e in scored.errors] == [(0, "00")]
    assert "cannot decode" in scored.errors[0].detail
    values = pq.read_table(score_url(manifest.url, "sharpness"))["sharpness"].to_pylist()
    assert values[0] is None and None not in values[1:]


class Reader(Sharpness):
    """Sharpness of another name, that keeps what it was shown."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.columns, self.seen = name, pa.schema({name: pa.float32()}), []

    def score(self, samples):
        self.seen += samples
        return [{self.name: row["sharpness"]} for row in super().score(samples)]


def test_all_filters_of_a_pass_see_the_same_samples_decoded_once(tmp_path, monkeypatch):
    decoded = []
    monkeypatch.setattr("data.curation.base.decode_image", lambda *a, **k: decoded.append(1) or decode_image(*a, **k))
    write_shards(tmp_path, 2, 10)
    store = Store()
    manifests = ensure_indexed(store.expand(str(tmp_path)), store)
    one, two = Reader("one"), Reader("two")
    curate(manifests, [one, two], store, Settings(batch=4, max_errors=0.2))
    assert [id(s) for s in one.seen] == [id(s) for s in two.seen] and len(decoded) == len(one.seen) == 16
    with pytest.raises(ValueError, match="two filters write the column 'one'"):
        again = Reader("three")
        again.columns = one.columns
        curate(manifests, [one, again], store)


@pytest.mark.parametrize("choice", ["images", "duplicates", "[blank,content_hash]", "text_area"])
def test_the_filters_of_pictures_can_be_chosen_and_have_names_and_columns_of_their_own(choice):
    config = compose("curate", ["shards=x", f"filter={choice}"])
    check(config, Config)
    filters = [build(node) for node in config.filter.values()]
    columns = [column for one in filters for column in one.columns.names]
    assert len({one.name for one in filters}) == len(filters) and len(set(columns)) == len(columns)
    assert all(json.loads(json.dumps(one.settings())) == one.settings() for one in filters)


def test_the_columns_that_messages_name_are_those_that_the_filters_write():
    choices = {path.stem for path in (Path(conf.__file__).parent / "filter").glob("*.yaml")} - {"images"}
    assert choices == COLUMNS.keys()
    heads = ("aesthetic", "nsfw", "watermark")
    for name, columns in COLUMNS.items():
        more = [f"filter.{name}.head.path=x"] if name in heads else []
        node = compose("curate", ["shards=x", f"filter={name}", *more]).filter[name]
        if name == "clip":  # what follows cannot be built without a model
            assert columns == (f"{node.name}_embedding", f"{node.name}_similarity")
        elif "column" in node:
            assert columns == (node.column,)
        else:
            assert columns == tuple(build(node).columns.names)


def test_what_would_fail_in_the_end_is_refused_before_the_work(tmp_path):
    write_shards(tmp_path / "shards")
    command = [f"shards={tmp_path / 'shards'}", "max_errors=0.2", "filter=[sharpness]"]
    (tmp_path / "file").write_text("")
    for folder in (f"{tmp_path}/file", "/proc/report"):  # whose superuser may write everywhere, as permissions have it
        done = job(*command, f"report={folder}")
        assert done.returncode == 2 and f"report={folder} cannot be written" in done.stderr
    for clause, words in (("sharpnes > 3", "did you mean 'sharpness'?"), ("sharpness >", "not one SQL condition")):
        done = job(*command, f"report={tmp_path / 'report'}", f"funnel.where={clause}")
        assert done.returncode == 2 and words in done.stderr
    done = job(f"shards={tmp_path / 'shards'}", "filter=[sharpness,motion]")
    assert done.returncode == 2 and "the filter 'motion' scores videos, and no sample has one" in done.stderr
    assert not scores_of(tmp_path / "shards")
    done = job(*command, f"report={tmp_path / 'report'}", "funnel.where=sharpness > quantile(0.5)")
    assert done.returncode == 0, done.stderr
