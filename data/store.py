"""Where shards lie: local folders, `s3://`, `gs://` and `https://` behind one small class.

Reads are by byte range, bounded in time and retried with backoff. What still fails then is a `StoreError` that names
the URL: a store's fault stops a run, it never changes what is trained on.
"""

import glob
import os
import random
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import fsspec
from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]
from fsspec.asyn import sync

from conf.secrets import without_command
from data.hashing import text64
from data.local_files import OpenFiles, publish, remove_leftovers_in, temporary_beside, write_atomically
from data.ranged_file import RangedFile

REMOTE_BLOCK = 8 << 20
"""Bytes per request when a remote file is read in sequence."""
LOCAL_BLOCK = 16 << 10
"""Bytes per read of a local file in sequence: a header, and most often all that a picture's size needs, in one call."""
LARGEST_READ = 32 << 20
"""Longer reads are cut into requests of this size, so that the time limit is one on bandwidth and not on size."""
LISTING_TIMEOUT = 600.0
OPEN_FILES = 128

_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ImportError)
T = TypeVar("T")


class StoreError(OSError):
    """A store did not answer, or not with what was asked for."""


@dataclass(frozen=True)
class Identity:
    """Tells one state of a file from another: its size in bytes, and its ETag or time of modification."""

    size: int
    version: str

    def __str__(self) -> str:
        return f"{self.size}:{self.version}"


