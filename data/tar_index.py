"""What lies where in a tar, from its headers alone, and everything that is wrong with it.

Understands USTAR, GNU (long names, base-256 sizes) and PAX (long names, big sizes). A sample is a run of consecutive
members with one key, as in the webdataset library: the key is the path up to the first dot of the base name, and the
rest of the name, in lower case, is the extension. A sample is only ever reported whole: when the tar breaks off, the
sample it breaks off in is dropped.
"""

import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from data.ranged_file import RangedFile

BLOCK = tarfile.BLOCKSIZE
_LARGEST_EXTENSION_HEADER = 1 << 20
_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")
D = TypeVar("D")


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in a tar: its name, and the offset and size of its payload in bytes."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong with a shard.

    Args:
        kind: "truncated", "missing end", "bad header", "unsupported", "interleaved", "duplicate key",
            "missing member", "bad name", "unreadable media" or "bad json".
        detail: a sentence for the user.
        key: the sample concerned, or "".
        offset: byte offset in the tar, or -1.
    """

    kind: str
    detail: str
    key: str = ""
    offset: int = -1


class TarDamageError(ValueError):
    """The tar cannot be followed beyond some byte."""

    def __init__(self, kind: str, detail: str, offset: int) -> None:
        super().__init__(f"{kind} at byte {offset}: {detail}")
        self.problem = Problem(kind, detail, offset=offset)


@dataclass(slots=True)
class Sample(Generic[D]):
    """One key's members in the order of the tar, by extension, with what was found out about each."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    details: dict[str, D] = field(default_factory=dict)


def split_name(name: str) -> tuple[str, str] | None:
    """Key and lower-case extension of a member's name, or None for what belongs to no sample.

    Differs from webdataset only in hidden files of subfolders (`a/.b.jpg`), which it takes for the sample `a/`.
    """
    match = _NAME.fullmatch(name)
    if match is None or _META.match(name) or name.rpartition("/")[2].startswith("."):
        return None
    return match.group(1), match.group(2).lower()


def walk(file: RangedFile) -> Iterator[Member]:
    """The regular members of a tar, in order.

    Each is yielded before the walk moves beyond it, so that its payload's first bytes are read at no further cost.

    Raises:
        TarDamageError: truncated, no end marker, a header whose checksum is wrong, or a feature not understood. Members
            yielded before are whole, but the last ones may lack others of their sample.
    """
    offset = 0
    shared: dict[str, str] = {}  # PAX global headers
    override: dict[str, str] = {}  # from the extension headers before a member
    while True:
        if offset == file.size and offset > 0:
            raise TarDamageError("missing end", "the end-of-archive marker is missing", offset)
        block = file.pread(offset, BLOCK)
        if len(block) < BLOCK:
            raise TarDamageError(
                "truncated", f"the file ends after {file.size} bytes, within a member or header", offset
            )
        if not any(block):
            _check_end(file, offset)
            return
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise TarDamageError("bad header", _explain_header(block, offset, error), offset) from error
        payload = offset + BLOCK
        pax_size = override.get("size", shared.get("size")) if info.isreg() else None
        size = _decimal(pax_size, offset) if pax_size is not None else info.size
        has_payload = info.isreg() or info.type not in tarfile.SUPPORTED_TYPES or info.type in _EXTENSION_HEADERS
        if has_payload and (size < 0 or payload + size > file.size):
            what = f"{info.name!r} should have {size} bytes at {payload}, but the file ends after {file.size}"
            raise TarDamageError("truncated", what, offset)
        next_offset = payload + (size + BLOCK - 1) // BLOCK * BLOCK if has_payload else payload
        if info.type in _EXTENSION_HEADERS:
            if size > _LARGEST_EXTENSION_HEADER:
                raise TarDamageError("bad header", f"an extension header of {size} bytes", offset)
            content = file.pread(payload, size)
            if info.type == tarfile.GNUTYPE_LONGNAME:
                override["path"] = content.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif info.type == tarfile.XGLTYPE:
                shared.update(_pax_records(content, offset))
            elif info.type != tarfile.GNUTYPE_LONGLINK:
                override.update(_pax_records(content, offset))
        else:
            if info.type == tarfile.GNUTYPE_SPARSE or any(k.startswith("GNU.sparse.") for k in override):
                raise TarDamageError("unsupported", f"{info.name!r} is a sparse file", offset)
            if info.isreg():
                yield Member(override.get("path", shared.get("path", info.name)), payload, size)
            override = {}
        offset = next_offset


