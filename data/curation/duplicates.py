"""Groups of samples that are the same, or look the same."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from conf.errors import ConfigError
from data.curation.base import GlobalFilter, ShardColumns
from data.curation.groups import connect, gather, rank_groups
from data.curation.hamming import HammingIndex
from data.curation.scratch import scratch_folder
from data.store import cache_root
from data.tasks import Task, Tasks, run_tasks
from data.tracking import RunLog

_HASH, _WINDOWS = "phash", "phash_windows"


class Duplicates(GlobalFilter):
    """`duplicate_group`: the same number for all samples of a group, null for one that is alone; and `duplicate_rank`:
    0 for the best of each group and for those alone, so that `duplicate_rank = 0` keeps one of each.

    Two samples are duplicates if their files are equal, or if the perceptual hash of one picture is near that of the
    other or of a window into it. Groups are gathered around the best samples: one that is dropped is a duplicate of the
    one that is kept in its place, or the same as a duplicate of it, and no chain of likenesses grows beyond that.

    A distance of 8 finds crops of up to 8 % of the sides, together with resizing and strong JPEG compression; one of 10
    reaches 10 %. Of random hashes one pair in 3.6 * 10**9 is within 8 bits, and two pictures compare 21 pairs: the more
    samples, the smaller the distance should be. Icons of one style on plain ground lie that near without being equal.

    Needs the columns of `content_hash` and `perceptual_hash`.

    Args:
        distance: bits in which perceptual hashes may differ; null: only equal files are duplicates.
        best: the column whose largest value is best; null: the most pixels. Ties go to more pixels, then to the first.
        scratch: folder for an index of the hashes, some 36 bytes a sample; the user's cache folder if null.
    """

    name = "duplicates"
    version = 2
    columns = pa.schema({"duplicate_group": pa.int64(), "duplicate_rank": pa.uint32()})

    def __init__(self, distance: int | None = 8, best: str | None = None, scratch: str | None = None) -> None:
        if distance is not None and not 0 <= distance < 32:
            raise ValueError(f"distance={distance} must be 0 to 31 bits, or null")
        self.distance, self.best, self.scratch = distance, best, scratch
        perceptual = (_HASH, _WINDOWS) if distance is not None else ()
        self.needs = ("content_hash", *perceptual, "width", "height", *((best,) if best else ()))

    def settings(self) -> dict[str, Any]:
        return {"distance": self.distance, "best": self.best}

    def score_all(
        self, shards: Sequence[ShardColumns], tasks: int = 1, log: RunLog | None = None
    ) -> Iterator[pa.Table]:
        starts = np.cumsum([0, *(shard.rows for shard in shards)]).tolist()
        read = [column for column in self.needs if column != _WINDOWS]
        table = pa.concat_tables([shard.read(read) for shard in shards], promote_options="permissive")
        order = [_numbers(table["width"]) * _numbers(table["height"])]
        if self.best is not None:
            kind = table[self.best].type
            if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
                raise ConfigError(f"duplicates.best={self.best!r} is a column of {kind}, not of numbers")
            order.insert(0, _numbers(table[self.best]))
        first = np.arange(table.num_rows)
        connect(first, *_equal(table["content_hash"]))
        if self.distance is not None:
            connect(first, *_equal(table[_HASH]))
            with scratch_folder(cache_root(self.scratch), self.name) as folder:
                _write_index(folder, table[_HASH], first, self.distance)
                del table
                shared = Tasks(tasks)
                work = partial(_search, folder, shards, starts)
                run_tasks(work, shared, shared.totals([shard.rows for shard in shards]), self.name, log)
                pairs = np.concatenate([np.load(folder / f"pairs-{i}.npy") for i in range(len(shards))])
            first = gather(first, order, *np.divmod(pairs, len(first)))
        groups = rank_groups(first, order)
        found = pa.table([pa.array(groups.first, mask=groups.alone), pa.array(groups.rank)], list(self.columns.names))
        for start, shard in zip(starts, shards, strict=False):
            yield found.slice(start, shard.rows)


def _equal(values: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours in a chain through all samples of one value; nulls equal nothing."""
    codes = values.dictionary_encode().combine_chunks().indices.to_numpy(zero_copy_only=False)
    order = np.argsort(codes, kind="stable")
    same = np.flatnonzero(codes[order][1:] == codes[order][:-1])  # null is NaN here, which equals nothing
    return order[same], order[same + 1]


def _write_index(folder: Path, hashes: pa.ChunkedArray, first: np.ndarray, distance: int) -> None:
    """Index the distinct hashes. Of each one the first sample of its group, and of each sample, are told."""
    hashed = np.flatnonzero(hashes.is_valid().to_numpy())
    distinct, places = np.unique(hashes.drop_null().to_numpy(), return_index=True)
    HammingIndex(distinct, distance).save(folder)
    np.save(folder / "first-of-hash.npy", first[hashed[places]])
    np.save(folder / "first.npy", first)


def _search(folder: Path, shards: Sequence[ShardColumns], starts: Sequence[int], task: Task) -> None:
    """Write which groups are alike: a hash of one's member, or of a window into it, is near that of one of the other.
    A pair of groups is written as a number, its first samples' a * N + b. A task's share are its shards' samples."""
    index = HammingIndex.load(folder)
    first, first_of_hash = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("first", "first-of-hash"))
    for i in task.own(range(len(shards))):
        table = shards[i].read([_HASH, _WINDOWS])
        own = table[_HASH].combine_chunks()
        windows = table[_WINDOWS].combine_chunks()
        counts = windows.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        rows = np.concatenate([np.flatnonzero(own.is_valid()), np.repeat(np.arange(len(windows)), counts)])
        queries = np.concatenate([own.drop_null().to_numpy(), windows.flatten().to_numpy()])
        owners = np.asarray(first[starts[i] : starts[i + 1]])[rows]
        found: list[np.ndarray] = [np.zeros(0, np.int64)]
        for query, near in index.search(queries):
            group, other = owners[query], first_of_hash[near]
            apart = group != other
            found.append(np.unique(group[apart] * len(first) + other[apart]))  # below 2**63
        np.save(folder / f"pairs-{i}.npy", np.unique(np.concatenate(found)))
        task.advance(shards[i].rows)


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    return column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
