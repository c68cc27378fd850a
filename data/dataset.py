"""The loader of a run: planned slices through DataLoader workers, in order, from any step on."""

import atexit
import math
import signal
import time
import traceback
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data.batch import Batch, PlannedSlice
from data.plan import Plan
from data.reader import BadSliceError, Delivery, SliceReader
from data.records import KeysLine, Records
from data.store import StoreError


class LoaderError(ValueError):
    """The loader cannot go on: a worker died, or too many samples in a row cannot be used."""


class Loader:
    """Batches of a rank's lanes, step by step.

    The plan runs in this process; workers get planned slices and give back batches, which arrive in the plan's order.
    What a step holds depends neither on the number of workers nor on where the loader started.

    Args:
        reader: makes batches of slices.
        plan: of the run.
        lanes: that this rank serves.
        workers: processes that read; 0 reads in this process, without looking ahead.
        prefetch: steps that are prepared ahead.
        pin_memory: whether batches are put in page-locked memory, for copies to a CUDA device.
        log_keys: whether `drain` tells the keys of every slice.
        max_bad_in_a_row: so many unusable samples one after the other are an error.
    """

    def __init__(
        self,
        reader: SliceReader,
        plan: Plan,
        lanes: range,
        workers: int = 2,
        prefetch: int = 2,
        pin_memory: bool = False,
        log_keys: bool = False,
        max_bad_in_a_row: int = 16,
    ) -> None:
        self.plan, self.lanes, self.log_keys, self.max_bad_in_a_row = plan, lanes, log_keys, max_bad_in_a_row
        self.waited = 0.0
        """Seconds spent waiting for data since the loader was made."""
        self.quarantined = 0
        """Samples replaced since the loader was made."""
        self._sampler = _PlanSampler(plan, lanes)
        self._loader = DataLoader(
            _Reading(reader),
            batch_size=None,
            sampler=self._sampler,
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=pin_memory,
            prefetch_factor=math.ceil(prefetch * len(lanes) / workers) if workers else None,
            persistent_workers=workers > 0,
            worker_init_fn=_ignore_stops,
            generator=torch.Generator(),  # or else it takes a number from torch's global generator
        )
        self._deliveries: Iterator[Delivery | _Failure] | None = None
        self._next_step = -1
        self._bad_in_a_row = 0
        self._records = Records()
        # At its exit, Python ends children by SIGTERM and waits for them: ours would never go.
        atexit.register(_close, weakref.ref(self))

    def step(self, step: int) -> list[Batch]:
        """The batches of the rank's lanes, in their order.

        Steps that follow one another are read ahead; any other step starts reading anew there.

        Raises:
            StoreError: a store fails.
            BadSliceError: no member of a slice can be used; `drain` tells of them.
            LoaderError: a worker died; too many samples in a row cannot be used.
        """
        started = time.perf_counter()
        if self._deliveries is None or step != self._next_step:
            self._sampler.start_step = step
            self._deliveries = iter(self._loader)
        self._next_step = -1  # a step that fails is not continued
        batches = [self._receive(step, lane) for lane in self.lanes]
        self._next_step = step + 1
        self.waited += time.perf_counter() - started
        return batches

    def drain(self) -> Records:
        """The records of all steps served since the last call, for the run's `RecordWriter`."""
        records, self._records = self._records, Records()
        return records

    def close(self) -> None:
        """Stop the workers."""
        workers = getattr(self._loader._iterator, "_workers", [])
        self._deliveries = None
        self._loader._iterator = None  # where DataLoader keeps persistent workers; going, it asks them to end
        for worker in workers:
            worker.kill()  # one that did not: it may wait for a lock that another died with

    def _receive(self, step: int, lane: int) -> Batch:
        assert self._deliveries is not None
        try:
            delivery = next(self._deliveries)
        except (RuntimeError, ConnectionError, EOFError) as error:
            if not self._tells_of_a_dead_worker(error):
                raise
            raise LoaderError(
                f"a data worker died before step {step}, lane {lane} was read ({str(error).strip()}): if memory ran"
                " out, lower data.workers or data.prefetch"
            ) from error
        if isinstance(delivery, _Failure):
            if isinstance(delivery.error, BadSliceError):
                self._records.quarantine.extend(delivery.error.quarantine)
            raise delivery.error from RuntimeError(f"while reading:\n{delivery.trace}")
        planned = delivery.planned
        assert (planned.step, planned.lane) == (step, lane), "deliveries come in the plan's order"
        self._account(delivery)
        return delivery.batch

    def _tells_of_a_dead_worker(self, error: Exception) -> bool:
        """DataLoader says so, or the connection broke over which the dead worker's tensors are passed on."""
        if isinstance(error, RuntimeError):
            return type(error) is RuntimeError and str(error).startswith("DataLoader worker")
        return self._loader.num_workers > 0

    def _account(self, delivery: Delivery) -> None:
        planned, batch = delivery.planned, delivery.batch
        bad = {line.slot: line for line in delivery.quarantine}
        self.quarantined += len(bad)
        self._records.quarantine.extend(delivery.quarantine)
        for slot in range(len(batch)):
            self._bad_in_a_row = self._bad_in_a_row + 1 if slot in bad else 0
            if self._bad_in_a_row >= self.max_bad_in_a_row:
                line = bad[slot]
                raise LoaderError(
                    f"{self._bad_in_a_row} samples in a row cannot be used, up to step {planned.step}, lane"
                    f" {planned.lane}; the last is {line.key!r} in {line.shard}: {line.reason}"
                )
        if self.log_keys:
            source = self.plan.sources[planned.source].name
            bucket = str(self.plan.buckets[planned.bucket])
            self._records.keys.append(KeysLine(planned.step, planned.lane, source, bucket, batch.keys))


@dataclass(frozen=True)
class _Failure:
    error: BadSliceError | StoreError | ValueError
    trace: str


class _Reading(Dataset[Delivery | _Failure]):
    """A reader whose errors for users are values: DataLoader would put a worker's traceback into their text."""

    def __init__(self, reader: SliceReader) -> None:
        self._reader = reader

    def __getitem__(self, planned: PlannedSlice) -> Delivery | _Failure:
        try:
            return self._reader[planned]
        except (BadSliceError, StoreError) as error:
            return _Failure(error, traceback.format_exc())
        except ValueError as error:  # of any kind, which need not be one that can be pickled
            return _Failure(ValueError(str(error)), traceback.format_exc())


class _PlanSampler(Sampler[PlannedSlice]):
    """The plan's slices from `start_step` on, without end."""

    def __init__(self, plan: Plan, lanes: range) -> None:
        self.plan, self.lanes = plan, lanes
        self.start_step = 0

    def __iter__(self) -> Iterator[PlannedSlice]:
        return self.plan.iterate(self.start_step, self.lanes)


def _ignore_stops(_: int) -> None:
    """Terminals and SLURM signal every process of a run, but whether it stops is its ranks' to say: until they close
    the loader, batches must come."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _close(loader: "weakref.ref[Loader]") -> None:
    if (alive := loader()) is not None:
        alive.close()


def _as_it_is(delivery: Any) -> Any:
    return delivery
