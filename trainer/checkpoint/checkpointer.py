"""Saves and loads the sharded state of a run: asynchronous, atomic, verified; for any engine and world size."""

import concurrent.futures
import logging
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex

from trainer.checkpoint import format as files
from trainer.checkpoint.format import CheckpointError, Record
from trainer.checkpoint.layout import (
    Assignment,
    BoxLoadPlanner,
    BoxSavePlanner,
    Holding,
    agree_on_writers,
    box_views,
    holdings,
)
from trainer.checkpoint.storage import VerifiedReader, VerifiedWriter, remove_checkpoint
from trainer.engines.base import Shard

log = logging.getLogger(__name__)
_POLL_S = 1.0
T = TypeVar("T")

# One process without torch.distributed is an ordinary case here, not a mistake to warn of.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


@dataclass(frozen=True)
class Found:
    """What a search for the newest whole checkpoint gave.

    Args:
        path: the newest whole one; None where there is none.
        refused: why each newer directory was passed over, newest first.
    """

    path: Path | None
    refused: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class CheckpointPolicy:
    """Configuration: when to save, and what to keep.

    Args:
        every: steps between checkpoints.
        keep_last: how many of the newest to keep; None keeps all.
        keep_every: keep those at multiples of this many steps for good.
        asynchronous: write in the background; else `save` returns when the checkpoint is committed.
    """

    every: int = 1000
    keep_last: int | None = 2
    keep_every: int | None = None
    asynchronous: bool = True

    def __post_init__(self) -> None:
        for name in ("every", "keep_last", "keep_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"checkpoint.{name} is {value}; it must be at least 1, or null where that is allowed")

    def keeps(self, step: int, newer: int) -> bool:
        """Whether to keep the checkpoint of `step` when there are `newer` committed ones after it."""
        if self.keep_last is None or newer < self.keep_last:
            return True
        return self.keep_every is not None and step % self.keep_every == 0

    def build(self, folder: str | Path, alive: Callable[[], None] = lambda: None) -> "Checkpointer":
        """The checkpoints of a run; collective. See `Checkpointer`."""
        return Checkpointer(folder, self, alive)


class Checkpointer:
    """The checkpoints of one run, in one folder. Methods are collective: every rank calls each of them alike.

    Args:
        folder: `<run>/checkpoints`, on storage that all ranks see.
        policy: what to keep, and whether to write in the background.
        alive: called while `wait` waits for a save that makes progress on any rank, which its folder shows; and after
            each checkpoint that `latest` has read.
    """

    def __init__(
        self, folder: str | Path, policy: CheckpointPolicy | None = None, alive: Callable[[], None] = lambda: None
    ) -> None:
        self.folder = Path(folder)
        self.policy = policy or CheckpointPolicy()
        self._alive = alive
        # The background thread needs collectives that cannot meet those of training: a group of its own, on CPU.
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._rank = dist.get_rank() if self._group else 0
        self._world = dist.get_world_size() if self._group else 1
        self._holdings: list[Holding] | None = None
        self._assignment: Assignment | None = None
        self._buffers: dict[MetadataIndex, Tensor] = {}
        self._pending: Future[None] | None = None
        self._newest: Path | None = None

    def save(self, record: Record, shards: Iterable[Shard]) -> Path:
        """Copy the state to CPU memory, and write it to `step_<record.step>` (in the background, if asynchronous).

        Waits for the last save first. What is saved (names, boxes) must stay the same for the life of this object.

        Returns:
            The checkpoint directory, which is whole once `wait` returns.

        Raises:
            CheckpointError: the last save failed, or (unless asynchronous) this one.
        """
        self.wait()
        self._snapshot(list(shards))
        path = files.step_folder(self.folder, record.step)
        self._newest = path
        self._pending = _in_background(lambda: self._write(path, record))
        if not self.policy.asynchronous:
            self.wait()
        return path

    def wait(self) -> None:
        """Wait until the last save is committed.

        Raises:
            CheckpointError: it failed, on whichever rank; names the path. Older checkpoints are as they were.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            assert self._newest is not None
            seen = 0
            while not concurrent.futures.wait([pending], _POLL_S).done:
                if (written := files.bytes_in(self._newest)) != seen:
                    seen = written
                    self._alive()
            pending.result()

    def latest(self) -> Found:
        """The newest whole checkpoint; every file is checked, the ranks sharing the work. Refusals are also logged."""
        self.wait()
        refused: list[str] = []
        for path in self._candidates():
            problem = self._problem_of(path)
            self._alive()
            if problem is None:
                return Found(path, refused)
            refused.append(problem)
            if self._rank == 0:
                log.warning("checkpoint refused: %s", problem)
        return Found(None, refused)

    def load(self, path: Path, shards: Iterable[Shard], verify: bool = True) -> Record:
        """Fill the shards from a checkpoint of any layout.

        Args:
            path: the checkpoint directory.
            shards: what to fill; their names must be in the checkpoint, with their shapes.
            verify: check the files that are read; `latest` has checked those of its answer.

        Raises:
            CheckpointError: a tensor is missing or of another shape, or a file is damaged; shards may be half filled.
        """
        self.wait()
        return load_shards(path, shards, self._group, verify)

    def _snapshot(self, shards: list[Shard]) -> None:
        if self._assignment is None:
            self._holdings = holdings(shards)
            self._assignment = agree_on_writers(self._holdings, self._group)
            for item in self._assignment.items:
                assert item.tensor_data is not None
                pinned = torch.cuda.is_available()
                self._buffers[item.index] = torch.empty(item.tensor_data.chunk.sizes, pin_memory=pinned)
        assert holdings(shards) == self._holdings, "the layout of a run's state changed between two saves"
        devices = set()
        for shard in shards:
            for box, view in box_views(shard):
                buffer = self._buffers.get(MetadataIndex(shard.name, box.offsets))
                if buffer is not None:
                    buffer.copy_(view, non_blocking=True)
                    devices.add(view.device)
        for device in devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)

    def _write(self, path: Path, record: Record) -> None:
        assert self._assignment is not None
        try:
            with _one_error(path):
                dcp.save(
                    {},
                    storage_writer=VerifiedWriter(path, record),
                    planner=BoxSavePlanner(self._assignment, self._buffers),
                    process_group=self._group,
                    no_dist=self._group is None,
                )
        except CheckpointError:
            # All ranks have stopped writing. What is left is no checkpoint, and on a full disk its space is needed.
            if self._rank == 0:
                remove_checkpoint(path)
            raise
        if self._rank == 0:
            self._prune(path)

    def _prune(self, newest: Path) -> None:
        step = files.step_of(newest)
        older = [p for p in files.step_folders(self.folder) if files.step_of(p) < step and files.is_committed(p)]
        for newer, path in enumerate(older, start=1):
            if not self.policy.keeps(files.step_of(path), newer):
                with files.naming(path):
                    remove_checkpoint(path)

    def _problem_of(self, path: Path) -> str | None:
        """Why a directory is not whole, the same answer on every rank."""

        def check_our_share() -> None:
            files.check_files(path, sorted(files.committed_files(path))[self._rank :: self._world])

        try:
            _on_every_rank(check_our_share, self._group)
        except CheckpointError as error:
            return str(error)
        return None

    def _candidates(self) -> list[Path]:
        """As rank 0 sees them: ranks must not differ over what a folder holds at this moment."""
        answer = [files.step_folders(self.folder) if self._rank == 0 else []]
        if self._group is not None:
            dist.broadcast_object_list(answer, group=self._group, group_src=0)
        return answer[0]


def load_shards(
    path: Path, shards: Iterable[Shard], group: dist.ProcessGroup | None = None, verify: bool = True
) -> Record:
    """Fill shards from a checkpoint of any layout; collective over `group`, None is a single process.

    Raises:
        CheckpointError: see `Checkpointer.load`.
    """

    def read() -> Record:
        reader, planner = VerifiedReader(path, verify), BoxLoadPlanner(shards)
        metadata = reader.read_metadata()
        planner.set_up_planner({}, metadata)
        reader.set_up_storage_reader(metadata, is_coordinator=False)
        reader.read_data(planner.create_local_plan(), planner).wait()
        return files.read_record(path)

    return _on_every_rank(read, group)


def _on_every_rank(work: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """Run on each rank; where it fails on one, every rank raises, and none is left waiting for it."""
    result, failure = None, None
    try:
        result = work()
    except Exception as error:
        failure = error
    if group is not None:
        problems: list[str | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(problems, None if failure is None else str(failure), group=group)
        problem = next((problem for problem in problems if problem is not None), None)
        if failure is None and problem is not None:
            failure = CheckpointError(problem)
    if failure is not None:
        raise failure
    return cast(T, result)


def _in_background(work: Callable[[], None]) -> Future[None]:
    """Run in a daemon thread: a crash of training must not wait for ranks that will never answer."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            work()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(None)

    threading.Thread(target=run, name="checkpoint", daemon=True).start()
    return future


@contextmanager
def _one_error(path: Path) -> Iterator[None]:
    """Turn the failures of several ranks, which `dcp.save` raises on every rank, into one CheckpointError."""
    try:
        yield
    except dcp.CheckpointException as failed:
        ranks = {rank: error for rank, (error, _) in failed.failures.items()}
        reasons = sorted(
            {f"{error}" if isinstance(error, CheckpointError) else repr(error) for error in ranks.values()}
        )
        raise CheckpointError(f"checkpoint {path.name} was not saved: {'; '.join(reasons)}") from ranks[min(ranks)]