class Store:
    """Reads (and writes) whole files and byte ranges, by path or URL.

    Objects are cheap to pickle and safe to use after a fork: connections and open files belong to the process.

    Args:
        storage_options: fsspec options by protocol, e.g. `{"s3": {"endpoint_url": "https://..."}}`. Leave keys and
            tokens to the store's own environment variables and files: a run's configuration is written to disk.
        allow_pipe: whether `pipe:<command>` URLs, which run a shell, may be used.
        attempts: how often a request is tried, with waits of 0.5, 1, 2 ... seconds (and some jitter) in between.
        timeout: seconds that one attempt may take.
        cache_folder: where the output of `pipe:` commands is kept; by default below the user's cache folder.
    """

    def __init__(
        self,
        storage_options: dict[str, dict] | None = None,
        allow_pipe: bool = False,
        attempts: int = 5,
        timeout: float = 30.0,
        cache_folder: str | None = None,
    ) -> None:
        if attempts < 1 or timeout <= 0:
            raise ValueError(f"attempts and timeout must be positive, got {attempts} and {timeout}")
        self.storage_options = storage_options or {}
        self.allow_pipe = allow_pipe
        self.attempts = attempts
        self.timeout = timeout
        self.cache_folder = cache_root(cache_folder)
        self._handles = OpenFiles(OPEN_FILES)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_handles"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._handles = OpenFiles(OPEN_FILES)

    # --- names -------------------------------------------------------------------------------------------------

    def expand(self, patterns: str | list[str]) -> list[str]:
        """The shards that patterns stand for, in the patterns' order and sorted within each.

        A pattern is a shard, a folder (its `*.tar`), a glob, any of them with braces (`{00000..00041}`, `{a,b}`).

        Raises:
            ValueError: a pattern matches nothing, a shard is named twice, or `pipe:` is not allowed.
        """
        patterns = [patterns] if isinstance(patterns, str) else list(patterns)
        if not patterns:
            raise ValueError("no shards: the list of shard patterns is empty")
        urls: list[str] = []
        for pattern in patterns:
            # Braces in a shell command are the shell's.
            parts = [pattern] if pattern.startswith("pipe:") else _expand_braces(pattern)
            for part in parts:
                found = self._expand_one(part)
                if not found:
                    raise ValueError(f"no shards: {redact(part)!r} matches no tar file")
                urls += found
        if len(set(urls)) < len(urls):
            twice = next(u for i, u in enumerate(urls) if u in set(urls[:i]))
            raise ValueError(f"the shard {redact(twice)!r} is named twice by {[redact(p) for p in patterns]}")
        return urls

    def _expand_one(self, url: str) -> list[str]:
        protocol = protocol_of(url)
        if protocol == "pipe":
            self._check_pipe(url)
            return [url]
        if protocol == "file":
            path = local_path(url)
            if path.is_dir():
                return sorted(str(p) for p in path.glob("*.tar") if not p.name.startswith("."))
            return [str(path)] if path.exists() else self.glob(str(path))
        bare = urlsplit(url).path if protocol in ("http", "https") else url
        if "*" not in bare and not bare.endswith("/") and Path(bare).suffix:
            return [url]
        return self.glob(url if "*" in bare else url.rstrip("/") + "/*.tar")

    def glob(self, pattern: str) -> list[str]:
        """The files that match a pattern with `*`, `?` or `[...]`, sorted."""
        if protocol_of(pattern) == "file":
            found = glob.glob(str(local_path(pattern)), recursive=True)  # noqa: PTH207 (pathlib cannot glob absolute)
            return sorted(p for p in found if Path(p).is_file())
        fs, path = self._filesystem(pattern)
        names = self._retry(pattern, lambda: self._call(fs, "glob", path, timeout=LISTING_TIMEOUT))
        return sorted(n if "://" in n else fs.unstrip_protocol(n) for n in names)

    def _check_pipe(self, url: str) -> None:
        if not self.allow_pipe:
            raise ValueError(f"{redact(url)} would run a shell command; set allow_pipe=true if you trust it")

    # --- reading -----------------------------------------------------------------------------------------------

    def identity(self, url: str) -> Identity:
        """Size and version of the file as it is now.

        Raises:
            StoreError: it does not exist, or the store does not answer or does not tell its size.
        """
        protocol = protocol_of(url)
        if protocol == "pipe":
            return Identity(self._spool(url).stat().st_size, f"{text64(url):016x}")
        if protocol == "file":
            try:
                stat = local_path(url).stat()
            except OSError as error:
                raise _store_error(url, error) from error
            self._handles.forget_unless(str(local_path(url)), stat)
            return Identity(stat.st_size, str(stat.st_mtime_ns))
        fs, path = self._filesystem(url)
        info = self._retry(url, lambda: self._call(fs, "info", path))
        if info.get("size") is None:
            raise StoreError(f"{redact(url)}: the store does not tell the file's size, which reading by range needs")
        version = next(
            (
                str(info[k])
                for k in ("ETag", "etag", "md5Hash", "Last-Modified", "LastModified", "mtime")
                if info.get(k)
            ),
            "",
        )
        return Identity(int(info["size"]), version.strip('"'))

    def exists(self, url: str) -> bool:
        """Whether the file exists; raises StoreError when the store does not answer."""
        if protocol_of(url) == "file":
            return local_path(url).exists()
        fs, path = self._filesystem(url)
        try:  # not fs.exists, which takes a store that does not answer for a file that is not there
            self._retry(url, lambda: self._call(fs, "info", path))
        except StoreError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return False
            raise
        return True

    def read(self, url: str, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset` on.

        Raises:
            StoreError: the store fails `attempts` times, or the file is shorter than that.
        """
        parts = []
        for start in range(offset, offset + size, LARGEST_READ):
            wanted = min(LARGEST_READ, offset + size - start)
            part = self._read_range(url, start, wanted)
            if len(part) != wanted:
                raise StoreError(
                    f"{redact(url)}: asked for bytes {start}..{start + wanted}, got {len(part)} bytes: the file is "
                    "shorter than its manifest says (index it again), or the server ignores byte ranges"
                )
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _read_range(self, url: str, offset: int, size: int) -> bytes:
        protocol = protocol_of(url)
        if protocol in ("file", "pipe"):
            path = local_path(url) if protocol == "file" else self._spool(url)
            return self._retry(url, lambda: self._handles.pread(str(path), offset, size))
        fs, path_in_fs = self._filesystem(url)
        return self._retry(url, lambda: self._call(fs, "cat_file", path_in_fs, start=offset, end=offset + size))

    def read_all(self, url: str) -> bytes:
        """The whole file."""
        return self.read(url, 0, self.identity(url).size)

    def stream(self, url: str, block: int | None = None) -> Iterator[bytes]:
        """The whole file in order, in pieces of `block` bytes."""
        file = self.open(url, block)
        while piece := file.read(file.block):
            yield piece

    def open(self, url: str, block: int | None = None) -> RangedFile:
        """A seekable file that reads `block` bytes at a time (by default what suits the store)."""
        local = protocol_of(url) in ("file", "pipe")
        size = self.identity(url).size
        return RangedFile(partial(self.read, url), size, block or (LOCAL_BLOCK if local else REMOTE_BLOCK))

    # --- writing -----------------------------------------------------------------------------------------------

    def write(self, url: str, content: bytes) -> None:
        """Put a whole file there, atomically: a reader sees the old content or the new, never a part.

        Raises:
            StoreError: the store refuses or does not answer, the disk is full ...
        """
        if protocol_of(url) == "file":
            try:
                write_atomically(local_path(url), content)
            except OSError as error:
                raise _store_error(url, error) from error
            return
        fs, path = self._filesystem(url)
        self._retry(url, lambda: self._call(fs, "pipe_file", path, content))

    @contextmanager
    def composing(self, url: str) -> Iterator[Path]:
        """A local file to write, which goes to the URL, atomically, when the block ends without an error.

        Raises:
            StoreError: the store refuses or does not answer, the disk is full ...
        """
        local = protocol_of(url) == "file"
        try:
            if local:
                path = temporary_beside(local_path(url))
                path.parent.mkdir(parents=True, exist_ok=True)
            else:
                handle, name = tempfile.mkstemp(prefix="millrace-")
                os.close(handle)
                path = Path(name)
        except OSError as error:
            raise _store_error(url, error) from error
        try:
            yield path
            if local:
                publish(path, local_path(url))
                return
            fs, target = self._filesystem(url)
            limit = self.timeout * max(1, path.stat().st_size / LARGEST_READ)
            self._retry(url, lambda: self._call(fs, "put_file", str(path), target, timeout=limit))
        except StoreError:
            raise
        except OSError as error:
            raise _store_error(url, error) from error
        finally:
            path.unlink(missing_ok=True)

    def writable(self, url: str, attempt: bool = False) -> bool:
        """Whether files can be put beside this one, there or to be. Object stores are taken to be; the web is not.

        Args:
            url: of the file.
            attempt: make the local folder and a file in it, instead of asking for permissions, which do not tell all.
        """
        protocol = protocol_of(url)
        if protocol == "file" and attempt:
            try:
                folder = local_path(url).absolute().parent
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder):
                    return True
            except OSError:
                return False
        if protocol == "file":
            folder = next(parent for parent in local_path(url).absolute().parents if parent.exists())
            return os.access(folder, os.W_OK)
        return protocol not in ("http", "https", "pipe")

    # --- inside ------------------------------------------------------------------------------------------------

    def _filesystem(self, url: str) -> tuple[Any, str]:
        protocol = protocol_of(url)
        options = {"use_listings_cache": False, **self.storage_options.get(protocol, {})}
        try:
            # fsspec keeps one object per process, thread and options, and drops a parent's after a fork.
            return fsspec.core.url_to_fs(url, **options)
        except (ImportError, ValueError) as error:
            raise ValueError(f"cannot use {redact(url)!r}: {error}") from error

    def _call(self, fs: Any, method: str, *args: Any, timeout: float | None = None, **kwargs: Any) -> Any:
        if fs.async_impl:
            return sync(fs.loop, getattr(fs, "_" + method), *args, timeout=timeout or self.timeout, **kwargs)
        return getattr(fs, method)(*args, **kwargs)

    def _retry(self, url: str, call: Callable[[], T]) -> T:
        for attempt in range(1, self.attempts + 1):
            try:
                return call()
            except Exception as raised:
                error = _true_cause(raised)
                status = getattr(error, "status", None)
                refused = isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429)
                if isinstance(error, _PERMANENT) or refused or attempt == self.attempts:
                    raise _store_error(url, error, attempt) from error
                time.sleep(0.5 * 2 ** (attempt - 1) * random.uniform(0.8, 1.2))
        raise AssertionError("unreachable")

    def _spool(self, url: str) -> Path:
        """The output of a `pipe:` command as a local file: ranges can be read from it, again and again."""
        self._check_pipe(url)
        path = self.cache_folder / "pipe" / f"{text64(url):016x}.tar"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
                done = subprocess.run(url.removeprefix("pipe:"), shell=True, stdout=file, stderr=subprocess.PIPE)
            if done.returncode:
                Path(file.name).unlink()
                tail = done.stderr.decode(errors="replace").strip()[-300:]
                raise StoreError(f"{redact(url)}: the command ended with status {done.returncode}: {tail}")
            Path(file.name).replace(path)
        return path


def protocol_of(url: str) -> str:
    """`file` for paths; else what stands before `://` (or `pipe`)."""
    if url.startswith("pipe:"):
        return "pipe"
    protocol, separator, _ = url.partition("://")
    return protocol.lower() if separator else "file"


def local_path(url: str) -> Path:
    """The path of a local file given as path or as `file://` URL."""
    return Path(url.removeprefix("file://")).expanduser()


def redact(url: str) -> str:
    """The URL without what may be secret in it (user, password, query; all of a `pipe:` command but its program), fit
    for logs and errors."""
    if protocol_of(url) == "pipe":
        return without_command(url)
    if "://" not in url:
        return url
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "..." if parts.query else "", ""))