def read_samples(file: RangedFile, inspect: Callable[[str, str, Member], D]) -> tuple[list[Sample[D]], list[Problem]]:
    """All whole samples of a tar, and what is wrong with it.

    Dropped are: the sample in which the tar breaks off; all parts of a sample whose members do not stand together; all
    but the first of several with one key and the same extensions.

    Args:
        inspect: called with (key, extension, member) for every member while the walk stands at it; its result is kept.
    """
    groups: list[Sample[D]] = []
    problems: list[Problem] = []
    try:
        for member in walk(file):
            named = split_name(member.name)
            if named is None:
                continue
            key, extension = named
            if not _is_utf8(member.name):
                problems.append(
                    Problem("bad name", f"{member.name!r} is not UTF-8: member ignored", offset=member.offset)
                )
                continue
            if not groups or groups[-1].key != key or extension in groups[-1].members:
                groups.append(Sample(key))
            groups[-1].members[extension] = member
            groups[-1].details[extension] = inspect(key, extension, member)
    except TarDamageError as damage:
        cut = groups.pop().key if groups else ""
        lost = file.size - max(damage.problem.offset, 0)
        detail = f"{damage.problem.detail}; {lost} bytes from there on are not used"
        if cut:
            detail += f", nor is the sample {cut!r} before, which may lack members"
        problems.append(Problem(damage.problem.kind, detail, cut, damage.problem.offset))
    return _without_repeats(groups, problems), problems


def _without_repeats(groups: list[Sample[D]], problems: list[Problem]) -> list[Sample[D]]:
    by_key: dict[str, list[Sample[D]]] = {}
    for group in groups:
        by_key.setdefault(group.key, []).append(group)
    if len(by_key) == len(groups):
        return groups
    kept = []
    for key, same in by_key.items():
        at = next(iter(same[-1].members.values())).offset
        if len(same) == 1:
            kept.append(same[0])
        elif all(g.members.keys() == same[0].members.keys() for g in same):
            kept.append(same[0])
            detail = f"{len(same)} samples have the key {key!r}: only the first is used"
            problems.append(Problem("duplicate key", detail, key, at))
        else:
            detail = f"the members of {key!r} do not stand together ({len(same)} groups): the sample is not used"
            problems.append(Problem("interleaved", detail, key, at))
    return kept


_EXTENSION_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


def _check_end(file: RangedFile, offset: int) -> None:
    """A zero block at a header's place ends the tar; were it a hole in the data, more headers would follow."""
    rest = file.pread(offset + BLOCK, BLOCK)
    if any(rest):
        raise TarDamageError("bad header", "a header is blank and data follow it", offset)


def _explain_header(block: bytes, offset: int, error: tarfile.HeaderError) -> str:
    if offset == 0 and block[:2] == b"\x1f\x8b":
        return "a gzip file: shards must be plain tars, whose members can be read by range"
    if offset == 0 and block[257:262] != b"ustar":
        return "not a tar file"
    return f"the header is damaged ({error})"


def _pax_records(content: bytes, offset: int) -> dict[str, str]:
    """POSIX pax: records of the form "<length> <key>=<value>\\n", whose length counts the whole record."""
    records = {}
    position = 0
    while position < len(content) and content[position]:
        digits, space, _ = content[position : position + 20].partition(b" ")
        length = int(digits) if space and digits.isdigit() else 0
        record = content[position + len(digits) + 1 : position + length]
        name, equals, value = record.partition(b"=")
        if length < 5 or position + length > len(content) or not equals or not value.endswith(b"\n"):
            raise TarDamageError("bad header", "a PAX extension header is damaged", offset)
        records[name.decode("utf-8", "surrogateescape")] = value[:-1].decode("utf-8", "surrogateescape")
        position += length
    return records


def _decimal(text: str, offset: int) -> int:
    if not text.isascii() or not text.isdigit():
        raise TarDamageError("bad header", f"a PAX header gives the size {text!r}", offset)
    return int(text)


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
