"""The index job, as users run it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from shard_files import members_of, sample, serve, write_shard

from conf.errors import ConfigError
from data.index import Config, ensure_indexed, run
from data.store import Store, StoreError


def job(*overrides: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tools.cli", "index", *overrides]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def write_shards(folder: Path, count: int, size: int = 5) -> list[Path]:
    return [write_shard(folder / f"{s:05d}.tar", [sample(s * 1000 + i) for i in range(size)]) for s in range(count)]


def manifests_of(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in folder.glob("*.manifest.parquet")}


def test_the_job_indexes_in_several_processes_and_skips_what_is_done(tmp_path):
    shards = write_shards(tmp_path, 9)
    done = job(f"shards={tmp_path}", "processes=2")
    assert done.returncode == 0, done.stderr
    assert "9 shards, 45 samples" in done.stdout
    before = manifests_of(tmp_path)
    assert len(before) == 9
    write_shard(shards[3], [sample(i) for i in range(7)])
    again = job(f"shards='{tmp_path}/{{00000..00008}}.tar'")
    assert "9 shards, 47 samples" in again.stdout
    after = manifests_of(tmp_path)
    assert [name for name in after if after[name] != before[name]] == ["00003.manifest.parquet"]


def test_the_job_reports_what_is_broken_and_fails_only_under_strict(tmp_path):
    shards = write_shards(tmp_path, 2)
    content = shards[1].read_bytes()
    shards[1].write_bytes(content[: len(content) // 2])
    (tmp_path / "00002.tar").write_bytes(b"")
    done = job(f"shards={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "problems: truncated (2)" in done.stdout
    assert f"{shards[1]}: truncated: " in done.stdout
    strict = job(f"shards={tmp_path}", "strict=true")
    assert strict.returncode == 1
    assert "strict=true" in strict.stderr


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["shards={}/none"], "matches no tar"),
        (["shards=[]"], "list of shard patterns is empty"),
        (["shards=pipe:ls"], "allow_pipe=true"),
        (["shards={}", "checksum=md5"], "checksum"),
        (["shards={}", "store.atempts=3"], "atempts"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, overrides, words):
    write_shards(tmp_path, 1)
    done = job(*[o.format(tmp_path) for o in overrides])
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_store_that_fails_is_no_mistake_in_the_command(tmp_path):
    gone = job("shards=http://127.0.0.1:9/a.tar", f"manifest_folder={tmp_path}", "store.attempts=1", "processes=1")
    assert gone.returncode == 1
    assert gone.stderr.splitlines()[-1].startswith("millrace: http://127.0.0.1:9/a.tar: ")


def test_verify_finds_the_flipped_byte_and_its_member(tmp_path, capsys):
    shards = write_shards(tmp_path, 3)
    with pytest.raises(ConfigError, match="no checksums"):
        run(Config(str(tmp_path), verify=True))
    run(Config(str(tmp_path), checksum="xxh128", processes=1))
    run(Config(str(tmp_path), verify=True))
    assert "3 shards: every member's checksum is right" in capsys.readouterr().out
    name, offset, size = members_of(shards[1])[4]
    content = bytearray(shards[1].read_bytes())
    content[offset + size // 2] ^= 4
    shards[1].write_bytes(content)
    with pytest.raises(ValueError, match="1 members differ"):
        run(Config(str(tmp_path), verify=True))
    assert f"{shards[1]}: {name} at byte {offset} differs" in capsys.readouterr().out


def test_a_killed_job_goes_on_where_it_was(tmp_path):
    write_shards(tmp_path, 30, 120)
    command = [sys.executable, "-m", "tools.cli", "index", f"shards={tmp_path}", "processes=1"]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(manifests_of(tmp_path)) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    before = manifests_of(tmp_path)
    assert 3 <= len(before) < 30
    manifests = ensure_indexed(Store().expand(str(tmp_path)), Store())
    assert sum(m.rows for m in manifests) == 30 * 120
    after = manifests_of(tmp_path)
    assert {name: after[name] for name in before} == before


def test_the_web_is_indexed_into_a_folder(tmp_path):
    write_shards(tmp_path / "web", 2)
    with serve(tmp_path / "web") as server:
        pattern = f"{server.url}/{{00000..00001}}.tar"
        with pytest.raises(ConfigError, match="manifest_folder"):
            run(Config(pattern))
        found = run(Config(pattern, manifest_folder=f"{tmp_path}/m", processes=1))
        assert [m.rows for m in found] == [5, 5]
        asked = len(server.requests)
        assert run(Config(pattern, manifest_folder=f"{tmp_path}/m", processes=1)) == found
        assert len(server.requests) == asked
    with pytest.raises(StoreError, match=r"00000\.tar"):
        ensure_indexed([f"{server.url}/00000.tar"], Store(attempts=1, timeout=2), f"{tmp_path}/m")
