"""Local files: written whole or not at all, and read in ranges through few open ones."""

import os
import re
import socket
import threading
from collections import OrderedDict
from pathlib import Path

_HOST = re.sub(r"[^A-Za-z0-9]", "_", socket.gethostname())
_TEMPORARY = re.compile(rf"\..*\.{_HOST}-(\d+)-\d+")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file by way of a temporary one beside it and a rename; creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        temporary.write_bytes(content)
        publish(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def temporary_beside(path: Path) -> Path:
    """The file beside it that becomes it when it is whole."""
    return path.with_name(f".{path.name}.{_HOST}-{os.getpid()}-{threading.get_ident()}")


def publish(temporary: Path, path: Path) -> None:
    """Put a whole file, on the disk before its name is."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def remove_leftovers_in(folder: Path) -> None:
    """Remove the temporary files that killed processes of this machine left in a folder."""
    for path in folder.glob(f".*.{_HOST}-*"):
        found = _TEMPORARY.fullmatch(path.name)
        if found and not _is_alive(int(found[1])):
            path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


class OpenFiles:
    """Open local files of this process, the least recently used closed first."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._open: OrderedDict[str, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def pread(self, path: str, offset: int, size: int) -> bytes:
        with self._lock:
            handle = self._open.get(path)
            if handle is None:
                handle = self._open[path] = _OpenFile(path)
                if len(self._open) > self._limit:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(path)
        parts = []
        while size > 0 and (part := os.pread(handle.fd, size, offset)):
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def forget_unless(self, path: str, stat: os.stat_result) -> None:
        """Close the file if the path now leads to another one."""
        with self._lock:
            handle = self._open.get(path)
            if handle is not None and os.fstat(handle.fd).st_ino != stat.st_ino:
                del self._open[path]


class _OpenFile:
    """A file descriptor that closes with its last user: another thread may still be reading when it is evicted."""

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)
