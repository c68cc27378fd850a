"""Kills, damage, full disks and hostile files: an older whole checkpoint is always found, and nothing is executed."""

import contextlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.trainer.checkpoint.layouts import random_cut, shards_of, wrong
from tests.trainer.ranks import Ranks, ranks
from trainer.checkpoint import Checkpointer, CheckpointError, CheckpointPolicy, Record, load_weights, storage
from trainer.checkpoint import checkpointer as checkpointer_module
from trainer.checkpoint import format as files

SHAPES = {"net.a": (512, 300), "exp_avg/net.a": (512, 300), "ema.0.99/net.a": (512, 300), "net.b": (7,)}
KEEP_ALL = CheckpointPolicy(keep_last=None)


def cut_for(world: int):
    return random_cut(random.Random("kill"), SHAPES, world)


def state(step: int | None):
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return shards_of(SHAPES, cut_for(world), rank, step)


def save_steps(folder: Path, steps: list[int], policy: CheckpointPolicy = KEEP_ALL) -> None:
    checkpointer = policy.build(folder)
    for step in steps:
        checkpointer.save(Record(step=step), state(step))
    checkpointer.wait()


def load_latest(folder: Path) -> tuple[int, list[str]]:
    """Step of the newest whole checkpoint, after checking every number of it; and why newer ones were refused."""
    checkpointer = Checkpointer(folder)
    found = checkpointer.latest()
    if found.path is None:
        return 0, found.refused
    shards = state(None)
    record = checkpointer.load(found.path, shards, verify=False)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    assert wrong(SHAPES, cut_for(world), rank, shards, record.step) == []
    return record.step, found.refused


def save_without_end(folder: Path) -> None:
    """Resume, then save step after step until killed."""
    step, _ = load_latest(folder)
    checkpointer = CheckpointPolicy(keep_last=2).build(folder)
    while True:
        step += 1
        checkpointer.save(Record(step=step), state(step))


@pytest.mark.slow
@pytest.mark.parametrize("victims", [1, 2])
def test_a_whole_checkpoint_is_found_whenever_ranks_are_killed(tmp_path, victims):
    rng = random.Random(victims)
    last, unfinished = 0, 0
    for _ in range(6):
        group = Ranks(2)
        killer = threading.Thread(target=kill_amid_saves, args=(group, victims, tmp_path, rng.uniform(0, 0.3)))
        killer.start()
        with pytest.raises(RuntimeError):
            group.run(save_without_end, tmp_path)
        killer.join()
        begun = newest_step(tmp_path)
        step, refused = ranks(2).run(load_latest, tmp_path)[0]
        assert step >= max(last, begun - 1), f"step {step} after {begun} had begun: {refused}"
        last, unfinished = step, unfinished + bool(refused)
    assert unfinished, "every kill fell between two saves: the test shows nothing"


def kill_amid_saves(group: Ranks, victims: int, folder: Path, delay: float) -> None:
    before, until = newest_step(folder), time.time() + 120
    while newest_step(folder) < before + 2 and time.time() < until:
        time.sleep(0.005)
    time.sleep(delay)
    for process in group._processes[:victims]:
        os.kill(process.pid, signal.SIGKILL)


def newest_step(folder: Path) -> int:
    return max((files.step_of(path) for path in files.step_folders(folder)), default=0)


@pytest.mark.parametrize("victim", ["__0_0.distcp", "__1_1.distcp", ".metadata", "index.json", "checkpoint.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_file_is_named_and_the_older_checkpoint_chosen(saved_on_two, victim, damage):
    file = saved_on_two / "step_00000030" / victim
    content = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content if damage == "flip" else content[:-1])
    for step, refused in ranks(2).run(load_latest, saved_on_two):
        assert step == 20
        assert len(refused) == 1 and str(file) in refused[0]


@pytest.mark.parametrize("content", [b"", b'{"format": 1, "fil', b'{"format": 9, "files": {}}', b"[]", b"\xff\xfe"])
def test_a_damaged_commit_is_refused(saved_on_two, content):
    (saved_on_two / "step_00000030" / files.COMMIT_FILE).write_bytes(content)
    assert ranks(2).run(load_latest, saved_on_two)[0][0] == 20


def test_load_checks_the_files_that_it_reads(saved_on_two):
    path = saved_on_two / "step_00000030"
    for file in path.glob("__*"):
        content = bytearray(file.read_bytes())
        content[-100] ^= 4
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"distcp is damaged"):
        Checkpointer(saved_on_two).load(path, state(None))
    with pytest.raises(CheckpointError, match=r"distcp is damaged"):
        load_weights(path, "net")


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    assert load_latest(tmp_path / "nothing") == (0, [])
    with pytest.raises(CheckpointError, match="no directory"):
        load_weights(tmp_path / "step_00000001", "net")


