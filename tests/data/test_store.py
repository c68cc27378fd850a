"""The store on local files, a web server and an S3 server that are real, and on ones that are not there."""

import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import boto3
import numpy as np
import pyarrow as pa
import pytest
from moto.server import ThreadedMotoServer
from shard_files import sample, serve, write_shard

from data.index import ensure_indexed
from data.manifest_reader import ManifestReader
from data.ranged_file import RangedFile
from data.scores import write_scores
from data.selection import select
from data.store import Store, StoreError, redact, remove_leftovers

CONTENT = bytes(range(256)) * 64


@pytest.fixture(scope="module")
def s3():
    """Storage options and a client of an S3 server."""
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    os.environ.update(AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test", AWS_DEFAULT_REGION="us-east-1")
    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket="bucket")
    yield {"s3": {"endpoint_url": endpoint}}, client
    server.stop()


def test_patterns_stand_for_shards(tmp_path):
    for name in ["00000.tar", "00001.tar", "00002.tar", "00001.txt", "x/00000.tar", ".part.tar"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    store = Store()

    def names(*patterns: str) -> list[str]:
        found = store.expand([f"{tmp_path}/{p}" if ":" not in p else p for p in patterns])
        return [str(Path(url).relative_to(tmp_path)) for url in found]

    everything = ["00000.tar", "00001.tar", "00002.tar"]
    assert names("") == everything
    assert names("*.tar") == everything
    assert names("{00002,00000}.tar") == ["00002.tar", "00000.tar"]
    assert names("{00000..00002}.tar", "x") == [*everything, "x/00000.tar"]
    assert names("{00000,x/*}.tar") == ["00000.tar", "x/00000.tar"]
    assert store.expand(f"file://{tmp_path}/00001.tar") == [f"{tmp_path}/00001.tar"]


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        ([], "list of shard patterns is empty"),
        (["{}/none"], "matches no tar"),
        (["{}/*.tar"], "matches no tar"),
        (["{}"], "matches no tar"),
        (["{}/{{0..3"], "unbalanced braces|matches no tar"),
        (["pipe:cat {}/a.tar"], "allow_pipe=true"),
        (["nostore://a/b.tar"], "nostore"),
    ],
)
def test_mistaken_patterns_are_one_clear_sentence(tmp_path, patterns, words):
    store = Store(attempts=1)
    with pytest.raises(ValueError, match=words) as raised:
        urls = store.expand([p.format(tmp_path) for p in patterns])
        store.identity(urls[0])
    assert "\n" not in str(raised.value)


def test_a_shard_named_twice_is_refused(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"x")
    with pytest.raises(ValueError, match="named twice"):
        Store().expand([str(tmp_path), f"{tmp_path}/a.tar"])


def check_reading(store: Store, url: str) -> None:
    assert store.identity(url).size == len(CONTENT)
    for offset, size in [(0, 1), (0, len(CONTENT)), (1000, 7), (len(CONTENT) - 5, 5), (300, 0)]:
        assert store.read(url, offset, size) == CONTENT[offset : offset + size]
    with pytest.raises(StoreError, match=r"asked for bytes|416"):
        store.read(url, len(CONTENT) - 5, 6)
    assert b"".join(store.stream(url, 1000)) == store.read_all(url) == CONTENT
    file = store.open(url, block=100)
    assert (file.seek(-10, 2), file.read(), file.seek(250), file.read(20)) == (
        len(CONTENT) - 10,
        CONTENT[-10:],
        250,
        CONTENT[250:270],
    )
    again = pickle.loads(pickle.dumps(store))
    assert again.read(url, 5, 5) == CONTENT[5:10]


