"""Reads and writes the files of a checkpoint directory for torch.distributed.checkpoint."""

import os
import pickle
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
import xxhash
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from trainer.checkpoint import format as files
from trainer.checkpoint.layout import kind_of


@dataclass(frozen=True)
class FileResult(WriteResult):
    """A finished file, sent to rank 0 beside the results of its chunks."""

    digest: str


class VerifiedWriter(FileSystemWriter):
    """Writes a directory that plain `torch.distributed.checkpoint` can read, and commits it with checksums.

    Checksums are of the bytes handed to the file system, so that what a disk or a network loses later is noticed.

    Args:
        path: the checkpoint directory; what an unfinished save left there is removed.
        record: written into it.
    """

    def __init__(self, path: Path, record: files.Record) -> None:
        super().__init__(path)
        self._folder = path
        self._record = record

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On rank 0, before any rank writes."""
        with files.naming(self._folder):
            remove_checkpoint(self._folder)
            self._folder.mkdir(parents=True)
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        by_kind: dict[str, list[WriteItem]] = {}
        for item in plan.items:
            by_kind.setdefault(kind_of(item.index.fqn), []).append(item)
        results: list[WriteResult] = []
        for number, items in enumerate(by_kind.values()):
            results += self._write_file(f"{plan.storage_data.prefix}{number}.distcp", items, planner)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _write_file(self, name: str, items: Sequence[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        path = self._folder / name
        results: list[WriteResult] = []
        with files.naming(path), path.open("wb") as file:
            sink = _Sink(file)
            for item in items:
                start = sink.size
                torch.save(planner.resolve_data(item), cast(IO[bytes], sink))
                sink.raise_failure()
                length = sink.size - start
                results.append(WriteResult(item.index, length, _StorageInfo(name, start, length)))
            file.flush()
            os.fsync(file.fileno())
        results.append(FileResult(MetadataIndex(name), sink.size, None, sink.digest.hexdigest()))
        return results

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On rank 0, once every rank has written: complete and commit the directory."""
        digests, chunks = {}, []
        for result in (result for ranks in results for result in ranks):
            if isinstance(result, FileResult):
                digests[result.index.fqn] = (result.size_in_bytes, result.digest)
            else:
                chunks.append(result)
        with files.naming(self._folder / ".metadata"):
            super().finish(metadata, [chunks])
        files.write_index(self._folder, _index_entries(metadata))
        files.write_record(self._folder, self._record)
        for name in (".metadata", files.INDEX_FILE, files.RECORD_FILE):
            digests[name] = files.digest_of(self._folder / name)
        files.commit(self._folder, digests)
        files.sync_folder(self._folder.parent)


class _Sink:
    """The file object that `torch.save` sees: counts and sums up bytes, and keeps the first failure.

    An exception must not pass through torch's C++ zip writer, which may abort the process on its way.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._failure: OSError | None = None
        self.size = 0
        self.digest = xxhash.xxh3_128()

    def write(self, data: bytes | memoryview) -> int:
        block = memoryview(data).cast("B")
        self.digest.update(block)
        self.size += len(block)
        if self._failure is None:
            try:
                self._file.write(block)
            except OSError as failure:
                self._failure = failure
        return len(block)

    def flush(self) -> None:
        """`torch.save` flushes after each tensor; the file is flushed once, at its end."""

    def raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure


class VerifiedReader(FileSystemReader):
    """Reads a committed directory by its `index.json`; `.metadata` is not opened.

    Args:
        path: the checkpoint directory.
        verify: compare the files that hold wanted chunks with their checksums before reading them.
    """

    def __init__(self, path: Path, verify: bool = True) -> None:
        super().__init__(path)
        self._folder = path
        self._verify = verify

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        tensors: dict[str, Any] = {}
        storage: dict[MetadataIndex, _StorageInfo] = {}
        for name, entry in files.read_index(self._folder).items():
            chunks = []
            for offsets, sizes, file, start, length in entry["chunks"]:
                chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
                storage[MetadataIndex(name, offsets)] = _StorageInfo(file, start, length)
            tensors[name] = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size(entry["shape"]), chunks)
        return Metadata(tensors, storage_data=storage)

    def read_data(self, plan: LoadPlan, planner: Any) -> Future[None]:
        if self._verify:
            used = {self.storage_data[item.storage_index].relative_path for item in plan.items}
            files.check_files(self._folder, sorted(used))
        try:
            return super().read_data(plan, planner)
        except pickle.UnpicklingError as error:
            # torch's own message advises to load without weights_only: exactly what must not be done.
            raise files.CheckpointError(f"{self._folder}: refused, as a chunk holds more than a tensor") from error


def _index_entries(metadata: Metadata) -> dict[str, Any]:
    """Per tensor its shape and, per chunk, [offsets, sizes, file, first byte, bytes]. All tensors are float32."""
    entries = {}
    for name, tensor in metadata.state_dict_metadata.items():
        assert isinstance(tensor, TensorStorageMetadata)
        chunks = []
        for chunk in tensor.chunks:
            stored = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
            place = [stored.relative_path, stored.offset, stored.length]
            chunks.append([list(chunk.offsets), list(chunk.sizes), *place])
        entries[name] = {"shape": list(tensor.size), "chunks": chunks}
    return entries


def remove_checkpoint(path: Path) -> None:
    """Delete a directory, whole or not; the commit goes first, so that a deletion cut short leaves no checkpoint."""
    if not path.exists():
        return
    (path / files.COMMIT_FILE).unlink(missing_ok=True)
    files.sync_folder(path)
    shutil.rmtree(path)
