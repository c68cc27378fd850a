"""The loader: the same batches whatever the workers, ranks and starting point, and errors instead of hangs."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from data.batch import Batch
from data.buckets import BucketList
from data.dataset import LoaderError
from data.plan import lanes_of
from data.store import StoreError
from data.tars import TarData, TarSplit
from tests.data.shard_files import members_of, sample, write_shard

LANES, SLICE = 4, 3


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Two sources of unequal shards; some pictures of each cannot be decoded, which indexing does not notice."""
    folder = tmp_path_factory.mktemp("shards")
    for name, counts in {"a": (1, 40, 7), "b": (25,)}.items():
        for i, count in enumerate(counts):
            tar = write_shard(
                folder / name / f"{i}.tar", [sample(j, f"{name}{i}-", 24 + 12 * (j % 2)) for j in range(count)]
            )
            content = bytearray(tar.read_bytes())
            for member, offset, size in members_of(tar):
                if member.endswith("5.jpg"):
                    content[offset + size // 2 : offset + size] = bytes(size - size // 2)
            tar.write_bytes(content)
    return folder


def open_split(shards: Path, **options) -> TarSplit:
    sources = {"a": {"shards": str(shards / "a"), "weight": 2.0}, "b": {"shards": str(shards / "b")}}
    options = {"flip": True, "log_keys": True, "workers": 0, "cache_folder": str(shards / "cache")} | options
    return TarData(sources, **options).open(BucketList([[16, 24], [16, 36]]))


def same(one: Batch, other: Batch) -> bool:
    return (
        one.keys == other.keys
        and one.captions == other.captions
        and one.draws == other.draws
        and torch.equal(one.images, other.images)
        and torch.equal(one.crop, other.crop)
        and torch.equal(one.original_size, other.original_size)
        and torch.equal(one.fields["flip"], other.fields["flip"])
    )


@pytest.fixture(scope="module")
def reference(shards):
    """Twelve steps of all lanes in one process, and their records."""
    split = open_split(shards)
    loader = split.loader(split.plan(LANES, SLICE, seed=1), range(LANES))
    return [loader.step(step) for step in range(12)], loader.drain()


def test_the_reference_has_replacements_and_both_sources_and_buckets(reference):
    steps, records = reference
    assert len(records.quarantine) >= 3
    assert {line.source for line in records.keys} == {"a", "b"}
    assert {line.bucket for line in records.keys} == {"16x24", "16x36"}
    assert [(line.step, line.lane) for line in records.keys] == [(s, lane) for s in range(12) for lane in range(LANES)]
    assert [line.keys for line in records.keys] == [batch.keys for step in steps for batch in step]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_workers_gives_the_same_batches_and_records(shards, reference, workers):
    split = open_split(shards)
    loader = split.loader(split.plan(LANES, SLICE, seed=1), range(LANES), workers=workers)
    try:
        for step, expected in enumerate(reference[0]):
            assert all(map(same, loader.step(step), expected))
        assert loader.drain() == reference[1]
    finally:
        loader.close()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_split_of_the_lanes_gives_the_same_batches_and_records(shards, reference, world):
    split = open_split(shards)
    keys, quarantine = [], []
    for rank in range(world):
        lanes = lanes_of(rank, world, LANES)
        loader = split.loader(split.plan(LANES, SLICE, seed=1), lanes)
        for step, expected in enumerate(reference[0]):
            assert all(map(same, loader.step(step), expected[lanes.start : lanes.stop]))
        records = loader.drain()
        keys += records.keys
        quarantine += records.quarantine
    assert sorted(keys, key=lambda k: (k.step, k.lane)) == reference[1].keys
    assert sorted(quarantine, key=lambda q: (q.step, q.lane, q.slot)) == reference[1].quarantine


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_starts_at_any_step_and_jumps(shards, reference, workers):
    split = open_split(shards)
    loader = split.loader(split.plan(LANES, SLICE, seed=1), range(LANES), workers=workers)
    try:
        for step in (7, 8, 2, 11, 3, 4):
            assert all(map(same, loader.step(step), reference[0][step]))
        assert [line.step for line in loader.drain().keys[::LANES]] == [7, 8, 2, 11, 3, 4]
    finally:
        loader.close()


def test_a_batch_from_a_worker_takes_one_open_file(shards):
    split = open_split(shards)
    loader = split.loader(split.plan(LANES, SLICE, seed=1), range(LANES), workers=1)
    try:
        held = [loader.step(0)]
        before = len(list(Path("/proc/self/fd").iterdir()))
        held += [loader.step(step) for step in range(1, 11)]
        assert len(list(Path("/proc/self/fd").iterdir())) - before <= 10 * LANES
    finally:
        loader.close()


def test_loading_leaves_the_global_random_state_alone(shards):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for workers in (0, 1):
        loader = (split := open_split(shards)).loader(split.plan(LANES, SLICE, seed=1), range(1), workers=workers)
        loader.step(0)
        loader.close()
    assert torch.equal(torch.get_rng_state(), before)


def test_time_spent_waiting_is_counted(shards):
    loader = (split := open_split(shards)).loader(split.plan(LANES, SLICE, seed=1), range(LANES))
    start = time.perf_counter()
    for step in range(4):
        loader.step(step)
    elapsed = time.perf_counter() - start
    assert 0.9 * elapsed <= loader.waited <= elapsed
    loader = split.loader(split.plan(LANES, SLICE, seed=1), range(LANES), workers=1)
    try:
        loader.step(0)
        waited = loader.waited
        time.sleep(1.0)  # the next step is read meanwhile
        loader.step(1)
        assert loader.waited - waited < 0.5
    finally:
        loader.close()


def test_batches_pin_and_split_with_their_fields(reference):
    batch = reference[0][0][0]
    parts = batch.split(2)
    assert [len(part) for part in parts] == [2, 1]
    assert torch.equal(torch.cat([part.fields["flip"] for part in parts]), batch.fields["flip"])


def test_too_many_bad_samples_in_a_row_are_an_error(tmp_path):
    tar = write_shard(tmp_path / "0.tar", [sample(i) for i in range(16)])
    data = TarData({"s": {"shards": str(tar)}}, workers=0, max_bad_in_a_row=6, cache_folder=str(tmp_path / "cache"))
    split = data.open(BucketList([[16, 24]]))
    plan = split.plan(1, 16, seed=0)
    order = split.loader(plan, range(1)).step(0)[0].keys
    content = bytearray(tar.read_bytes())
    places = {name.removesuffix(".jpg"): (o, s) for name, o, s in members_of(tar)}

    def spoil(slots: range) -> None:
        for slot in slots:
            offset, size = places[order[slot]]
            content[offset : offset + size] = bytes(size)
        tar.write_bytes(content)

    spoil(range(3, 8))
    split.loader(plan, range(1)).step(0)
    spoil(range(8, 9))
    with pytest.raises(LoaderError, match=rf"6 samples in a row cannot be used.* the last is '{order[8]}' in .*0\.tar"):
        split.loader(plan, range(1)).step(0)


def test_an_error_in_a_worker_arrives_as_itself(tmp_path):
    tar = write_shard(tmp_path / "0.tar", [sample(i) for i in range(16)])
    data = TarData({"s": {"shards": str(tar)}}, workers=2, cache_folder=str(tmp_path / "cache"))
    split = data.open(BucketList([[16, 24]]))
    with tar.open("r+b") as file:
        file.truncate(1000)
    loader = split.loader(split.plan(2, 4, seed=0), range(2))
    with pytest.raises(StoreError, match=r"0\.tar"):
        loader.step(0)
    loader.close()


KILL = """
    import os, signal, sys
    from data.buckets import BucketList
    from data.tars import TarData

    data = TarData({{"a": {{"shards": "{shards}/a"}}}}, workers=2, cache_folder="{shards}/cache")
    split = data.open(BucketList([[16, 24]]))
    loader = split.loader(split.plan(4, 3, seed=1), range(4))
    loader.step(0)
    worker = loader._loader._iterator._workers[0]
    os.kill(worker.pid, signal.{signal})
    for step in range(1, {steps}):
        loader.step(step)
"""


def test_a_killed_worker_is_a_clear_error_and_never_a_hang(shards):
    code = textwrap.dedent(KILL.format(shards=shards, signal="SIGKILL", steps=10_000))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    # torch may also notice in the middle of whatever the process does at the time.
    assert "a data worker died before step" in done.stderr or "RuntimeError: DataLoader worker (pid" in done.stderr


def test_a_worker_goes_on_when_asked_to_stop_and_ends_with_its_process(shards):
    code = textwrap.dedent(KILL.format(shards=shards, signal="SIGTERM", steps=3))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_no_worker_outlives_its_loader(shards):
    split = open_split(shards)
    loader = split.loader(split.plan(LANES, SLICE, seed=1), range(LANES), workers=2)
    loader.step(0)
    pids = [worker.pid for worker in loader._loader._iterator._workers]
    loader.close()
    deadline = time.monotonic() + 20
    while any(_alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIG_DFL)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("workers", -1), ("prefetch", 0), ("max_bad_in_a_row", 0), ("block", 0), ("window", 0), ("concurrency", 0)),
        *(("max_pixels", 0), ("holdout", 1.0), ("holdout", -0.1)),
    ],
)
def test_senseless_numbers_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"data\.{name}={value}"):
        TarData({"a": {"shards": "anywhere"}}, **{name: value})


def test_a_weight_that_is_no_share_is_refused():
    for weight in (0.0, -1.0, 1e-9):
        with pytest.raises(ValueError, match=rf"weight {weight} of source 1"):
            TarData({"a": {"shards": "x"}, "b": {"shards": "y", "weight": weight}})