def cache_root(folder: str | Path | None = None) -> Path:
    """The given folder, or Millrace's below the user's cache folder (`$MILLRACE_CACHE`, `$XDG_CACHE_HOME`)."""
    if folder is not None:
        return Path(folder).expanduser()
    if own := os.environ.get("MILLRACE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "millrace"


def remove_leftovers(folder: str) -> None:
    """Remove the temporary files that killed processes of this machine left in a folder; one of a store has none."""
    if protocol_of(folder) == "file":
        remove_leftovers_in(local_path(folder or "."))


def _expand_braces(pattern: str) -> list[str]:
    try:
        return list(braceexpand(pattern))
    except UnbalancedBracesError as error:
        raise ValueError(f"unbalanced braces in the shard pattern {redact(pattern)!r}") from error


def _true_cause(error: Exception) -> Exception:
    """fsspec's web files report any failure as FileNotFoundError, raised from what really happened."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and isinstance(cause, Exception):
        return FileNotFoundError(str(error)) if getattr(cause, "status", None) == 404 else _true_cause(cause)
    return error


def _store_error(url: str, error: Exception, attempts: int = 1) -> StoreError:
    tried = f" after {attempts} attempts" if attempts > 1 else ""
    secret_free = str(error).replace(url, redact(url))
    return StoreError(f"{redact(url)}: {type(error).__name__}{tried}: {secret_free or 'no answer in time'}")
