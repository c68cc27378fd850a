"""The job in tasks, killed, and on an object store: always the same bytes."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.manifest import manifest_url, read_manifest
from data.store import Store
from tests.data.packing.packed import contents, photo, run, tars, write_sources
from tests.data.shard_files import sample, write_shard

ROOT = Path(__file__).parents[3]


def test_tasks_and_arrays_of_tasks_give_the_same_bytes(tmp_path, monkeypatch):
    overrides = [*write_sources(tmp_path), "samples_per_shard=8", "short_side=12"]
    assert run(f"out={tmp_path / 'one'}", *overrides) == 0
    monkeypatch.setattr("data.pack.ROWS_HELD", 10)  # of one shard at a time
    for task in (2, 0, 1):
        assert not (tmp_path / "array" / "sizes.json").exists()
        assert run(f"out={tmp_path / 'array'}", "cluster.tasks=3", f"cluster.task={task}", *overrides) == 0
    assert contents(tmp_path / "array") == contents(tmp_path / "one")
    assert run(f"out={tmp_path / 'two'}", "cluster.tasks=2", *overrides) == 0
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    deleted = tars(tmp_path / "two")[1]
    deleted.unlink()
    assert run(f"out={tmp_path / 'two'}", *overrides) == 0
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.slow
def test_killed_at_random_moments_and_run_again_it_ends_with_the_same_bytes(tmp_path):
    made = [sample(i) | {"jpg": photo(700, 500, i)} for i in range(60)]
    write_shard(tmp_path / "in" / "0.tar", made)
    overrides = [f"data.sources.x.shards={tmp_path / 'in'}", "samples_per_shard=4", "short_side=300"]
    assert run(f"out={tmp_path / 'whole'}", *overrides) == 0
    expected = contents(tmp_path / "whole")
    out = tmp_path / "out"
    command = [sys.executable, "-P", "-m", "tools.cli", "pack", "log.wandb=null", f"out={out}", *overrides]
    rng = random.Random(0)
    kills = 0
    for tasks in (1, 2, 1):
        goal = len(list(out.glob("*"))) + rng.randint(1, 18) if out.exists() else rng.randint(1, 18)
        process = subprocess.Popen(
            [*command, f"cluster.tasks={tasks}"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        while process.poll() is None and (not out.exists() or len(list(out.iterdir())) < goal):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        for path in out.glob("[0-9]*") if out.exists() else ():
            assert path.read_bytes() == expected[path.name][0]  # whole, whatever the moment
    assert kills >= 2
    assert run(f"out={out}", *overrides) == 0
    assert contents(out) == expected


def test_a_bucket_is_packed_from_and_to(tmp_path):
    import boto3
    from moto.server import ThreadedMotoServer

    overrides = [*write_sources(tmp_path), "samples_per_shard=20"]
    assert run(f"out={tmp_path / 'local'}", *overrides) == 0
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    try:
        client = boto3.client(
            "s3", endpoint_url=endpoint, aws_access_key_id="x", aws_secret_access_key="x", region_name="us-east-1"
        )
        client.create_bucket(Bucket="bucket")
        for path in sorted(tmp_path.glob("[ab]/*.tar")):
            client.put_object(Bucket="bucket", Key=str(path.relative_to(tmp_path)), Body=path.read_bytes())
        remote = [o.replace(str(tmp_path), "s3://bucket") for o in overrides]
        options = f"data.storage_options={{s3: {{endpoint_url: '{endpoint}', key: x, secret: x}}}}"
        assert run("out=s3://bucket/out/", *remote, options) == 0
        names = {o["Key"]: o["ETag"] for o in client.list_objects_v2(Bucket="bucket", Prefix="out/")["Contents"]}
        for name, (content, _) in contents(tmp_path / "local").items():
            body = client.get_object(Bucket="bucket", Key=f"out/{name}")["Body"].read()
            assert body == content or name.endswith(".manifest.parquet")  # which names the state of its shard
        assert run("out=s3://bucket/out/", *remote, options) == 0
        assert {
            o["Key"]: o["ETag"] for o in client.list_objects_v2(Bucket="bucket", Prefix="out/")["Contents"]
        } == names
        store = Store({"s3": {"endpoint_url": endpoint, "key": "x", "secret": "x"}})
        url = "s3://bucket/out/00000.tar"
        manifest = read_manifest(url, manifest_url(url, store), store)
        assert manifest is not None and manifest.identity == str(store.identity(url))
    finally:
        server.stop()
