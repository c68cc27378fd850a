"""A seekable file over a function that reads ranges, wherever the bytes lie."""

import io
from collections.abc import Callable
from typing import Any


class RangedFile(io.RawIOBase):
    """A read-only, seekable file over a function that reads ranges. Remembers the last block it fetched.

    Reading on within the block, or seeking within it, costs nothing; a seek past it skips what lies between.

    Args:
        fetch: (offset, size) -> exactly that many bytes.
        size: of the file, in bytes.
        block: bytes to fetch at once; 0 fetches just what is asked for.
    """

    def __init__(self, fetch: Callable[[int, int], bytes], size: int, block: int) -> None:
        self.size, self.block = size, block
        self._fetch = fetch
        self._position = 0
        self._buffer = b""
        self._buffer_at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def pread(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes at `offset`: fewer only at the end of the file."""
        size = max(0, min(size, self.size - offset))
        begin = offset - self._buffer_at
        if begin < 0 or begin + size > len(self._buffer):
            if size >= self.block:
                return self._fetch(offset, size)
            self._buffer = self._fetch(offset, min(self.block, self.size - offset))
            self._buffer_at, begin = offset, 0
        return self._buffer[begin : begin + size]

    def read(self, size: int | None = -1) -> bytes:
        wanted = self.size - self._position if size is None or size < 0 else size
        data = self.pread(self._position, wanted)
        self._position += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return self.read(-1)

    def part(self, offset: int, size: int, block: int = 0) -> "RangedFile":
        """A file over a range of this one: on this one's buffer, or with blocks of its own for reads out of order."""
        fetch = self._fetch if block else self.pread
        return RangedFile(lambda begin, length: fetch(offset + begin, length), size, block)
