"""The curate job over real tars, as users run it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from shard_files import picture, write_tar

from data.index import ensure_indexed
from data.scores import score_url
from data.selection import select
from data.store import Store


def job(*overrides: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tools.cli", "curate", *overrides]
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
