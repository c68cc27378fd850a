"""Which samples of some selections go into which output shard, in which order, and which keys must change.

Samples have positions, those of one selection after those of another. An order takes slots to positions: itself, or a
pseudo-random permutation that is computed where it is needed. Shards are ranges of slots. Nothing that grows with the
number of samples is held in memory: sizes and key hashes lie in memory-mapped files while an order is made.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from data.cache import make_once
from data.hashing import mix64, permute, text64
from data.parquet import open_parquet, told_by
from data.selection import Selection
from data.store import Store, cache_root, redact
from data.tar_index import BLOCK

_VERSION = 1
_CHUNK = 1 << 20  # slots that are handled at once


@dataclass(frozen=True, eq=False)
class Order:
    """Slots 0 .. N - 1 in S shards. Pickles as what `Order.open` takes.

    Args:
        folder: where it is kept.
        starts: (sources + 1,) int64; positions of source i are starts[i] .. starts[i + 1] - 1.
        seed: of the permutation; None leaves samples in the selections' order.
        cuts: (S + 1,) int64; shard k holds the slots cuts[k] .. cuts[k + 1] - 1.
        repeated: sorted uint64 hashes of the keys that several samples have.
        fingerprint: of the samples and of everything said here.
    """

    folder: Path
    starts: np.ndarray
    seed: int | None
    cuts: np.ndarray
    repeated: np.ndarray
    fingerprint: str

    @classmethod
    def open(cls, folder: Path, fingerprint: str) -> "Order":
        """An order made before."""
        told = json.loads((folder / "order.json").read_text())
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("starts", "cuts", "repeated")}
        return cls(folder=folder, seed=told["seed"], fingerprint=fingerprint, **arrays)

    def __reduce__(self) -> tuple:
        return Order.open, (self.folder, self.fingerprint)

    @property
    def shards(self) -> int:
        """S."""
        return len(self.cuts) - 1

    def sizes(self) -> list[int]:
        """Samples of each shard."""
        return np.diff(self.cuts).tolist()

    def positions(self, shard: int) -> np.ndarray:
        """(n,) int64, the shard's samples in order."""
        return _positions(np.arange(self.cuts[shard], self.cuts[shard + 1]), int(self.cuts[-1]), self.seed)

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source index of each position, and the position within that source's selection."""
        source = np.searchsorted(self.starts, positions, side="right") - 1
        return source, positions - self.starts[source]

    def new_key(self, key: str, position: int) -> str:
        """The sample's key, unless others have it too: then with a dash and 16 hexadecimal digits behind it, which no
        other sample gets and which depend on all samples of the order."""
        hashed = np.uint64(text64(key))
        at = int(np.searchsorted(self.repeated, hashed))
        if at == len(self.repeated) or self.repeated[at] != hashed:
            return key
        return f"{key}-{mix64(text64(self.fingerprint), position):016x}"  # mix64 takes no two positions to one number


def make_order(
    selections: Sequence[Selection],
    store: Store,
    seed: int | None,
    samples: int,
    bytes: int | None = None,
    cache_folder: str | None = None,
) -> Order:
    """Cut selections into shards; from the cache if the same was asked for before.

    By number, shards have at most `samples` and differ by one at most. By bytes, there are as many shards as the
    samples' total is times `bytes`, rounded up, and they differ by no more than the largest sample, whose bytes are
    those of its members in a tar, headers and padding included.

    Args:
        selections: the samples.
        store: where their manifests lie.
        seed: of the shuffle; None keeps the selections' order.
        samples: of a shard, at most.
        bytes: of a shard, about; `samples` then means nothing.
        cache_folder: as in `select`.

    Raises:
        ValueError: a manifest was written anew since its rows were selected.
        StoreError: a store fails, or the cache folder cannot be written to.
    """
    if samples < 1 or (bytes is not None and bytes < 1):
        raise ValueError(f"samples_per_shard={samples} and bytes_per_shard={bytes} must be positive")
    told = {
        "version": _VERSION,
        "seed": seed,
        "samples": samples if bytes is None else None,
        "bytes": bytes,
        "selections": [selection.fingerprint for selection in selections],
    }
    fingerprint = xxhash.xxh3_128_hexdigest(json.dumps(told).encode())

    def write(empty: Path) -> None:
        _write(empty, selections, store, seed, samples, bytes)
        (empty / "order.json").write_text(json.dumps(told))

    folder = make_once(cache_root(cache_folder), f"orders/{fingerprint}", "order.json", write)
    return Order.open(folder, fingerprint)


