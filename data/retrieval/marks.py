"""Marks of files, by which one that was cut off, changed or put in another's place is told from what was written.

A mark is the size, and a hash of the head, of the end, and of pages spread evenly between: it takes as long to read for
any size. Files of less than 384 KiB are hashed whole; of larger ones, what changes between the pages is not seen.
"""

import os
from pathlib import Path
from typing import IO

import xxhash

_END, _PAGE, _PAGES = 1 << 16, 1 << 12, 64


def mark_of(file: IO[bytes], head: int = _END) -> str:
    """The mark of an open file; `head` bytes of it are hashed without a gap."""
    size = file.seek(0, os.SEEK_END)
    between = size - head - _END
    if between <= _PAGE * _PAGES:
        spans = [(0, size)]
    else:
        pages = [(head + i * (between - _PAGE) // (_PAGES - 1), _PAGE) for i in range(_PAGES)]
        spans = [(0, head), *pages, (size - _END, _END)]
    digest = xxhash.xxh3_64()
    for start, length in spans:
        file.seek(start)
        digest.update(file.read(length))
    return f"{size}-{digest.hexdigest()}"


def mark_at(path: Path, head: int = _END) -> str:
    """The mark of the file at a path; "" where there is none that can be read."""
    try:
        with path.open("rb") as file:
            return mark_of(file, head)
    except OSError:
        return ""


def size_in(mark: str) -> int:
    """The bytes of the file that a mark is of."""
    return int(mark.partition("-")[0])
