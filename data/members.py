"""Members read by byte range, held against the tar's header before them and the manifest's checksum."""

import tarfile

from data.manifest import checksum_of
from data.store import Store
from data.tar_index import BLOCK, split_name

_CHECKSUMS = {16: "xxh128", 32: "sha256"}  # by length in bytes


class ContentError(ValueError):
    """A sample that cannot be used, through no fault of the store."""


def read_member(
    store: Store, shard: str, key: str, extension: str, offset: int, size: int, checksum: bytes | None = None
) -> bytes:
    """The bytes of one of a sample's members. Arguments as in `check_member`.

    Raises:
        ContentError: the tar changed, or the bytes are damaged.
        StoreError: the store fails.
    """
    block = store.read(shard, offset - BLOCK, BLOCK + size)
    header, data = block[:BLOCK], block[BLOCK:]
    check_member(header, data, key, extension, offset, checksum)
    return data


def check_member(header: bytes, data: bytes, key: str, extension: str, offset: int, checksum: bytes | None) -> None:
    """Hold what was read against what it should be.

    Args:
        header: the tar's 512 bytes before the member.
        data: the member.
        key: of the sample.
        extension: the rest of the member's name.
        offset: where `data` was read.
        checksum: as the manifest has it, if it has one.

    Raises:
        ContentError: the tar changed, or the bytes are damaged.
    """
    if not _header_fits(header, key, extension, len(data)):
        raise ContentError(f"its .{extension} is no longer at byte {offset}: the tar changed")
    if checksum is not None and checksum_of(data, _CHECKSUMS[len(checksum)]) != checksum:
        raise ContentError(f"its .{extension} has another checksum than when it was indexed")


def _header_fits(header: bytes, key: str, extension: str, size: int) -> bool:
    """Whether a tar header is that of the member. One whose true name or size stands in an extension header before it
    (longer than 100 bytes, or not ASCII) is only held against what it can tell."""
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    if not info.isreg() or info.size != size:
        return False
    if len(key) + len(extension) >= tarfile.LENGTH_NAME - 1 or not key.isascii() or not extension.isascii():
        return True
    return split_name(info.name) == (key, extension)
