"""The `index` job: reads tar headers once and writes each shard's manifest.

Finished shards are skipped, so that a job that was stopped goes on where it was.
"""

import logging
import multiprocessing
import os
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field

from pydantic import PositiveInt
from tqdm import tqdm

from conf.errors import mistakes
from data.describe import describe, verify_shard
from data.hashing import text64
from data.manifest import Checksum, Manifest, manifest_url, read_manifest, write
from data.progress import counted
from data.store import Store, redact

log = logging.getLogger(__name__)

SHARDS_PER_PROCESS = 4
"""Fewer than this many shards per process are not worth starting it."""


@dataclass
class Config:
    """What `millrace index` takes.

    Args:
        shards: patterns (see `Store.expand`).
        manifest_folder: where manifests go; beside the shards if null.
        checksum: also compute a checksum of every member, which reads every byte.
        verify: read every byte again and hold it against the checksums of the manifests there are; writes nothing.
        processes: that work at once; by default as many as there are cores, at most 16.
        strict: fail when anything is wrong with a shard.
        store: where the shards lie.
    """

    shards: str | list[str]
    manifest_folder: str | None = None
    checksum: Checksum | None = None
    verify: bool = False
    processes: PositiveInt | None = None
    strict: bool = False
    store: Store = field(default_factory=Store)


def run(config: Config) -> list[Manifest]:
    """Index (or verify) the shards, then print a summary and what is broken.

    Raises:
        ConfigError: no shards; no place for manifests; no checksums to verify.
        ValueError: damage, under `strict` or `verify`.
        StoreError: a store fails.
    """
    from conf.schema import build

    store: Store = build(config.store) if not isinstance(config.store, Store) else config.store
    patterns = [config.shards] if isinstance(config.shards, str) else list(config.shards)
    processes = config.processes or min(len(os.sched_getaffinity(0)), 16)
    started = time.perf_counter()
    with mistakes():
        shards = store.expand(patterns)
        if config.verify:
            damaged = verify(shards, store, config.manifest_folder)
        else:
            manifests = ensure_indexed(shards, store, config.manifest_folder, config.checksum, processes)
    if config.verify:
        print("\n".join(damaged) or f"{len(shards)} shards: every member's checksum is right")
        if damaged:
            raise ValueError(f"{len(damaged)} members differ from their checksums (listed above)")
        return []
    print(report(manifests, time.perf_counter() - started))
    if config.strict and any(m.problem_counts for m in manifests):
        raise ValueError("there are problems with the shards (listed above), and strict=true")
    return manifests


def ensure_indexed(
    shards: Sequence[str],
    store: Store,
    folder: str | None = None,
    checksum: Checksum | None = None,
    processes: int = 1,
) -> list[Manifest]:
    """The manifests of all shards, in order; shards without one, or changed since, are indexed now.

    Any number of processes and machines may call this at once on the same shards: each starts at another shard, takes
    what others have finished in the meantime, and files appear whole or not at all.

    Args:
        shards: URLs, as `Store.expand` gives them.
        store: where they lie.
        folder: where manifests go; beside the shards if None.
        checksum: also compute checksums of all members (reads every byte).
        processes: how many work at once. More than one are spawned, so the caller's main module must be importable.

    Raises:
        ValueError: no shards, or no place to write manifests to.
        StoreError: a store fails.
    """
    if not shards:
        raise ValueError("no shards to index")
    jobs = [(shard, manifest_url(shard, store, folder), store, checksum) for shard in shards]
    with ThreadPoolExecutor(16) as pool:
        done = list(
            tqdm(pool.map(lambda job: _up_to_date(*job), jobs), "manifests", len(jobs), disable=None, leave=False)
        )
    missing = [i for i, manifest in enumerate(done) if manifest is None]
    if missing:
        log.info("indexing %d of %d shards, the first is %s", len(missing), len(shards), redact(shards[missing[0]]))
        first = text64(f"{socket.gethostname()} {os.getpid()}") % len(missing)
        due = {i: jobs[i] for i in missing[first:] + missing[:first]}
        for i, manifest in counted(_index_all(due, processes), len(due), "index", "shard"):
            done[i] = manifest
            for problem in manifest.problems[:3]:
                log.warning("%s: %s: %s", redact(manifest.shard), problem.kind, problem.detail)
    return [manifest for manifest in done if manifest is not None]


def index_shard(shard: str, url: str, store: Store, checksum: Checksum | None = None) -> Manifest:
    """The shard's manifest: the one there is if it is up to date, else a new one."""
    manifest = _up_to_date(shard, url, store, checksum)
    if manifest is not None:
        return manifest
    table, identity, problems = describe(shard, store, checksum)
    return write(table, shard, identity, problems, store, url, checksum)


def verify(shards: Sequence[str], store: Store, folder: str | None = None) -> list[str]:
    """A line for each member whose bytes are not those of its checksum, or that is not where it was.

    Raises:
        ValueError: a shard has no manifest, or one without checksums.
    """
    damaged = []
    for shard in counted(shards, len(shards), "verify", "shard"):
        url = manifest_url(shard, store, folder)
        manifest = read_manifest(shard, url, store)
        if manifest is None or manifest.checksum is None:
            raise ValueError(f"{redact(shard)} has no checksums: index it with checksum=xxh128 first")
        damaged += [f"{redact(shard)}: {line}" for line in verify_shard(manifest, store)]
    return damaged


def report(manifests: Sequence[Manifest], seconds: float) -> str:
    """What there is and what is broken, for people."""
    rows = sum(m.rows for m in manifests)
    lines = [f"{len(manifests)} shards, {rows} samples, {seconds:.1f} s"]
    counts: Counter[str] = Counter()
    for manifest in manifests:
        counts.update(dict(manifest.problem_counts))
    if counts:
        lines.append("problems: " + ", ".join(f"{kind} ({count})" for kind, count in counts.most_common()))
    for manifest in manifests:
        lines += [f"  {redact(manifest.shard)}: {p.kind}: {p.detail}" for p in manifest.problems[:10]]
        more = sum(count for _, count in manifest.problem_counts) - 10
        if more > 0:
            lines.append(f"  {redact(manifest.shard)}: and {more} more")
    return "\n".join(lines)


def _up_to_date(shard: str, url: str, store: Store, checksum: Checksum | None) -> Manifest | None:
    """The manifest there is, if it describes the shard as it is now and holds what is asked for."""
    manifest = read_manifest(shard, url, store)
    if manifest is None or manifest.identity != str(store.identity(shard)):
        return None
    return manifest if checksum in (None, manifest.checksum) else None


def _index_all(jobs: dict[int, tuple], processes: int) -> Iterator[tuple[int, Manifest]]:
    """(position, manifest) of each job, as they are finished."""
    processes = min(processes, len(jobs) // SHARDS_PER_PROCESS)
    if processes <= 1:
        for i, job in jobs.items():
            yield i, index_shard(*job)
    else:
        # Spawned, not forked: the caller may hold threads, connections and a GPU.
        pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))
        try:
            futures = {pool.submit(index_shard, *job): i for i, job in jobs.items()}
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)
