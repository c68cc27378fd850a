"""A sample's encodings by byte range, into the fields of its batch."""

from collections.abc import Mapping, Sequence
from typing import Any

from safetensors.torch import load
from torch import Tensor

from data.encoded import (
    FLIPPED,
    IMAGE,
    IMAGE_FLIPPED,
    MOMENTS,
    Encoding,
    encoded_url,
    extension,
    outputs_of,
    read_nulls,
    text_member,
)
from data.manifest_reader import ManifestReader
from data.members import ContentError, read_member
from data.selection import Selection
from data.store import Store, redact
from models.given import Outputs

Record = Mapping[str, Any]
_FRAMING = ("original_height", "original_width", "crop_top", "crop_left")


class EncodedReader:
    """Reads one source's part of an encoding. Pickles as its arguments.

    Args:
        store: where it lies.
        selection: the source's rows.
        name: of the encoding.
        encoding: as its shards tell of it.
    """

    def __init__(self, store: Store, selection: Selection, name: str, encoding: Encoding) -> None:
        self.store, self.selection, self.name, self.encoding = store, selection, name, encoding
        self._tars = [encoded_url(manifest, name, ".tar") for manifest in selection.manifests]
        indices = [encoded_url(manifest, name, ".parquet") for manifest in selection.manifests]
        self._indices = ManifestReader(store, indices, selection.digests)
        places = [f"{member}_{what}" for member in encoding.members for what in ("offset", "size")]
        self._columns = ["key", "encoded", "error", *_FRAMING, *places]
        self._nulls: dict[int, Outputs] | None = None

    def __reduce__(self) -> tuple:
        return EncodedReader, (self.store, self.selection, self.name, self.encoding)

    def records(self, shard: int, rows: Sequence[int]) -> list[Record]:
        """What `framing` and `load` take, of some rows of a shard."""
        values = self._indices.rows(shard, rows, self._columns)
        return [{"shard": shard, **{column: values[column][i] for column in self._columns}} for i in range(len(rows))]

    def framing(self, record: Record) -> tuple[tuple[int, int], tuple[int, int]]:
        """The original size of a sample's encoded picture, and top and left of its crop.

        Raises:
            ContentError: the picture could not be encoded.
        """
        if record["error"] is not None:
            raise ContentError(record["error"])
        height, width, top, left = (record[name] for name in _FRAMING)
        return (height, width), (top, left)

    def load(self, record: Record, flip: bool, column: str, caption: str, out: Mapping[str, Tensor]) -> None:
        """Read a sample's encodings.

        Args:
            flip: whether those of the mirrored picture.
            column: that the caption is of.
            caption: where it is empty, what is kept once for all such is taken.
            out: one sample's part of `Encoding.fields`, written.

        Raises:
            ContentError: its picture could not be encoded.
            ValueError: the encoding changed while it was read.
            StoreError: the store fails.
        """
        if record["error"] is not None:
            raise ContentError(record["error"])
        if self.encoding.latents is not None:
            out[MOMENTS].copy_(self._load(record, FLIPPED if flip else MOMENTS)["moments"])
        if self.encoding.images is not None:
            embedded = outputs_of(self._load(record, IMAGE_FLIPPED if flip else IMAGE))
            _fill(out, {one.number: embedded[one.number] for one in self.encoding.images})
        if self.encoding.text is not None:
            member = text_member(self.encoding.text.columns.index(column))
            embedded = outputs_of(self._load(record, member)) if caption else self._read_nulls()
            _fill(out, {one.number: embedded[one.number] for one in self.encoding.text.encoders})

    def _read_nulls(self) -> dict[int, Outputs]:
        if self._nulls is None:
            self._nulls = read_nulls(self.selection.manifests[0], self.name, self.store)
        return self._nulls

    def _load(self, record: Record, member: str) -> dict[str, Tensor]:
        url, offset, size = self._tars[record["shard"]], record[f"{member}_offset"], record[f"{member}_size"]
        if offset is None:
            raise ValueError(f"{redact(url)} lacks {member} of {record['key']!r}: encode the shard again")
        try:
            return load(read_member(self.store, url, record["key"], extension(member), offset, size))
        except ContentError as error:  # it is ours to keep whole, so no other sample may stand in
            raise ValueError(f"{redact(url)}: {record['key']!r}: {error}; start the run again") from error


def _fill(out: Mapping[str, Tensor], embedded: Mapping[int, Outputs]) -> None:
    """Write encoders' outputs to their fields; sequences are kept without the zeros at their ends."""
    for number, (sequence, pooled) in embedded.items():
        out[f"encoder/{number}/sequence"][: len(sequence)] = sequence
        out[f"encoder/{number}/sequence"][len(sequence) :] = 0
        out[f"encoder/{number}/pooled"].copy_(pooled)
