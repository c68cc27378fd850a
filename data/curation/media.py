"""Samples of a shard for filters: read in large ranges, in batches, the next one while this one is scored."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from data.clips import is_clips
from data.curation.base import Kind, Media
from data.manifest import Manifest
from data.media_size import media_member
from data.parquet import open_parquet
from data.store import Store

LARGEST_GAP = 256 << 10
"""Bytes between two wanted members that are rather read than skipped with a request of their own."""
LARGEST_RANGE = 32 << 20
"""Bytes read at once."""
LARGEST_BATCH = 128 << 20
"""Bytes of pictures and clips in a batch of more than one sample."""


def read_media(
    manifest: Manifest, store: Store, columns: Sequence[str], kinds: frozenset[Kind], side: int, batch: int
) -> Iterator[list[Media]]:
    """All samples of a shard, in order, in batches.

    Args:
        manifest: of the shard.
        store: where it lies.
        columns: manifest columns for `Media.row`; None where the shard has no such column.
        kinds: media whose bytes are read.
        side: see `Media.image`.
        batch: samples at a time, fewer where they are large. What a batch holds does not depend on `kinds` and
            `columns`: a model that rounds differently in other batches gives the same scores in any company.

    Raises:
        StoreError: the store fails.
    """
    with open_parquet(manifest.url, store) as file:
        own = [name for name in columns if name in file.schema_arrow.names]
        span = ["start_frame", "end_frame"] if is_clips(manifest) else []
        table = file.read(
            columns=[*dict.fromkeys(["key", "extensions", "offsets", "sizes", *span, *own])], use_threads=False
        )

    held: dict[tuple[int, int], bytes] = {}  # of the batch before, the last one read: the next may be of the same video

    def load(part: slice) -> list[Media]:
        rows = table.slice(part.start, part.stop - part.start).to_pylist()
        chosen = [media_member(row["extensions"]) for row in rows]
        places = {
            i: (rows[i]["offsets"][member[0]], rows[i]["sizes"][member[0]])
            for i, member in enumerate(chosen)
            if member is not None and member[1] in kinds
        }
        missing = [place for place in dict.fromkeys(places.values()) if place not in held]
        held.update(zip(missing, read_ranges(manifest.shard, store, missing), strict=True))
        data = {i: held[place] for i, place in places.items()}
        for place in list(held)[:-1]:
            del held[place]
        return [
            Media(
                row["key"],
                {name: row.get(name) for name in columns},
                member and member[1],
                data.get(i, b""),
                side,
                (row["start_frame"], row["end_frame"]) if span else None,
            )
            for i, (row, member) in enumerate(zip(rows, chosen, strict=True))
        ]

    parts = _batches(table, batch)
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(load, parts[0]) if parts else None
        for following in [*parts[1:], None]:
            if ahead is None:
                return
            samples = ahead.result()
            ahead = pool.submit(load, following) if following is not None else None
            yield samples


def _batches(table: pa.Table, batch: int) -> list[slice]:
    """Where batches begin and end. Clips of one video follow each other and share its bytes."""
    parts, start, total = [], 0, 0
    before: tuple[int, int] | None = None
    for row, (extensions, offsets, sizes) in enumerate(
        zip(*(table[name].to_pylist() for name in ("extensions", "offsets", "sizes")), strict=True)
    ):
        member = media_member(extensions)
        place = (offsets[member[0]], sizes[member[0]]) if member is not None else None
        size = place[1] if place is not None else 0
        added = size if place != before else 0
        if row > start and (row - start == batch or (added and total + added > LARGEST_BATCH)):
            parts.append(slice(start, row))
            start, total, added = row, 0, size
        total += added
        before = place
    return [*parts, slice(start, table.num_rows)] if table.num_rows else []


def read_ranges(shard: str, store: Store, places: Sequence[tuple[int, int]]) -> list[bytes]:
    """The bytes at each (offset, size), with few requests: neighbours are read together.

    Raises:
        StoreError: the store fails.
    """
    found: list[bytes] = [b""] * len(places)
    order = sorted(range(len(places)), key=lambda i: places[i])
    while order:
        begin, size = places[order[0]]
        end, together = begin + size, [order[0]]
        for i in order[1:]:
            offset, size = places[i]
            if offset - end > LARGEST_GAP or max(end, offset + size) - begin > LARGEST_RANGE:
                break
            end = max(end, offset + size)
            together.append(i)
        data = store.read(shard, begin, end - begin)
        for i in together:
            offset, size = places[i]
            found[i] = data[offset - begin : offset - begin + size]
        order = order[len(together) :]
    return found