def test_an_unfinished_save_of_the_same_step_is_replaced(tmp_path):
    save_steps(tmp_path, [10, 20])
    (tmp_path / "step_00000020" / files.COMMIT_FILE).unlink()
    (tmp_path / "step_00000020" / "__9_9.distcp").write_bytes(b"left over")
    assert load_latest(tmp_path)[0] == 10
    save_steps(tmp_path, [20])
    assert load_latest(tmp_path) == (20, [])
    assert not (tmp_path / "step_00000020" / "__9_9.distcp").exists()


def test_the_state_may_change_while_it_is_written(tmp_path):
    checkpointer = KEEP_ALL.build(tmp_path)
    shards = state(10)
    checkpointer.save(Record(step=10), shards)
    for shard in shards:
        shard.tensor.fill_(7)
    checkpointer.wait()
    assert load_latest(tmp_path)[0] == 10


def test_a_save_that_gets_on_counts_as_alive_and_one_that_is_stuck_does_not(tmp_path, monkeypatch):
    """Each write waits for leave, which a sign of life gives to the next."""
    leave, looked, beats = threading.Semaphore(5), threading.Semaphore(0), []
    write, bytes_in = storage._Sink.write, files.bytes_in

    def write_with_leave(sink, data):
        leave.acquire()
        written = write(sink, data)
        sink._file.flush()
        return written

    def look(path):
        looked.release()
        return bytes_in(path)

    def alive():
        beats.append(time.monotonic())
        leave.release()

    monkeypatch.setattr(storage._Sink, "write", write_with_leave)
    monkeypatch.setattr(files, "bytes_in", look)
    monkeypatch.setattr(checkpointer_module, "_POLL_S", 0.01)
    checkpointer = Checkpointer(tmp_path, KEEP_ALL, alive)
    checkpointer.save(Record(step=10), state(10))
    checkpointer.wait()
    assert len(beats) > 10
    assert load_latest(tmp_path)[0] == 10

    stuck = Checkpointer(tmp_path, KEEP_ALL, lambda: beats.append(0.0))
    while leave.acquire(blocking=False):
        pass
    beats.clear()
    stuck.save(Record(step=20), state(20))
    waiting = threading.Thread(target=stuck.wait)
    waiting.start()
    for _ in range(20):
        looked.acquire()
    assert beats == []
    leave.release(10_000)
    waiting.join()


def test_pruning_keeps_the_last_and_every_nth(tmp_path):
    save_steps(tmp_path, list(range(10, 100, 10)), CheckpointPolicy(keep_last=2, keep_every=30))
    assert [files.step_of(path) for path in files.step_folders(tmp_path)] == [90, 80, 60, 30]


def test_pruning_touches_only_committed_older_ones(tmp_path):
    save_steps(tmp_path, [10, 20, 30, 90])
    (tmp_path / "step_00000010" / files.COMMIT_FILE).unlink()
    save_steps(tmp_path, [40], CheckpointPolicy(keep_last=1))
    assert [files.step_of(path) for path in files.step_folders(tmp_path)] == [90, 40, 10]


