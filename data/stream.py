"""The endless streams of one source, one per bucket, from which slices are cut: computable at any point.

Bucket b's stream is the bucket's N_b rows of epoch 0, then those of epoch 1 in another order, and so on for ever. Slice
j of bucket b is elements [j * m, (j + 1) * m) of it. So no row is lost or repeated, at most m - 1 rows per bucket wait
for the next epoch, and how many do is known in closed form: e * N_b mod m. What a first-in-first-out queue per bucket
would hold anywhere within an epoch is likewise a count modulo m, hence a prefix sum and not a replay.

Order within an epoch: blocks of consecutive rows are permuted, every `window` blocks of the permutation form a window,
and rows are shuffled within their window. Reads thus stay local while slices mix `window` distant places.

Everything random is an integer hash of (seed, purpose, epoch, row or block or slice).
"""

import bisect
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property

import numpy as np

from data.compiled import PADDING, Compiled
from data.hashing import mix64, text64

_BLOCK, _ROW, _SLICE = text64("plan/block"), text64("plan/row"), text64("plan/slice")
_BUCKET_SHIFT = np.uint64(56)
_EPOCHS_KEPT = 3  # the one being served, the one before (lanes cross at different moments) and the next


class EpochOrder:
    """The order of one epoch: which blocks each window holds, and its rows shuffled. Cheap: one sort of the blocks.

    Args:
        compiled: the selection.
        seed: of the source.
        epoch: which epoch.
        window: blocks in a window.
    """

    def __init__(self, compiled: Compiled, seed: int, epoch: int, window: int) -> None:
        self.compiled, self.seed, self.epoch = compiled, seed, epoch
        blocks, self.block = compiled.bucket.shape
        self._last_block = blocks - 1
        self.window = min(window, blocks)
        self.windows = -(-blocks // self.window)
        self.permutation = _shuffled(blocks, mix64(seed, _BLOCK, epoch))
        self._place_bits = np.uint64((self.window * self.block - 1).bit_length())
        self._places = np.arange(self.window * self.block, dtype=np.uint64)
        self._in_block = np.arange(self.block, dtype=np.int64)

    def counts(self) -> np.ndarray:
        """(windows, buckets) unsigned, rows of each bucket in each window."""
        histogram = self.compiled.histogram
        dtype = np.min_scalar_type(self.window * self.block)
        total = np.zeros((self.windows, histogram.shape[1]), dtype=dtype)
        for i in range(self.window):
            nth = self.permutation[i :: self.window]
            total[: len(nth)] += histogram[nth]  # the last window may lack blocks
        return total

    def rows(self, window: int) -> np.ndarray:
        """(n,) int64, the window's rows, by bucket and within a bucket in stream order."""
        blocks = self.permutation[window * self.window : (window + 1) * self.window]
        bucket = self.compiled.bucket[blocks].ravel()
        rows = (blocks[:, None] * self.block + self._in_block).ravel()
        keys = self._keys(rows, self._places[: len(rows)])
        keys |= bucket.astype(np.uint64) << _BUCKET_SHIFT
        keys.sort()
        keys &= (np.uint64(1) << self._place_bits) - np.uint64(1)
        if blocks.max() == self._last_block:  # the only one with padding, which sorts behind all buckets
            keys = keys[: np.count_nonzero(bucket != PADDING)]
        return rows[keys.view(np.int64)]

    def bucket_rows(self, bucket: int, windows: np.ndarray) -> np.ndarray:
        """(n,) int64, one bucket's rows of several windows (given in ascending order), in stream order."""
        position = (windows[:, None] * self.window + np.arange(self.window)).ravel()
        position = position[position < len(self.permutation)]
        blocks = self.permutation[position]
        holding = self.compiled.histogram[blocks, bucket] > 0
        blocks, position = blocks[holding], position[holding]
        at, offset = np.nonzero(self.compiled.bucket[blocks] == bucket)
        rows = blocks[at] * self.block + offset
        window, slot = np.divmod(position[at], self.window)
        keys = self._keys(rows, (slot * self.block + offset).astype(np.uint64))
        return rows[np.lexsort((keys, window))]

    def first(self, bucket: int, count: int) -> np.ndarray:
        """(count,) the first rows of the bucket's stream in this epoch."""
        return self.bucket_rows(bucket, np.arange(self._reach(bucket, count, self.permutation)))[:count]

    def last(self, bucket: int, count: int) -> np.ndarray:
        """(count,) the last rows of the bucket's stream in this epoch."""
        reach = self._reach(bucket, count, self.permutation[::-1])
        # The last window may lack blocks, so that as many blocks from the end may touch one window more.
        return self.bucket_rows(bucket, np.arange(max(0, self.windows - reach - 1), self.windows))[-count:]

    def _reach(self, bucket: int, count: int, blocks: np.ndarray) -> int:
        """How many whole windows' worth of the leading `blocks` surely hold `count` rows of the bucket."""
        reach = 4
        while reach < self.windows:
            if self.compiled.histogram[blocks[: reach * self.window], bucket].sum() >= count:
                return reach
            reach *= 4
        return self.windows

    def _keys(self, rows: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Keys that sort a window's rows: a hash of the row, then the place in the window, which makes them unique.

        The hash is of the row itself, not of its place: however a row is come by, its key is the same. The top byte
        is left to the bucket.
        """
        keys = mix64(self.seed, _ROW, self.epoch, rows)
        assert isinstance(keys, np.ndarray)
        keys >>= self._place_bits + np.uint64(8)
        keys <<= self._place_bits
        keys |= places
        return keys


class EpochTables:
    """Prefix sums over the windows of one epoch: where each slice that lies wholly within the epoch is.

    Args:
        order: of the epoch.
        carry: (buckets,) rows of each bucket that the last epoch left over.
        slice_size: m.
    """

    def __init__(self, order: EpochOrder, carry: np.ndarray, slice_size: int) -> None:
        self.order, self.size = order, slice_size
        # Coordinates of bucket b: [0, carry) are the last epoch's rows, [carry, carry + N_b) this one's. The slice that
        # holds carried rows is served ahead of all windows, hence skipped here.
        self._skip = (carry > 0).astype(np.int64)
        counts = order.counts()
        end = int((carry + order.compiled.totals).max())
        dtype = np.uint32 if end < 2**32 else np.int64
        self._until = np.empty((len(carry), order.windows + 1), dtype=dtype)  # C[b, w]: coordinate where w begins
        self._slices = np.zeros(order.windows + 1, dtype=np.int64)  # T[w]: slices complete before w
        for bucket, until in enumerate(self._until):
            until[0] = carry[bucket]
            np.cumsum(counts[:, bucket], dtype=dtype, out=until[1:])
            until[1:] += until[0]
            complete = until // dtype(slice_size)
            if carry[bucket]:
                complete = np.maximum(complete, 1) - dtype(1)
            self._slices += complete

    def __len__(self) -> int:
        return int(self._slices[-1])

    def at(self, index: int) -> tuple[int, np.ndarray]:
        """Bucket and (m,) rows of the index-th slice."""
        window = self._window_of(index)
        buckets, slices = self._completed(window, self._bounds(window))
        which = index - self._slices[window]
        bucket, start = int(buckets[which]), int(slices[which]) * self.size
        return bucket, self._cut(bucket, start, start + self.size)

    def walk(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """Buckets and (m,) rows of the slices [start, stop), one window sorted at a time."""
        buckets = len(self._until)
        waiting = np.zeros((buckets, self.size), dtype=np.int64)  # rows of each bucket's incomplete slice
        known = np.zeros(buckets, dtype=bool)  # whether the incomplete slice lies within the windows walked
        for window in range(self._window_of(start), self.order.windows):
            before, after = self._bounds(window)
            first, done, used = before // self.size, after // self.size - before // self.size, before % self.size
            # Lay out, for each bucket, the slices that complete here and the one that does not yet; the rows that
            # wait come first, then the window's.
            line = np.cumsum(done + 1) - (done + 1)
            layout = np.empty((buckets + int(done.sum()), self.size), dtype=np.int64)
            layout[line] = waiting
            counts = after - before
            shift = line * self.size + used - (np.cumsum(counts) - counts)
            rows = self.order.rows(window)
            layout.reshape(-1)[np.arange(len(rows)) + np.repeat(shift, counts)] = rows
            for bucket in np.flatnonzero((done > 0) & (used > 0) & ~known & (first >= self._skip)):
                begin = int(first[bucket]) * self.size
                layout[line[bucket], : used[bucket]] = self._cut(int(bucket), begin, int(before[bucket]))
            known |= done > 0
            waiting = layout[line + done]

            which, slices = self._completed(window, (before, after))
            ready = layout[line[which] + slices - first[which]]
            begin = int(self._slices[window])
            part = slice(max(0, start - begin), stop - begin)
            yield from zip(which[part].tolist(), ready[part], strict=True)
            if begin + len(ready) >= stop:
                return

    def _window_of(self, index: int) -> int:
        return int(np.searchsorted(self._slices, index, side="right")) - 1

    def _bounds(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        """(buckets,) int64 coordinates where the window begins and where it ends."""
        return self._until[:, window].astype(np.int64), self._until[:, window + 1].astype(np.int64)

    def _completed(self, window: int, bounds: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """(n,) bucket and (n,) number within the bucket's epoch of the slices that complete in a window, as served."""
        begin = np.maximum(bounds[0] // self.size, self._skip)
        count = np.maximum(bounds[1] // self.size - begin, 0)
        bucket = np.repeat(np.arange(len(count)), count)
        number = np.arange(len(bucket)) + np.repeat(begin - (np.cumsum(count) - count), count)
        order = np.argsort(mix64(self.order.seed, _SLICE, self.order.epoch, bucket, number), kind="stable")
        return bucket[order], number[order]

    def _cut(self, bucket: int, start: int, stop: int) -> np.ndarray:
        """(stop - start,) rows of the bucket at coordinates [start, stop), all of this epoch."""
        until = self._until[bucket]
        begin = int(np.searchsorted(until, until.dtype.type(start), side="right")) - 1
        end = int(np.searchsorted(until, until.dtype.type(stop), side="left"))
        windows = begin + np.flatnonzero(until[begin + 1 : end + 1] > until[begin:end])
        skipped = start - int(until[begin])
        return self.order.bucket_rows(bucket, windows)[skipped : skipped + stop - start]


class SourceStream:
    """Slices of one source. Slot q = step * lanes + lane counts them; epoch e owns the slots [G_e, G_e+1), where
    G_e = sum over buckets of (e * N_b) // m. Its first slots complete the slices that the last epoch began; the rest
    is cut into one contiguous range of the windows per lane. To be used from one thread.

    Args:
        compiled: the selection.
        seed: of the source.
        lanes: of the run.
        slice_size: m, samples in a slice.
        window: blocks that are shuffled together.
    """

    def __init__(self, compiled: Compiled, seed: int, lanes: int, slice_size: int, window: int) -> None:
        self.compiled, self.seed, self.lanes, self.size, self.window = compiled, seed, lanes, slice_size, window
        self._totals = compiled.totals
        self._rare = (self._totals > 0) & (self._totals < slice_size)
        self._tables: dict[int, Future[EpochTables]] = {}
        self._orders: dict[int, EpochOrder] = {}
        self._background = ThreadPoolExecutor(1, thread_name_prefix="next-epoch")

    def at(self, step: int, lane: int) -> tuple[int, np.ndarray]:
        """Bucket and (m,) rows of the slice (step, lane), where step counts this source's turns."""
        slot = step * self.lanes + lane
        epoch = self.epoch_of(slot)
        begun = self._begun(epoch)
        index = slot - self.first_slot(epoch)
        if index < len(begun):
            return begun[index], self._across(begun[index], epoch)
        return self._table(epoch).at(self._lane_range(epoch, lane, slot)[0])

    def walk(self, step: int, lane: int) -> Iterator[tuple[int, np.ndarray]]:
        """Buckets and (m,) rows of the slices (step, lane), (step + 1, lane), ... without end."""
        while True:
            slot = step * self.lanes + lane
            epoch = self.epoch_of(slot)
            begun = self._begun(epoch)
            index = slot - self.first_slot(epoch)
            if index < len(begun):
                yield begun[index], self._across(begun[index], epoch)
                step += 1
                continue
            start, stop = self._lane_range(epoch, lane, slot)
            tables = self._table(epoch)
            self._build(epoch + 1)
            yield from tables.walk(start, stop)
            step += stop - start

    def first_slot(self, epoch: int) -> int:
        """G_e: slots before the epoch."""
        return int((epoch * self._totals // self.size).sum())

    def epoch_of(self, slot: int) -> int:
        """The epoch that owns the slot: the last one that begins at or before it."""
        # G_e > e * N / m - buckets, so an epoch beyond the limit begins after the slot.
        limit = (slot + len(self._totals)) * self.size // self.compiled.rows
        return bisect.bisect_right(range(limit + 1), slot, key=self.first_slot) - 1

    def _carry(self, epoch: int) -> np.ndarray:
        return epoch * self._totals % self.size

    def _begun(self, epoch: int) -> list[int]:
        """Buckets whose first slice of the epoch holds rows of earlier ones, in the order served."""
        carry = self._carry(epoch)
        buckets = np.flatnonzero((carry > 0) & (carry + self._totals >= self.size)).tolist()
        return sorted(buckets, key=lambda bucket: mix64(self.seed, _SLICE, epoch, bucket, 0))

    def _across(self, bucket: int, epoch: int) -> np.ndarray:
        """(m,) rows of the bucket's slice that earlier epochs began and this one completes."""
        carry = int(self._carry(epoch)[bucket])
        if not self._rare[bucket]:  # carry < m <= N_b: one epoch back is enough
            before, now = self._order(epoch - 1), self._order(epoch)
            return np.concatenate([before.last(bucket, carry), now.first(bucket, self.size - carry)])
        total = int(self._totals[bucket])
        start = epoch * total - carry
        parts = []
        for past in range(start // total, epoch + 1):
            ordered = self._rare_order(bucket, past)
            parts.append(ordered[max(0, start - past * total) : start + self.size - past * total])
        return np.concatenate(parts)

    def _rare_order(self, bucket: int, epoch: int) -> np.ndarray:
        """(N_b,) an epoch's order of a bucket that has fewer rows than a slice, free of windows.

        Such a bucket has only slices that span epochs, possibly many, whose tables would take long to build.
        """
        rows = self._rare_rows[bucket]
        return rows[np.argsort(mix64(self.seed, _ROW, epoch, rows), kind="stable")]

    @cached_property
    def _rare_rows(self) -> dict[int, np.ndarray]:
        buckets = np.flatnonzero(self._rare)
        blocks = np.flatnonzero(self.compiled.histogram[:, buckets].any(axis=1))
        values = self.compiled.bucket[blocks]
        found = {}
        for bucket in buckets.tolist():
            at, offset = np.nonzero(values == bucket)
            found[bucket] = blocks[at] * self.compiled.block + offset
        return found

    def _lane_range(self, epoch: int, lane: int, slot: int) -> tuple[int, int]:
        """[start, stop) of the epoch's window order: what the lane serves from the slot to the epoch's end."""
        begin = self.first_slot(epoch) + len(self._begun(epoch))
        end = self.first_slot(epoch + 1)

        def before(limit: int, lanes: int) -> int:
            """How many slots below the limit belong to the first so many lanes."""
            return limit // self.lanes * lanes + min(limit % self.lanes, lanes)

        stop = before(end, lane + 1) - before(begin, lane + 1)
        return stop - len(range(slot, end, self.lanes)), stop

    def _order(self, epoch: int) -> EpochOrder:
        if epoch in self._tables:
            return self._tables[epoch].result().order
        if epoch not in self._orders:
            self._orders[epoch] = EpochOrder(self.compiled, self.seed, epoch, self.window)
            _keep_latest(self._orders)
        return self._orders[epoch]

    def _table(self, epoch: int) -> EpochTables:
        self._build(epoch)
        return self._tables[epoch].result()

    def _build(self, epoch: int) -> None:
        """Start building an epoch's tables in the background."""
        if epoch not in self._tables:
            order = self._orders.get(epoch)

            def build() -> EpochTables:
                made = order or EpochOrder(self.compiled, self.seed, epoch, self.window)
                return EpochTables(made, self._carry(epoch), self.size)

            self._tables[epoch] = self._background.submit(build)
            _keep_latest(self._tables)


def _keep_latest(cache: dict) -> None:
    while len(cache) > _EPOCHS_KEPT:
        del cache[next(iter(cache))]


def _shuffled(count: int, seed: int) -> np.ndarray:
    """(count,) int64, the numbers below count ordered by hash."""
    index = np.arange(count, dtype=np.uint64)
    bits = np.uint64((count - 1).bit_length())
    # Sorting the values is several times faster than an argsort; the number in the low bits also settles ties.
    keys = (mix64(seed, index) >> bits << bits) | index
    keys.sort()
    keys &= (np.uint64(1) << bits) - np.uint64(1)
    return keys.view(np.int64)
