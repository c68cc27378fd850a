"""A sample's encodings by byte range, into the fields of its batch."""

from collections.abc import Mapping, Sequence
from typing import Any

from safetensors.torch import load
from torch import Tensor

from data.encoded import FLIPPED, MOMENTS, Encoding, encoded_url, extension, read_nulls, text_member
from data.manifest_reader import ManifestReader
from data.members import ContentError, check_member
from data.selection import Selection
from data.store import Store, redact
from data.tar_index import BLOCK

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
        self._nulls: dict[int, tuple[Tensor, Tensor]] | None = None

    def __reduce__(self) -> tuple:
        return EncodedReader, (self.store, self.selection, self.name, self.encoding)

    def records(self, shard: int, rows: Sequence[int]) -> list[Record]:
        """What `load_latent` and `load_text` take, of some rows of a shard."""
        values = self._indices.rows(shard, rows, self._columns)
        return [{"shard": shard, **{column: values[column][i] for column in self._columns}} for i in range(len(rows))]

    def load_latent(self, record: Record, flip: bool, out: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
        """Read the moments of a sample's latent, of its mirrored picture if `flip`.

        Args:
            out: (2 C, H/f, W/f), written.

        Returns:
            The picture's original size, and top and left of its crop.

        Raises:
            ContentError: its picture could not be encoded.
            ValueError: the encoding changed while it was read.
            StoreError: the store fails.
        """
        if record["error"] is not None:
            raise ContentError(record["error"])
        out.copy_(self._load(record, FLIPPED if flip else MOMENTS)["moments"])
        height, width, top, left = (record[name] for name in _FRAMING)
        return (height, width), (top, left)

    def load_text(self, record: Record, column: str, caption: str, out: Mapping[str, Tensor]) -> None:
        """Read the embeddings of a sample's caption.

        Args:
            column: that the caption is of.
            caption: where it is empty, what is kept once for all such is taken.
            out: one sample's part of `Encoding.fields`, written.

        Raises:
            ValueError, StoreError: as `load_latent`.
        """
        assert self.encoding.text is not None
        tensors = self._load(record, text_member(self.encoding.text.columns.index(column))) if caption else None
        for one in self.encoding.text.encoders:
            if tensors is not None:
                sequence, pooled = tensors[f"{one.number}.sequence"], tensors[f"{one.number}.pooled"]
            else:
                sequence, pooled = self._null(one.number)
            out[f"text/{one.number}/sequence"][: len(sequence)] = sequence
            out[f"text/{one.number}/sequence"][len(sequence) :] = 0
            out[f"text/{one.number}/pooled"].copy_(pooled)

    def _null(self, number: int) -> tuple[Tensor, Tensor]:
        if self._nulls is None:
            self._nulls = read_nulls(self.selection.manifests[0], self.name, self.store)
        return self._nulls[number]

    def _load(self, record: Record, member: str) -> dict[str, Tensor]:
        url, offset, size = self._tars[record["shard"]], record[f"{member}_offset"], record[f"{member}_size"]
        if offset is None:
            raise ValueError(f"{redact(url)} lacks {member} of {record['key']!r}: encode the shard again")
        block = self.store.read(url, offset - BLOCK, BLOCK + size)
        try:
            check_member(block[:BLOCK], block[BLOCK:], record["key"], extension(member), offset, None)
        except ContentError as error:  # it is ours to keep whole, so no other sample may stand in
            raise ValueError(f"{redact(url)}: {record['key']!r}: {error}; start the run again") from error
        return load(block[BLOCK:])
