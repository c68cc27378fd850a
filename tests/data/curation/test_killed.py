"""The curate job, its process group killed at random moments and run again: the same bytes as if nothing had happened,
and at no time half a file."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from drawn_clips import encode, moving, texture
from PIL import Image
from shard_files import write_tar
from test_curate import CURATE, job, write_shards
from test_semantic_duplicates import planted
from test_semantic_duplicates import write_shards as write_embeddings

from data.index import ensure_indexed
from data.store import Store

AFTERWARDS = 0.05
"""Seconds, at most, for which a job goes on after the moment that it is to be killed at."""


@dataclass
class Step:
    """One command of a job, and when it is killed: each time that so many files match a pattern (`count pattern`)."""

    command: Sequence[str]
    moments: Sequence[tuple[int, str]]


def kill(command: Sequence[str], moment: Callable[[], bool], rng: np.random.Generator) -> bool:
    """Start a job and kill it and all of its tasks somewhat after the moment; returns whether it had not ended."""
    quiet = subprocess.DEVNULL
    process = subprocess.Popen([*CURATE, *command], stdout=quiet, stderr=quiet, start_new_session=True)
    deadline = time.monotonic() + 240
    while process.poll() is None and not moment():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(rng.uniform(0, AFTERWARDS))
    killed = process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return killed


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_whole(folder: Path) -> None:
    """That files which have a name are what it says."""
    for path in folder.rglob("[!.]*"):
        if path.suffix == ".parquet":
            pq.read_table(path)
        elif path.suffix == ".png":
            Image.open(path).load()
        elif path.suffix == ".html":
            assert path.read_text().endswith("</html>")


def survive(folder: Path, steps: Sequence[Step], seed: int) -> dict[str, bytes]:
    """Run the steps undisturbed, and again from the start with all their kills; returns the files that there are."""
    start = folder.with_name("start")
    shutil.copytree(folder, start)
    for step in steps:
        done = job(*step.command)
        assert done.returncode == 0, done.stderr
    undisturbed = contents(folder)
    shutil.rmtree(folder)
    shutil.copytree(start, folder)
    rng, kills, planned = np.random.default_rng(seed), 0, sum(len(step.moments) for step in steps)
    for step in steps:
        for count, pattern in step.moments:
            kills += kill(step.command, lambda n=count, p=pattern: len(list(folder.glob(p))) >= n, rng)
            check_whole(folder)
        done = job(*step.command)
        assert done.returncode == 0, done.stderr
    assert kills >= 0.7 * planned, f"{kills} of {planned} jobs were killed: the others had ended"
    assert contents(folder) == undisturbed
    return undisturbed


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_pictures_and_their_duplicates(tmp_path):
    folder = tmp_path / "photos"
    write_shards(folder, 40, 25)
    store = Store()
    ensure_indexed(store.expand(str(folder)), store)
    command = [
        f"shards={folder}",
        "max_errors=0.2",
        "filter=[sharpness,duplicates]",
        f"filter.duplicates.scratch={folder}/scratch",
        "cluster.tasks=2",
    ]
    scores = "*.[scp]*.parquet"  # sharpness, content_hash, perceptual_hash
    moments = [(1, scores), (30, scores), (100, scores), (1, "scratch/*"), (1, "scratch/*/pairs-*"), (9, "*.dup*")]
    found = survive(folder, [Step(command, moments)], 0)
    assert len(found) == 40 * (1 + 1 + 4)  # shards, manifests, scores


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_semantic_duplicates(tmp_path):
    folder = tmp_path / "embedded"
    write_embeddings(folder, planted(4000)[0], 30)
    command = [
        f"shards={folder}",
        "filter=semantic_duplicates",
        "filter.semantic_duplicates.clusters=60",
        f"filter.semantic_duplicates.scratch={folder}/scratch",
        "cluster.tasks=2",
    ]
    files = ("scratch/*/vectors.bin", "scratch/*/centroids.npy", "scratch/*/order.npy", "scratch/*/links-*")
    moments = [(1, name) for name in files] + [(1, "*.semantic_duplicates.*"), (15, "*.semantic_duplicates.*")]
    found = survive(folder, [Step(command, moments)], 1)
    assert len(found) == 30 * 4


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_videos_by_way_of_cuts_and_clips_to_a_report(tmp_path):
    folder = tmp_path / "videos"
    for shard in range(6):
        videos = []
        for i in range(2):
            shots = [moving(texture(10 * shard + 2 * i + n), 25, 0.5 * (n + i)) for n in range(2)]
            videos.append((f"{shard}-{i}.mp4", encode([*shots[0], *shots[1]])))
        write_tar(folder / f"{shard}.tar", videos)
    shards = f"shards={folder}"
    scores = "*.clips.[ms]*[nc].parquet"  # motion and static
    clips = [
        *(shards, "manifest=clips", "filter=[motion,static]", "cluster.tasks=2"),
        *(f"report={folder}/page", "funnel.where=motion > quantile(0.3) and not slideshow"),
    ]
    steps = [
        Step([shards, "filter=cuts", "cluster.tasks=2"], [(1, "*.manifest.parquet"), (1, "*.cuts.*"), (4, "*.cuts.*")]),
        Step(
            clips,
            [
                *((1, "*.clips.manifest.*"), (1, scores), (7, scores)),
                *((1, "page/pictures/*"), (2, "page/pictures/*.png"), (1, "page/report.md")),
            ],
        ),
    ]
    found = survive(folder, steps, 2)
    assert {"page/index.html", "page/report.md", "page/pictures/kept_1.png"} <= found.keys()
    assert sum(name.startswith("page") for name in found) == 2 + 4
    assert len(found) - 6 == 6 * (1 + 1 + 1 + 1 + 2)  # shards, manifests, cuts, clips, scores
