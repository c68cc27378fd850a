"""A selected sample's members, read whole and checked, and as they go into a packed shard."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from data.decode import Color, DecodeError
from data.describe import standard_name
from data.manifest import STRUCTURE
from data.media_size import media_member
from data.members import ContentError, check_member
from data.packing.pictures import Picture, Pictures, pack_picture
from data.store import Store
from data.tar_index import BLOCK
from data.video import VideoError, cut

# img2dataset's words: what could not be had, and what could not be decoded or changed.
Status = Literal["success", "failed_to_download", "failed_to_resize"]


@dataclass(frozen=True)
class Part:
    """Where in its video a clip lies.

    Args:
        video: key of the video.
        span: frames [start, end).
        copyable: the frames of these that can be cut out without encoding them anew, if there are any.
    """

    video: str
    span: tuple[int, int]
    copyable: tuple[int, int] | None


@dataclass(frozen=True)
class Row:
    """A selected sample as its manifest and score files describe it.

    Args:
        source: name of its source.
        shard: URL of its tar.
        key: in that tar.
        new_key: in the packed one.
        members: extension, offset, size and checksum (None without one) of each member, in the tar's order.
        size: height and width, pixels.
        values: of all manifest and score columns asked for, by name.
        part: if it is a clip within a video.
    """

    source: str
    shard: str
    key: str
    new_key: str
    members: list[tuple[str, int, int, bytes | None]]
    size: tuple[int, int]
    values: dict[str, Any]
    part: Part | None = None


@dataclass(frozen=True)
class Contents:
    """What the samples of a source are to hold.

    Args:
        captions: columns that the source's captions are drawn from.
        columns: score and manifest columns that go into the `.json`.
        pictures: what becomes of pictures.
        background: below transparent pixels.
        clips: how clips are cut out of videos: "copy", at key frames, or "encode", at exactly their frames.
    """

    captions: tuple[str, ...]
    columns: tuple[str, ...]
    pictures: Pictures
    background: Color
    clips: Literal["copy", "encode"] = "copy"


@dataclass(frozen=True)
class Packed:
    """A sample ready to be written, or why it is not.

    Args:
        row: what it was made from.
        status: "success", or what failed.
        error: the reason, if something did.
        members: extensions and payloads, in order.
        caption: as its `.txt` has it.
        size: height and width of its picture or clip.
    """

    row: Row
    status: Status
    error: str | None = None
    members: tuple[tuple[str, bytes], ...] = ()
    caption: str | None = None
    size: tuple[int, int] | None = None


def fetch(row: Row, store: Store) -> dict[str, bytes] | ContentError:
    """The sample's members, with one request; or what is wrong with them.

    Raises:
        StoreError: the store fails.
    """
    begin = min(offset for _, offset, _, _ in row.members) - BLOCK
    end = max(offset + size for _, offset, size, _ in row.members)
    block = memoryview(store.read(row.shard, begin, end - begin))
    stored_key = row.part.video if row.part else row.key
    found = {}
    try:
        for extension, offset, size, checksum in row.members:
            place = offset - begin
            found[extension] = bytes(block[place : place + size])
            check_member(
                bytes(block[place - BLOCK : place]),
                found[extension],
                stored_key,
                extension,
                offset,
                checksum,
            )
    except ContentError as error:
        return error
    return found


def pack(row: Row, fetched: dict[str, bytes] | ContentError, contents: Contents) -> Packed:
    """The sample as it is to be written.

    Members are copied byte for byte and in their order, but for the picture, where `contents.pictures` asks for
    another, and:

    - of a clip within a video, the video's part;
    - `.txt`: the caption, where the source's captions come from another column than `caption`, or where only the
      `.json` had it. Of several columns it is the first that is not empty, unless `caption` is among them, which stays.
    - `.json`: gains the columns asked for, and all caption columns of several, so that what was packed can be drawn
      from as before; also width, height and key where they are no longer what they were.
    """
    if isinstance(fetched, ContentError):
        return Packed(row, "failed_to_download", str(fetched))
    members, size = dict(fetched), row.size
    try:
        chosen = media_member(list(members))
        if chosen is not None and chosen[1] == "image":
            extension = list(members)[chosen[0]]
            picture = Picture(members[extension], extension, row.size)
            new = pack_picture(picture, contents.pictures, contents.background)
            if new.extension != extension and new.extension in members:
                raise ContentError(f"its .{extension} would become .{new.extension}, which it has already")
            members = {
                new.extension if name == extension else name: new.data if name == extension else data
                for name, data in members.items()
            }
            size = new.size
        elif chosen is not None and row.part is not None:
            members = _cut_out(members, list(members)[chosen[0]], row.part, contents.clips)
        caption = _put_caption(members, row, contents)
        _put_fields(members, row, contents, size)
        if contents.pictures.verify:
            _check_texts(members)
    except (DecodeError, ContentError, VideoError) as error:
        return Packed(row, "failed_to_resize", str(error))
    return Packed(row, "success", None, tuple(members.items()), caption, size)


def _cut_out(members: dict[str, bytes], extension: str, part: Part, how: Literal["copy", "encode"]) -> dict[str, bytes]:
    """A video's members, with the clip in place of the video."""
    span = part.span if how == "encode" else part.copyable
    if span is None:
        raise ContentError("no frame of the clip is a key frame to cut at: encode it anew with clips=encode")
    new = f"{extension.rpartition('.')[0]}.mp4".lstrip(".") if how == "encode" else extension
    if new != extension and new in members:
        raise ContentError(f"its .{extension} would become .{new}, which it has already")
    data = cut(members[extension], *span, reencode=how == "encode")
    return {new if name == extension else name: data if name == extension else other for name, other in members.items()}