def test_local_files(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(CONTENT)
    store = Store()
    check_reading(store, str(path))
    before = store.identity(str(path))
    store.write(str(path), CONTENT[::-1])
    assert store.identity(str(path)) != before
    assert store.read(str(path), 0, 3) == CONTENT[::-1][:3]
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar"]


def test_more_local_files_than_are_kept_open(tmp_path):
    store = Store()
    for i in range(200):
        (tmp_path / f"{i}").write_bytes(bytes([i]))
    for _ in range(2):
        assert [store.read(f"{tmp_path}/{i}", 0, 1)[0] for i in range(200)] == list(range(200))
    ours = [p for p in Path("/proc/self/fd").iterdir() if str(p.resolve()).startswith(str(tmp_path))]
    assert len(ours) <= 128


def test_a_web_server(tmp_path):
    (tmp_path / "a.tar").write_bytes(CONTENT)
    (tmp_path / "b.tar").write_bytes(CONTENT)
    with serve(tmp_path) as server:
        store = Store(attempts=2)
        check_reading(store, f"{server.url}/a.tar")
        assert store.expand(f"{server.url}/{{a,b}}.tar") == [f"{server.url}/a.tar", f"{server.url}/b.tar"]
        assert store.expand(f"{server.url}/") == [f"{server.url}/a.tar", f"{server.url}/b.tar"]
        assert store.exists(f"{server.url}/a.tar")
        assert not store.exists(f"{server.url}/c.tar")
        before = store.identity(f"{server.url}/a.tar")
        os.utime(tmp_path / "a.tar", (1, 1))
        assert store.identity(f"{server.url}/a.tar") != before


def test_large_reads_are_cut_into_requests(tmp_path, monkeypatch):
    monkeypatch.setattr("data.store.LARGEST_READ", 1000)
    (tmp_path / "a.tar").write_bytes(CONTENT)
    with serve(tmp_path) as server:
        assert Store().read(f"{server.url}/a.tar", 10, 2500) == CONTENT[10:2510]
        assert [r for _, r in server.requests] == ["bytes=10-1009", "bytes=1010-2009", "bytes=2010-2509"]


def test_an_s3_server(s3):
    options, client = s3
    for name in ("one/a.tar", "one/b.tar", "one/c.txt"):
        client.put_object(Bucket="bucket", Key=name, Body=CONTENT)
    store = Store(options, attempts=2)
    check_reading(store, "s3://bucket/one/a.tar")
    expected = ["s3://bucket/one/a.tar", "s3://bucket/one/b.tar"]
    for pattern in ("s3://bucket/one", "s3://bucket/one/*.tar", "s3://bucket/one/{a,b}.tar"):
        assert store.expand(pattern) == expected
    store.write("s3://bucket/two/m.parquet", b"new")
    assert client.get_object(Bucket="bucket", Key="two/m.parquet")["Body"].read() == b"new"
    assert not store.exists("s3://bucket/one/z.tar")
    before = store.identity("s3://bucket/one/a.tar")
    client.put_object(Bucket="bucket", Key="one/a.tar", Body=CONTENT[::-1])
    assert store.identity("s3://bucket/one/a.tar") != before


def test_passing_faults_are_retried(tmp_path):
    (tmp_path / "a.tar").write_bytes(CONTENT)
    with serve(tmp_path) as server:
        server.failures = 2
        assert Store(attempts=3).read(f"{server.url}/a.tar", 0, 4) == CONTENT[:4]
        assert len(server.requests) == 3


def test_missing_files_are_not_asked_for_again(tmp_path):
    with serve(tmp_path) as server:
        with pytest.raises(StoreError, match=r"none\.tar"):
            Store(attempts=5).read(f"{server.url}/none.tar", 0, 4)
        assert len(server.requests) == 1
    with pytest.raises(StoreError, match=r"none\.tar.*FileNotFound"):
        Store().identity(f"{tmp_path}/none.tar")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize("ask", [lambda s, u: s.read(u, 0, 4), lambda s, u: s.identity(u), lambda s, u: s.exists(u)])
def test_nobody_there_is_a_clear_error_soon(ask):
    endpoint = f"http://127.0.0.1:{free_port()}"
    for store, url in (
        (Store(attempts=2, timeout=3), f"{endpoint}/a.tar"),
        (
            Store({"s3": {"endpoint_url": endpoint, "key": "x", "secret": "x"}}, attempts=2, timeout=3),
            "s3://bucket/a.tar",
        ),
    ):
        started = time.perf_counter()
        with pytest.raises(StoreError, match=r"a\.tar.* after 2 attempts"):
            ask(store, url)
        assert time.perf_counter() - started < 10


def test_a_server_that_accepts_and_says_nothing_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        held = []
        thread = threading.Thread(target=lambda: held.extend(listener.accept() for _ in range(2)), daemon=True)
        thread.start()
        started = time.perf_counter()
        with pytest.raises(StoreError, match="after 2 attempts"):
            Store(attempts=2, timeout=1).read(f"http://127.0.0.1:{listener.getsockname()[1]}/a.tar", 0, 4)
        assert time.perf_counter() - started < 10
        for connection, _ in held:
            connection.close()


def test_stores_work_in_a_forked_process(tmp_path):
    (tmp_path / "a.tar").write_bytes(CONTENT)
    with serve(tmp_path) as server:
        store = Store(attempts=1)
        url = f"{server.url}/a.tar"
        assert store.read(url, 0, 4) == CONTENT[:4]
        child = os.fork()
        if child == 0:
            os._exit(0 if store.read(url, 4, 4) == CONTENT[4:8] else 1)
        assert os.waitpid(child, 0)[1] == 0


def test_pipes_run_only_when_allowed(tmp_path):
    (tmp_path / "a.tar").write_bytes(CONTENT)
    mark = tmp_path / "ran"
    url = f"pipe:touch {mark}; cat {tmp_path}/a.tar"
    with pytest.raises(ValueError, match="allow_pipe"):
        Store(cache_folder=str(tmp_path / "cache")).read(url, 0, 4)
    assert not mark.exists()
    check_reading(Store(allow_pipe=True, cache_folder=str(tmp_path / "cache")), url)
    with pytest.raises(StoreError, match=r"status 3.*gone"):
        Store(allow_pipe=True, cache_folder=str(tmp_path / "cache")).identity("pipe:echo gone >&2; exit 3")


def test_errors_tell_no_secrets():
    url = f"http://user:password@127.0.0.1:{free_port()}/a.tar?X-Amz-Signature=secret"
    with pytest.raises(StoreError) as raised:
        Store(attempts=1, timeout=2).read(url, 0, 4)
    assert "password" not in str(raised.value)
    assert "secret" not in str(raised.value)
    assert redact(url).endswith("/a.tar?...")


FULL_DISK = """
import resource, signal, sys
from data.index import ensure_indexed
from data.selection import select
from data.store import Store, StoreError
store = Store()
manifests = ensure_indexed(store.expand(sys.argv[1]), store)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))  # every write beyond 20 bytes fails, as on a full disk
for write in (
    lambda: store.write(sys.argv[1] + "/new", bytes(1000)),
    lambda: select(manifests, store, cache_folder=sys.argv[1] + "/cache"),
):
    try:
        write()
    except StoreError as error:
        sys.stdout.write(str(error)[:20000] + chr(10))
"""


def test_a_full_disk_is_a_clear_error_and_leaves_no_half_written_file(tmp_path):
    write_shard(tmp_path / "a.tar", [sample(i) for i in range(3)])
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stderr
    assert f"{tmp_path}/new" in lines[0]
    assert "too large" in lines[0]
    assert f"cannot write to {tmp_path}/cache/selections" in lines[1]
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert files == ["a.manifest.parquet", "a.tar"]


def test_a_bucket_is_indexed_beside_its_shards_and_selected_from(s3, tmp_path):
    options, client = s3
    shard = write_shard(tmp_path / "a.tar", [sample(i) for i in range(6)])
    client.put_object(Bucket="bucket", Key="set/a.tar", Body=shard.read_bytes())
    store = Store(options, attempts=2)
    manifests = ensure_indexed(store.expand("s3://bucket/set"), store)
    assert [m.url for m in manifests] == ["s3://bucket/set/a.manifest.parquet"]
    assert ensure_indexed(store.expand("s3://bucket/set"), store) == manifests
    write_scores(manifests[0], "motion", pa.table({"motion": np.arange(6.0)}), store)
    selection = select(manifests, store, "motion >= quantile(0.5)", cache_folder=str(tmp_path))
    assert selection.locate(range(len(selection))) == [(0, 2), (0, 3), (0, 4), (0, 5)]
    reader = ManifestReader(store, selection.manifests, selection.digests)
    values = reader.rows(0, [3], ["key", "motion", "extensions", "offsets", "sizes"])
    assert (values["key"], values["motion"]) == (["000003"], [3.0])
    member = values["extensions"][0].index("jpg")
    read = store.read(selection.shards[0], values["offsets"][0][member], values["sizes"][0][member])
    assert read == sample(3)["jpg"]


def test_reading_on_within_a_block_asks_once():
    asked = []
    file = RangedFile(
        lambda offset, size: asked.append((offset, size)) or CONTENT[offset : offset + size], len(CONTENT), 1000
    )
    assert [file.pread(o, 100) for o in (0, 500, 900)] == [CONTENT[o : o + 100] for o in (0, 500, 900)]
    assert file.part(200, 50).read() == CONTENT[200:250]
    assert asked == [(0, 1000)]
    file.pread(5000, 100)
    assert asked == [(0, 1000), (5000, 1000)]


def test_a_composed_file_appears_whole_or_not_at_all(s3, tmp_path):
    options, _ = s3
    store = Store(options)
    for url in (str(tmp_path / "new" / "a.tar"), "s3://bucket/composed/a.tar"):
        with pytest.raises(ZeroDivisionError), store.composing(url) as path:
            path.write_bytes(b"half")
            raise ZeroDivisionError
        assert not path.exists() and not store.exists(url)
        with store.composing(url) as path:
            path.write_bytes(b"whole")
            assert not store.exists(url)
        assert not path.exists() and store.read_all(url) == b"whole"


def test_leftovers_of_dead_processes_are_removed_and_no_others(tmp_path):
    code = (
        "import os, sys; from data.store import Store;"
        "c = Store().composing(sys.argv[1]); c.__enter__().write_bytes(b'half'); os.kill(os.getpid(), 9)"
    )
    target = str(tmp_path / "a.tar")
    subprocess.run([sys.executable, "-P", "-c", code, target], check=False)
    (tmp_path / ".hidden.tar").touch()
    with Store().composing(target) as path:
        path.write_bytes(b"whole")
        assert len(list(tmp_path.iterdir())) == 3
        remove_leftovers(str(tmp_path))
        assert sorted(tmp_path.iterdir()) == sorted([path, tmp_path / ".hidden.tar"])
    assert (tmp_path / "a.tar").read_bytes() == b"whole"