def limited_save(folder: Path, limit: int) -> str:
    """Save step 20 where rank 1 can write no file of more than `limit` bytes; the error."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that a write fails instead
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpointer = KEEP_ALL.build(folder)  # before the limit, as the group's rendezvous is a file too
    try:
        if dist.get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        checkpointer.save(Record(step=20), state(20))
        checkpointer.wait()
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return ""


def test_a_write_that_fails_on_one_rank_is_an_error_on_all(tmp_path):
    ranks(2).run(save_steps, tmp_path, [10])
    for message in ranks(2).run(limited_save, tmp_path, 10_000):
        assert "step_00000020/__1_" in message and "File too large" in message
    assert not (tmp_path / "step_00000020").exists()
    assert ranks(2).run(load_latest, tmp_path)[0] == (10, [])


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_is_an_error_that_names_the_path_and_older_checkpoints_stay(small_disk):
    save_steps(small_disk, [10])  # 1.8 MB of state
    checkpointer = KEEP_ALL.build(small_disk)
    checkpointer.save(Record(step=20), state(20))
    checkpointer.save(Record(step=30), state(30))  # waits for step 20, and starts one that cannot fit
    with pytest.raises(CheckpointError, match=r"step_00000030.*No space left on device"):
        checkpointer.save(Record(step=40), state(40))
    assert load_latest(small_disk) == (20, [])
    shutil.rmtree(small_disk / "step_00000010")
    checkpointer.save(Record(step=40), state(40))
    checkpointer.wait()
    assert load_latest(small_disk) == (40, [])


class Malicious:
    def __init__(self, trap: Path) -> None:
        self.trap = trap

    def __reduce__(self):
        return os.system, (f"touch {self.trap}",)


def recommit(path: Path, name: str) -> None:
    """Make a changed file part of the commit: an adversary can compute checksums."""
    digests = files.committed_files(path)
    digests[name] = files.digest_of(path / name)
    files.commit(path, digests)


def test_a_pickle_in_place_of_the_metadata_is_never_loaded(tmp_path):
    save_steps(tmp_path, [10])
    path, trap = tmp_path / "step_00000010", tmp_path / "trap"
    (path / ".metadata").write_bytes(pickle.dumps(Malicious(trap)))
    assert load_latest(tmp_path)[0] == 0, "its checksum is wrong"
    recommit(path, ".metadata")
    assert load_latest(tmp_path)[0] == 10, "with a right one it is simply not opened"
    load_weights(path, "net")
    assert not trap.exists()


def test_a_pickle_in_place_of_a_chunk_is_refused(tmp_path):
    save_steps(tmp_path, [10])
    path, trap = tmp_path / "step_00000010", tmp_path / "trap"
    torch.save(Malicious(trap), path / "__0_0.distcp")
    size = (path / "__0_0.distcp").stat().st_size
    index = json.loads((path / files.INDEX_FILE).read_text())
    for tensor in index["tensors"].values():
        tensor["chunks"] = [[*chunk[:2], "__0_0.distcp", 0, size] for chunk in tensor["chunks"]]
    (path / files.INDEX_FILE).write_text(json.dumps(index))
    recommit(path, "__0_0.distcp")
    recommit(path, files.INDEX_FILE)
    with pytest.raises(CheckpointError, match="refused"):
        load_weights(path, "net")
    with contextlib.suppress(CheckpointError):
        load_latest(tmp_path)
    assert not trap.exists()


def test_only_the_files_of_what_is_asked_for_are_read(tmp_path):
    save_steps(tmp_path, [10])
    path = tmp_path / "step_00000010"
    index = json.loads((path / files.INDEX_FILE).read_text())["tensors"]
    for file in {chunk[2] for name in index if "/" in name for chunk in index[name]["chunks"]}:
        (path / file).unlink()  # moments and averages
    assert set(load_weights(path, "net")) == {"a", "b"}
    with pytest.raises(CheckpointError, match="missing"):
        load_weights(path, "net", ema="0.99")


def test_unknown_networks_and_lengths_are_answered_with_what_there_is(tmp_path):
    save_steps(tmp_path, [10])
    path = tmp_path / "step_00000010"
    with pytest.raises(
        CheckpointError, match=r"no weights of 'unet': it holds the networks net and the EMA lengths 0\.99"
    ):
        load_weights(path, "unet")
    with pytest.raises(CheckpointError, match=r"no EMA '0\.5' of 'net'"):
        load_weights(path, "net", ema="0.5")


@pytest.mark.parametrize("wrong_value", [{"every": 0}, {"keep_last": 0}, {"keep_every": -1}])
def test_policies_that_cannot_be_are_refused(wrong_value):
    with pytest.raises(ValueError, match=next(iter(wrong_value))):
        CheckpointPolicy(**wrong_value)


@pytest.fixture
def saved_on_two(tmp_path):
    ranks(2).run(save_steps, tmp_path, [10, 20, 30])
    return tmp_path
