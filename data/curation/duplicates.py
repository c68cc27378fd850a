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
from data.curation.hashes import COLORS
from data.curation.scratch import scratch_folder
from data.store import cache_root
from data.tasks import Task, Tasks, run_tasks
from data.tracking import RunLog

_HASH, _COLORS = "phash", "phash_colors"
_OF_WINDOWS = "phash_windows", "phash_window_colors"
_COMPARED = 1 << 17  # colours that are compared at once


class Duplicates(GlobalFilter):
    """`duplicate_group`: the same number for all samples of a group, null for one that is alone; and `duplicate_rank`:
    0 for the best of each group and for those alone, so that `duplicate_rank = 0` keeps one of each.

    Two samples are duplicates if their files are equal, or if the perceptual hash of one picture is near that of the
    other or of a window into it, and their colours are alike. Groups are gathered around the best samples: one that is
    dropped is a duplicate of the one that is kept in its place, or the same as a duplicate of it, and no chain of
    likenesses grows beyond that.

    A distance of 8 finds crops of up to 8 % of the sides, together with resizing and strong JPEG compression; one of 10
    reaches 10 %. Of random hashes one pair in 3.6 * 10**9 is within 8 bits, and two pictures compare 21 pairs: among
    10**6 pictures some 3,000 pairs are near by chance, and colours tell nearly all of them apart. What differs in
    details alone (skin tones, hands of a clock, small signs on one ground) counts as the same.

    Needs the columns of `content_hash` and `perceptual_hash`.

    Args:
        distance: bits in which perceptual hashes may differ; null: only equal files are duplicates.
        colors: grey levels by which the mean colours of 4 x 4 fields may differ, root mean square; null: by any.
        best: the column whose largest value is best; null: the most pixels. Ties go to more pixels, then to the first.
        scratch: folder for an index of the hashes, some 100 bytes a sample; the user's cache folder if null.
    """

    name = "duplicates"
    version = 3
    columns = pa.schema({"duplicate_group": pa.int64(), "duplicate_rank": pa.uint32()})

    def __init__(
        self,
        distance: int | None = 8,
        colors: float | None = 16.0,
        best: str | None = None,
        scratch: str | None = None,
    ) -> None:
        if distance is not None and not 0 <= distance < 32:
            raise ValueError(f"distance={distance} must be 0 to 31 bits, or null")
        if colors is not None and colors < 1:
            raise ValueError(f"colors={colors} must be at least 1 grey level, or null")
        self.distance, self.colors, self.best, self.scratch = distance, colors, best, scratch
        perceptual = (_HASH, _COLORS, *_OF_WINDOWS) if distance is not None else ()
        self.needs = ("content_hash", *perceptual, "width", "height", *((best,) if best else ()))

    def settings(self) -> dict[str, Any]:
        return {"distance": self.distance, "colors": self.colors, "best": self.best}

    def score_all(
        self, shards: Sequence[ShardColumns], tasks: int = 1, log: RunLog | None = None
    ) -> Iterator[pa.Table]:
        starts = np.cumsum([0, *(shard.rows for shard in shards)]).tolist()
        read = [column for column in self.needs if column not in _OF_WINDOWS]
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
            with scratch_folder(cache_root(self.scratch), self.name) as folder:
                looks = table.select([_HASH, _COLORS])
                del table
                _write_index(folder, looks, first, self.distance, self.colors)
                shared = Tasks(tasks)
                work = partial(_search, folder, shards, starts, self.colors)
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


def _write_index(folder: Path, looks: pa.Table, first: np.ndarray, distance: int, colors: float | None) -> None:
    """Put samples of one hash and nearly one colouring together, and index what is left: the hashes, their colours and
    the first samples of their groups. The first sample of each one's group is written, too."""
    hashed = np.flatnonzero(looks[_HASH].is_valid().to_numpy())
    hashes = looks[_HASH].drop_null().to_numpy()
    seen = _as_array(looks[_COLORS].drop_null().combine_chunks())
    # Two numbers of one class differ by less than the step: so does the root mean square.
    classes = seen // min(int(colors), 255) if colors is not None else np.zeros_like(seen)
    factors = np.random.default_rng(0).integers(1 << 63, size=COLORS, dtype=np.uint64)
    mixed = hashes.copy()
    for classed, factor in zip(classes.T, factors, strict=True):
        mixed += classed * factor  # modulo 2**64, hardly ever the same for two colourings
    _, places, which = np.unique(mixed, return_index=True, return_inverse=True)
    connect(first, hashed, hashed[places][which])
    HammingIndex(hashes[places], distance).save(folder)
    np.save(folder / "colors.npy", seen[places])
    np.save(folder / "first-of-hash.npy", first[hashed[places]])
    np.save(folder / "first.npy", first)


def _search(
    folder: Path, shards: Sequence[ShardColumns], starts: Sequence[int], colors: float | None, task: Task
) -> None:
    """Write which groups are alike: a hash of one's member, or of a window into it, is near that of one of the other,
    and the colours are. A pair of groups is written as a number, its first samples' a * N + b. A task's share are its
    shards' samples."""
    index = HammingIndex.load(folder)
    first, first_of_hash, colors_of_hash = (
        np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("first", "first-of-hash", "colors")
    )
    for i in task.own(range(len(shards))):
        queries, seen, rows = _looks(shards[i])
        owners = np.asarray(first[starts[i] : starts[i + 1]])[rows]
        found: list[np.ndarray] = [np.zeros(0, np.int64)]
        for query, near in index.search(queries):
            group, other = owners[query], first_of_hash[near]
            alike = group != other
            if colors is not None:
                alike[alike] = _same_colors(seen, query[alike], colors_of_hash, near[alike], colors)
            found.append(np.unique(group[alike] * len(first) + other[alike]))  # below 2**63
        np.save(folder / f"pairs-{i}.npy", np.unique(np.concatenate(found)))
        task.advance(shards[i].rows)


def _looks(shard: ShardColumns) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of all pictures of a shard and then of all windows into them: hashes (n,) uint64, colours (n, 48) uint8, and rows
    (n,) of the pictures."""
    table = shard.read([_HASH, _COLORS, *_OF_WINDOWS])
    own, colors, windows, window_colors = (table[name].combine_chunks() for name in (_HASH, _COLORS, *_OF_WINDOWS))
    counts = windows.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    return (
        np.concatenate([own.drop_null().to_numpy(), windows.flatten().to_numpy()]),
        np.concatenate([_as_array(colors.drop_null()), _as_array(window_colors.flatten())]),
        np.concatenate([np.flatnonzero(own.is_valid()), np.repeat(np.arange(len(windows)), counts)]),
    )


def _as_array(colors: pa.Array) -> np.ndarray:
    """(n, 48) uint8 of n binary values, none of them null."""
    offset = colors.offset * COLORS
    return np.frombuffer(colors.buffers()[1] or b"", np.uint8, len(colors) * COLORS, offset).reshape(-1, COLORS)


def _same_colors(a: np.ndarray, of_a: np.ndarray, b: np.ndarray, of_b: np.ndarray, limit: float) -> np.ndarray:
    """Whether the colours a[of_a[i]] and b[of_b[i]] differ by at most the limit, root mean square."""
    found = np.empty(len(of_a), bool)
    for start in range(0, len(of_a), _COMPARED):
        part = slice(start, start + _COMPARED)
        apart = a[of_a[part]].astype(np.int32) - b[of_b[part]]
        found[part] = (apart**2).mean(1) <= limit**2
    return found


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    return column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
