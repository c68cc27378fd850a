"""What a checkpoint directory is: its files, its commit, and how it is found and checked.

    checkpoints/step_00000020/
      __<rank>_<n>.distcp   chunks of tensors, one file per rank and kind (weights, each moment, each EMA length)
      .metadata             where each chunk is, as torch.distributed.checkpoint writes it, for its own tools
      index.json            the same for us: `.metadata` is a pickle, and no pickle is ever loaded
      checkpoint.json       the run's small state (`Record`)
      committed.json        size and checksum of every other file, written last

Parameters, not buffers: those follow from the configuration, and `init_buffers` computes them anew.

A directory without a readable `committed.json`, or with a file that does not match it, is not a checkpoint.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import xxhash

FORMAT = 1
COMMIT_FILE = "committed.json"
INDEX_FILE = "index.json"
RECORD_FILE = "checkpoint.json"

_STEP_FOLDER = re.compile(r"step_(\d{8,})")
_READ_BYTES = 16 * 2**20


class CheckpointError(ValueError):
    """A checkpoint cannot be written, is not whole, or does not fit the run."""


def installed_versions() -> dict[str, str]:
    """Versions of the packages that a checkpoint's numbers depend on."""
    found = {}
    for package in ("millrace", "torch", "deepspeed"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class Record:
    """The small state of a run that a checkpoint holds beside its tensors. Everything must be JSON.

    Args:
        step: steps of the loop taken so far, skipped ones included.
        config: the composed configuration.
        plan: fingerprint of the data plan, as the plan gives it.
        steps_taken: optimiser updates so far, by phase.
        skipped_steps: steps of the plan that were passed over.
        ema: state of the averages that is not a tensor.
        versions: package versions of the writing run.
    """

    step: int
    config: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    steps_taken: dict[str, int] = field(default_factory=dict)
    skipped_steps: list[int] = field(default_factory=list)
    ema: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=installed_versions)


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return folder / f"step_{step:08d}"


def step_of(path: Path) -> int:
    """The step in a checkpoint directory's name. Raises CheckpointError for another name."""
    match = _STEP_FOLDER.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path} is not a checkpoint directory: its name is not step_<8 digits>")
    return int(match.group(1))


def step_folders(folder: Path) -> list[Path]:
    """Checkpoint directories, whole or not, newest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _STEP_FOLDER.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def bytes_in(path: Path) -> int:
    """Of a directory's files as they are now; others may write and remove them meanwhile."""
    try:
        return sum(file.stat().st_size for file in path.iterdir())
    except FileNotFoundError:
        return 0


def is_committed(path: Path) -> bool:
    """Whether the directory was committed; says nothing of damage since."""
    return (path / COMMIT_FILE).is_file()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn an OSError into a CheckpointError that names the file: a full disk's own error does not."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error


def write_json(path: Path, value: Any) -> None:
    """Write atomically and durably: a reader sees the old file, none, or the whole new one."""
    with naming(path):
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("w") as file:
            json.dump(value, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:  # also undecodable bytes
        raise CheckpointError(f"{path} is damaged: {error}") from None


def digest_of(path: Path) -> tuple[int, str]:
    """Size in bytes and XXH3-128 of a file. It tells of accidents, not of an adversary."""
    digest, size = xxhash.xxh3_128(), 0
    with naming(path), path.open("rb", buffering=0) as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()


def commit(path: Path, digests: dict[str, tuple[int, str]]) -> None:
    """Declare a directory whole. `digests` holds what was written of each file, taken while it was written."""
    files = {name: {"bytes": size, "xxh3_128": digest} for name, (size, digest) in sorted(digests.items())}
    write_json(path / COMMIT_FILE, {"format": FORMAT, "files": files})


def committed_files(path: Path) -> dict[str, tuple[int, str]]:
    """Size and checksum of each file of a committed directory. Raises CheckpointError when there is no such commit."""
    if not path.is_dir():
        raise CheckpointError(f"{path} is no directory")
    if not is_committed(path):
        raise CheckpointError(f"{path} was never committed ({COMMIT_FILE} is missing): its save did not finish")
    commit_path = path / COMMIT_FILE
    content = _read_json(commit_path)
    try:
        if content["format"] != FORMAT:
            raise CheckpointError(f"{commit_path}: format {content['format']}, but this version reads format {FORMAT}")
        return {name: (int(entry["bytes"]), str(entry["xxh3_128"])) for name, entry in content["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{commit_path} is damaged: {error!r}") from None


def check_files(path: Path, names: Iterable[str] | None = None) -> None:
    """Compare files of a committed directory (all by default) with their checksums.

    Raises:
        CheckpointError: names the first file that is missing, of another size, or of other content.
    """
    expected = committed_files(path)
    for name in expected if names is None else names:
        if name not in expected:
            raise CheckpointError(f"{path / name} is not part of the committed checkpoint")
        size, digest = expected[name]
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        if file.stat().st_size != size:
            raise CheckpointError(f"{file} has {file.stat().st_size:,} bytes; {size:,} were written")
        if digest_of(file) != (size, digest):
            raise CheckpointError(f"{file} is damaged: its checksum is not the one it was written with")


def read_record(path: Path) -> Record:
    """The record of a checkpoint directory. Raises CheckpointError where it is missing or damaged."""
    check_files(path, [RECORD_FILE])
    content = _read_json(path / RECORD_FILE)
    known = {f.name for f in fields(Record)}
    return Record(**{key: value for key, value in content.items() if key in known})


def write_record(path: Path, record: Record) -> None:
    """Write a record into a directory that is not yet committed."""
    write_json(path / RECORD_FILE, asdict(record))


def write_index(path: Path, tensors: dict[str, Any]) -> None:
    """Write where each tensor's chunks are (see storage.py)."""
    write_json(path / INDEX_FILE, {"format": FORMAT, "tensors": tensors})


def read_index(path: Path) -> dict[str, Any]:
    """What `write_index` wrote, checked against its checksum."""
    check_files(path, [INDEX_FILE])
    return _read_json(path / INDEX_FILE)["tensors"]
