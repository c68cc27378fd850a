"""The `index` job: reads tar headers once and writes each shard's manifest."""

import logging
from collections.abc import Iterator, Sequence

from data.manifest import Checksum, Manifest, build, manifest_url, read_manifest, write
from data.store import Store

log = logging.getLogger(__name__)


def ensure_indexed(
    shards: Sequence[str],
    store: Store,
    folder: str | None = None,
    checksum: Checksum | None = None,
    processes: int | None = None,
) -> list[Manifest]:
    """The manifests of all shards, in order; shards without one, or changed since, are indexed now.

    Any number of processes and machines may call this at once on the same shards: each starts at another shard, takes
    what others have finished in the meantime, and files appear whole or not at all.

    Args:
        shards: URLs, as `Store.expand` gives them.
        store: where they lie.
        folder: where manifests go; beside the shards if None.
        checksum: also compute checksums of all members (reads every byte).
        processes: how many work at once; by default as many as there are cores, at most 16.

    Raises:
        ValueError: no shards, or no place to write manifests to.
        StoreError: a store fails.
    """
    if not shards:
        raise ValueError("no shards to index")
    jobs = [(shard, manifest_url(shard, store, folder), store, checksum) for shard in shards]
    done: list[Manifest | None] = [None] * len(jobs)
    for i, manifest in _run_all(jobs, processes):
        done[i] = manifest
    return [m for m in done if m is not None]


def index_shard(shard: str, url: str, store: Store, checksum: Checksum | None = None) -> Manifest:
    """The shard's manifest: the one there is if it is up to date, else a new one."""
    manifest = read_manifest(shard, url, store)
    if manifest is not None and manifest.identity == str(store.identity(shard)):
        if checksum is None or manifest.checksum == checksum:
            return manifest
    table, identity, problems = build(shard, store, checksum)
    return write(table, shard, identity, problems, store, url, checksum)


def _run_all(jobs: list[tuple], processes: int | None) -> Iterator[tuple[int, Manifest]]:
    for i, job in enumerate(jobs):
        yield i, index_shard(*job)
