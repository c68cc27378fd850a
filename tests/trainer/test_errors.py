"""What ends a run by no fault of ours is one sentence, and the record of it is whole."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.run_directory import read_jsonl
from tests.data.shard_files import members_of
from tests.trainer.jobs import SMALL
from tools.demo.scenes import write_tars


def sentence(folder: Path, *overrides: str) -> str:
    """The last line on stderr of a run that fails with status 1; no traceback stands before it."""
    done = subprocess.run(
        [
            *(sys.executable, "-P", "-m", "tools.cli", "train", *SMALL, f"runs={folder}/runs", "name=run"),
            *(f"data.sources.scenes.shards={folder}/scenes", f"data.cache_folder={folder}/cache", *overrides),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 1, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    last = done.stderr.rstrip().splitlines()[-1]
    assert last.startswith("millrace: ")
    return last


@pytest.mark.timeout(300)
def test_a_slice_of_undecodable_pictures_is_one_sentence_and_in_quarantine_even_from_a_worker(tmp_path):
    write_tars(tmp_path / "scenes", 12, seed=0)
    (tar,) = (tmp_path / "scenes").glob("*.tar")
    content = bytearray(tar.read_bytes())
    for name, offset, size in members_of(tar):
        if not name.endswith((".txt", ".json")):
            content[offset : offset + size] = bytes(size)
    # Indexed while whole: undecodable pictures only show when they are read.
    from data.index import ensure_indexed
    from data.store import Store

    ensure_indexed([str(tar)], Store())
    times = tar.stat()
    tar.write_bytes(content)
    os.utime(tar, ns=(times.st_atime_ns, times.st_mtime_ns))
    last = sentence(tmp_path, "data.workers=1")
    assert "none of the 2 samples of slice (step 0, lane 0) of source 'scenes' can be used" in last, last
    rows = read_jsonl(tmp_path / "runs" / "run" / "quarantine.jsonl")
    assert [(row["step"], row["lane"], row["slot"], row["replaced_by"]) for row in rows] == [
        (0, 0, s, None) for s in (0, 1)
    ]
    assert all(repr(row["key"]) in last for row in rows)


@pytest.mark.timeout(300)
def test_a_loss_that_is_never_finite_is_one_sentence(tmp_path):
    write_tars(tmp_path / "scenes", 24, seed=0)
    last = sentence(
        tmp_path, "objective._target_=tests.trainer.faulty.NotFiniteAt", "+objective.steps=[0, 1]", "patience=2"
    )
    assert "2 steps in a row (0 to 1) had no finite gradient, and there is no checkpoint to go back to" in last
