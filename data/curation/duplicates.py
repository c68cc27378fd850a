"""Groups of samples that are the same, or look the same."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from data.curation.base import GlobalFilter, ShardColumns
from data.curation.groups import connect, gather, rank_groups
from data.curation.hamming import near_pairs


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
    """

    name = "duplicates"
    version = 2
    columns = pa.schema({"duplicate_group": pa.int64(), "duplicate_rank": pa.uint32()})

    def __init__(self, distance: int | None = 8, best: str | None = None) -> None:
        if distance is not None and not 0 <= distance < 32:
            raise ValueError(f"distance={distance} must be 0 to 31 bits, or null")
        self.distance, self.best = distance, best
        perceptual = ("phash", "phash_windows") if distance is not None else ()
        self.needs = ("content_hash", *perceptual, "width", "height", *((best,) if best else ()))

    def settings(self) -> dict[str, Any]:
        return {"distance": self.distance, "best": self.best}

    def score_all(self, shards: Sequence[ShardColumns]) -> Iterator[pa.Table]:
        tables = [shard.read(self.needs) for shard in shards]
        table = pa.concat_tables(tables, promote_options="permissive")
        order = [_numbers(table["width"]) * _numbers(table["height"])]
        if self.best is not None:
            kind = table[self.best].type
            if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
                raise ValueError(f"duplicates.best={self.best!r} is a column of {kind}, not of numbers")
            order.insert(0, _numbers(table[self.best]))
        first = np.arange(table.num_rows)
        connect(first, *_equal(table["content_hash"]))
        if self.distance is not None:
            connect(first, *_equal(table["phash"]))
            pairs = list(_alike(table["phash"], table["phash_windows"], self.distance))
            first = gather(first, order, *(np.concatenate(side) for side in zip(*pairs, strict=True)))
        groups = rank_groups(first, order)
        found = pa.table([pa.array(groups.first, mask=groups.alone), pa.array(groups.rank)], list(self.columns.names))
        start = 0
        for shard in shards:
            yield found.slice(start, shard.rows)
            start += shard.rows


def _equal(values: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours in a chain through all samples of one value; nulls equal nothing."""
    codes = values.dictionary_encode().combine_chunks().indices.to_numpy(zero_copy_only=False)
    order = np.argsort(codes, kind="stable")
    same = np.flatnonzero(codes[order][1:] == codes[order][:-1])  # null is NaN here, which equals nothing
    return order[same], order[same + 1]


def _alike(hashes: pa.ChunkedArray, windows: pa.ChunkedArray, distance: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of samples of which one's hash is near the other's, or near that of a window into the other; one sample
    stands for all that have its hash."""
    hashed = np.flatnonzero(hashes.is_valid().to_numpy())
    distinct, places = np.unique(hashes.drop_null().to_numpy(), return_index=True)
    first = hashed[places]
    for a, b in near_pairs(distinct, distinct, distance):
        yield first[a][a < b], first[b][a < b]
    listed = windows.combine_chunks()
    owner = np.repeat(np.arange(len(listed)), listed.value_lengths().fill_null(0).to_numpy(zero_copy_only=False))
    for a, b in near_pairs(listed.flatten().to_numpy(), distinct, distance):
        yield owner[a], first[b]


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    return column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