def _write(
    folder: Path, selections: Sequence[Selection], store: Store, seed: int | None, samples: int, bytes: int | None
) -> None:
    starts = np.concatenate([[0], np.cumsum([len(selection) for selection in selections])]).astype(np.int64)
    count = int(starts[-1])
    hashes = np.lib.format.open_memmap(folder / "hashes", mode="w+", dtype=np.uint64, shape=(count,))
    sizes = np.lib.format.open_memmap(folder / "sizes", mode="w+", dtype=np.int64, shape=(count,))
    filled = 0
    for selection in selections:
        for shard in np.flatnonzero(np.diff(selection.shard_offsets)).tolist():
            table = _selected(selection, shard, store, ["key_hash", "sizes"])
            part = slice(filled, filled + table.num_rows)
            hashes[part] = table["key_hash"].to_numpy()
            sizes[part] = _tar_bytes(table["sizes"])
            filled = part.stop
    assert filled == count
    np.save(folder / "starts.npy", starts)
    np.save(folder / "cuts.npy", _cuts_by_bytes(folder, sizes, seed, bytes) if bytes else _cuts(count, samples))
    hashes.sort()
    np.save(folder / "repeated.npy", np.unique(hashes[1:][hashes[1:] == hashes[:-1]]))
    del hashes, sizes
    for name in ("hashes", "sizes", "bounds"):
        (folder / name).unlink(missing_ok=True)


def _selected(selection: Selection, shard: int, store: Store, columns: list[str]) -> pa.Table:
    """Columns of a shard's selected rows."""
    rows = selection.row[selection.shard_offsets[shard] : selection.shard_offsets[shard + 1]]
    url = selection.manifests[shard]
    with open_parquet(url, store) as file:
        if told_by(file).get("digest") != selection.digests[shard]:
            raise ValueError(f"{redact(url)} was written anew since its rows were selected: start again")
        return file.read(columns=columns, use_threads=False).take(pa.array(rows))


def _tar_bytes(sizes: pa.ChunkedArray) -> np.ndarray:
    """(rows,) int64, bytes of the members of each row in a tar, from their lists of sizes."""
    lists = sizes.combine_chunks()
    members = (lists.flatten().to_numpy() + 2 * BLOCK - 1) // BLOCK * BLOCK  # a header, and padded to whole blocks
    ends = np.concatenate([[0], np.cumsum(members)])
    places = lists.offsets.to_numpy() - lists.offsets[0].as_py()
    return ends[places[1:]] - ends[places[:-1]]


def _positions(slots: np.ndarray, count: int, seed: int | None) -> np.ndarray:
    return slots.astype(np.int64) if seed is None else permute(slots, count, seed)


def _cuts(count: int, samples: int) -> np.ndarray:
    shards = -(-count // samples)
    return np.array([k * count // shards for k in range(shards + 1)], dtype=np.int64)


def _cuts_by_bytes(folder: Path, sizes: np.ndarray, seed: int | None, bytes: int) -> np.ndarray:
    count = len(sizes)
    bounds = np.lib.format.open_memmap(folder / "bounds", mode="w+", dtype=np.int64, shape=(count + 1,))
    for start in range(0, count, _CHUNK):
        slots = np.arange(start, min(start + _CHUNK, count))
        bounds[slots + 1] = bounds[start] + np.cumsum(sizes[_positions(slots, count, seed)])
    return balanced_cuts(bounds, min(count, -(-int(bounds[-1]) // bytes)), int(sizes.max()))


def balanced_cuts(bounds: np.ndarray, parts: int, largest: int) -> np.ndarray:
    """Cut a row of items into consecutive parts whose sums differ by no more than the largest item.

    That this can always be done was shown by Barany and Grinberg ("Block partitions of sequences", 2015). Here: for a
    number t, let every part's sum be from t to t + largest. The first k parts can then end anywhere between low[k] and
    high[k], the ends that the smallest and the largest parts reach. The greatest t with low[parts] within the row has
    high[parts] at or beyond its end: were it not, still larger parts would fit. Going backwards from the row's end,
    each cut is then put where both its part and what lies before it are possible.

    Args:
        bounds: (n + 1,) integers, sums of the first 0, 1 .. n items, each of them positive.
        parts: how many.
        largest: item.

    Returns:
        (parts + 1,) int64, index of the first item of each part, and n.
    """
    count, total = len(bounds) - 1, int(bounds[-1])

    def reach(least: int) -> list[int] | None:
        """Where parts end that are as short as can be with a sum of at least this; None if the row is too short."""
        ends = [0]
        for _ in range(parts):
            end = int(np.searchsorted(bounds, bounds[ends[-1]] + least, side="left"))
            if end > count:
                return None
            ends.append(end)
        return ends

    fits, fails = 0, total // parts + 1
    while fails - fits > 1:
        middle = (fits + fails) // 2
        if reach(middle) is None:
            fails = middle
        else:
            fits = middle
    low = reach(fits)
    assert low is not None
    high = [0]
    for _ in range(parts):
        high.append(int(np.searchsorted(bounds, bounds[high[-1]] + fits + largest, side="right")) - 1)
    assert low[parts] <= count <= high[parts]
    cuts = [count]
    for k in range(parts - 1, -1, -1):
        end = int(bounds[cuts[-1]])
        earliest = int(np.searchsorted(bounds, end - fits - largest, side="left"))
        latest = int(np.searchsorted(bounds, end - fits, side="right")) - 1
        ideal = int(np.searchsorted(bounds, total * k // parts))
        cuts.append(min(max(ideal, earliest, low[k]), latest, high[k]))
    return np.array(cuts[::-1], dtype=np.int64)