def _put_caption(members: dict[str, bytes], row: Row, contents: Contents) -> str | None:
    own = row.values["caption"]
    if "caption" in contents.captions:
        if "txt" not in members and own is not None:
            members["txt"] = own.encode()
        return own
    given = (row.values[column] for column in contents.captions)
    caption = next((str(value) for value in given if value), "")
    members["txt"] = caption.encode()
    return caption


def _put_fields(members: dict[str, bytes], row: Row, contents: Contents, size: tuple[int, int]) -> None:
    new: dict[str, Any] = {column: _jsonable(row.values[column]) for column in contents.columns}
    if len(contents.captions) > 1:
        new |= {column: row.values[column] for column in contents.captions if column != "caption"}
    has_json = "json" in members
    if size != row.size:
        new |= {"width": size[1], "height": size[0]}
    if has_json and (row.new_key != row.key or row.part is not None):
        new["key"] = row.new_key
    if not new:
        return
    fields = _object(members["json"]) if has_json else {}
    if size != row.size and "original_width" not in new:
        new = {"original_width": row.size[1], "original_height": row.size[0]} | _original(fields) | new
    kept = {name: value for name, value in fields.items() if standard_name(name) not in new and name not in new}
    members["json"] = json.dumps(kept | new, ensure_ascii=False).encode()


def _original(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The picture's size on the web, if an earlier step has noted it."""
    noted = {standard_name(name): value for name, value in fields.items()}
    names = ("original_width", "original_height")
    return {name: noted[name] for name in names} if all(noted.get(name) for name in names) else {}


def _check_texts(members: Mapping[str, bytes]) -> None:
    """Texts that whoever reads the packed tars would stop at."""
    for name, data in members.items():
        kind = name.rpartition(".")[2]
        try:
            if kind in ("txt", "json"):
                data.decode()
            if kind == "json":
                json.loads(data)
        except ValueError as error:
            raise ContentError(f"its .{name} cannot be read: {error}") from error


def _object(data: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(data)
    except ValueError as error:
        raise ContentError(f"its .json cannot be read, so that nothing can be added to it: {error}") from error
    if not isinstance(fields, dict):
        raise ContentError(f"its .json holds a {type(fields).__name__}, to which nothing can be added")
    return fields


def _jsonable(value: Any) -> Any:
    """JSON has no NaN, which a score that could not be told may be."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_columns(columns: tuple[str, ...]) -> None:
    """Refuse columns that a `.json` cannot carry into the packed shards' manifests."""
    for column in columns:
        if column in STRUCTURE or column == "checksums":
            raise ValueError(f"columns: {column!r} is a column of every manifest, not one to be added to the .json")
