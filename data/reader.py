"""From a planned slice to its batch: fetch members by byte range, check, decode, frame.

What is wrong with a sample's *content* (no picture, damaged, too large, checksum, a tar that changed) puts it in
quarantine, and another member of the same slice takes its place, chosen by a hash: so any worker and any rank chooses
the same. What goes wrong with the *store* is an error that stops the run: it must not change what is trained on.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeGuard

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.batch import Batch, PlannedSlice
from data.buckets import Buckets
from data.decode import MAX_PIXELS, WHITE, Color, DecodeError, decode_image
from data.draws import Draws, slice_draws
from data.encoded import MOMENTS
from data.encoded_reader import EncodedReader, Record
from data.fields import Field, Origin, collate
from data.hashing import mix64, text64
from data.manifest_reader import ManifestReader
from data.media_size import media_member
from data.members import ContentError, read_member
from data.records import QuarantineLine
from data.selection import Selection
from data.store import Store, protocol_of, redact
from data.transforms import Framing, Geometry, covering_size, draw_framings, frame

_REPLACE = text64("reader/replace")
_SMALL = 4096  # bytes
_MEMBER_COLUMNS = ("key", "extensions", "offsets", "sizes", "checksums")


class BadSliceError(ValueError):
    """A slice of which no member can be used.

    Args:
        text: names the slice and its members.
        quarantine: the members that are at fault.
    """

    def __init__(self, text: str, quarantine: Sequence[QuarantineLine]):
        super().__init__(text)
        self.quarantine = list(quarantine)

    def __reduce__(self) -> tuple:
        return type(self), (str(self), self.quarantine)


@dataclass(frozen=True)
class ReaderSource:
    """Where the reader finds a source's samples and their captions.

    Args:
        name: for records and errors.
        selection: rows that the plan's positions refer to.
        captions: manifest columns and their weights. One is drawn per sample; where it is empty, the first of the
            others that is not; "" if all are.
        background: colour below transparent pixels.
        encoded: its encodings, read instead of pictures, of captions, or of both.
        fields: what its samples come with beside these, by name.
    """

    name: str
    selection: Selection
    captions: dict[str, float] = field(default_factory=lambda: {"caption": 1.0})
    background: Color = WHITE
    encoded: EncodedReader | None = None
    fields: Mapping[str, Field] = field(default_factory=dict)


@dataclass(frozen=True)
class Delivery:
    """What a worker makes of a planned slice."""

    planned: PlannedSlice
    batch: Batch
    quarantine: list[QuarantineLine]

    def pin_memory(self) -> "Delivery":
        return Delivery(self.planned, self.batch.pin_memory(), self.quarantine)

    def __reduce__(self) -> tuple:
        # Between processes, torch moves every tensor through shared memory at the price of an open file descriptor and
        # a message: right for the images, too much for the small ones.
        batch = self.batch
        values = {"original_size": batch.original_size, "crop": batch.crop, **batch.fields}
        arrays = {name: value.numpy() if _is_small(value) else value for name, value in values.items()}
        parts = (batch.draws, batch.keys, batch.captions, batch.images, arrays)
        return _delivery, (self.planned, parts, self.quarantine)


def _is_small(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.nbytes <= _SMALL and value.dtype != torch.bfloat16  # numpy has none


def _delivery(planned: PlannedSlice, parts: tuple, quarantine: list[QuarantineLine]) -> Delivery:
    draws, keys, captions, images, arrays = parts
    fields = {name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in arrays.items()}
    original_size, crop = fields.pop("original_size"), fields.pop("crop")
    return Delivery(planned, Batch(draws, keys, captions, images, original_size, crop, fields), quarantine)


@dataclass(frozen=True)
class _Row:
    """A sample as the manifest describes it, with what there is of it in an encoding."""

    shard: str
    key: str
    extensions: list[str]
    offsets: list[int]
    sizes: list[int]
    checksums: list[bytes] | None
    captions: dict[str, str]
    columns: dict[str, Any]
    record: Record


@dataclass(frozen=True)
class _Framed:
    geometry: Geometry
    fields: dict[str, Any]


class SliceReader(Dataset[Delivery]):
    """A map-style dataset whose indices are planned slices. Picklable, and safe to use after a fork.

    Args:
        sources: in the order of the plan's.
        buckets: the plan's.
        store: where the shards lie.
        seed: of the run; crops, flips and captions are drawn from it.
        crop: offsets of crops, "random" (uniform) or "center".
        flip: mirror half of the samples; whether it was goes to `fields["flip"]`.
        max_pixels: larger pictures are refused by their header.
        concurrency: requests that one worker has under way at a remote store.
    """

    def __init__(
        self,
        sources: Sequence[ReaderSource],
        buckets: Buckets,
        store: Store,
        seed: int,
        crop: Literal["random", "center"] = "random",
        flip: bool = False,
        max_pixels: int = MAX_PIXELS,
        concurrency: int = 16,
    ) -> None:
        self.sources, self.buckets, self.store, self.seed = tuple(sources), buckets, store, seed
        self.crop, self.flip, self.max_pixels, self.concurrency = crop, flip, max_pixels, concurrency
        selections = [source.selection for source in self.sources]
        self._manifests = [ManifestReader(store, chosen.manifests, chosen.digests) for chosen in selections]

    def __getitem__(self, planned: PlannedSlice) -> Delivery:
        """Read a slice.

        Raises:
            StoreError: a store fails.
            BadSliceError: no member of the slice can be used.
        """
        source = self.sources[planned.source]
        bucket = self.buckets[planned.bucket]
        draws = slice_draws(self.seed, planned.step, planned.lane, len(planned.rows))
        framings = draw_framings(draws, self.crop, self.flip)
        rows = self._look_up(planned)
        columns = [_drawn_column(u, source.captions) for u in draws.unit("caption")]
        encoding = source.encoded.encoding if source.encoded is not None else None
        fields = encoding.fields(len(rows), bucket) if encoding is not None else {}
        # Where latents are read, the images are of no channels.
        channels = 0 if MOMENTS in fields else 3
        images = torch.empty((len(rows), channels, bucket.height, bucket.width), dtype=torch.uint8)

        def load(slot: int, member: int) -> _Framed | ContentError:
            encodings = {name: values[slot] for name, values in fields.items()}
            try:
                geometry = self._load(source, rows[member], columns[slot], framings[slot], images[slot], encodings)
                return _Framed(geometry, self._read_fields(source, rows[member], geometry, draws[slot : slot + 1]))
            except ContentError as error:
                return error

        framed = self._map(load, rows)
        order, quarantine = self._replace(planned, rows, framed)
        for line in quarantine:
            framed[line.slot] = load(line.slot, order[line.slot])
        done = []
        for slot, outcome in enumerate(framed):
            if isinstance(outcome, ContentError):  # it was read well a moment ago
                changed = self._quarantined(planned, slot, rows[order[slot]], outcome, None)
                text = f"{changed.shard}: {changed.key!r} reads differently from one time to the next: {outcome}"
                raise BadSliceError(text, [*quarantine, changed])
            done.append(outcome)
        batch = Batch(
            draws=draws,
            keys=[rows[member].key for member in order],
            captions=[_caption(rows[member], column)[1] for member, column in zip(order, columns, strict=True)],
            images=images,
            original_size=torch.tensor([one.geometry.original_size for one in done]),
            crop=torch.tensor([one.geometry.crop for one in done]),
            fields=fields
            | {name: collate([one.fields[name] for one in done]) for name in source.fields}
            | ({"flip": torch.tensor([one.flip for one in framings])} if self.flip else {}),
        )
        return Delivery(planned, batch, quarantine)

    def _replace(
        self, planned: PlannedSlice, rows: list[_Row], outcomes: list[_Framed | ContentError]
    ) -> tuple[list[int], list[QuarantineLine]]:
        """Which member fills each slot, itself where it is good, and a line for each that is not."""
        order = list(range(len(rows)))
        bad = {slot: outcome for slot, outcome in enumerate(outcomes) if isinstance(outcome, ContentError)}
        if not bad:
            return order, []
        good = [slot for slot in order if slot not in bad]
        if not good:
            lines = [self._quarantined(planned, slot, rows[slot], error, None) for slot, error in bad.items()]
            raise BadSliceError(self._nothing_good(planned, lines), lines)
        lines = []
        for slot, error in bad.items():
            order[slot] = good[mix64(self.seed, planned.step, planned.lane, slot, _REPLACE) % len(good)]
            lines.append(self._quarantined(planned, slot, rows[slot], error, rows[order[slot]].key))
        return order, lines

    def _quarantined(
        self, planned: PlannedSlice, slot: int, row: _Row, error: ContentError, replaced_by: str | None
    ) -> QuarantineLine:
        return QuarantineLine(
            step=planned.step,
            lane=planned.lane,
            slot=slot,
            source=self.sources[planned.source].name,
            shard=redact(row.shard),
            key=row.key,
            reason=str(error),
            replaced_by=replaced_by,
        )

    def _look_up(self, planned: PlannedSlice) -> list[_Row]:
        source, reader = self.sources[planned.source], self._manifests[planned.source]
        by_shard: dict[int, list[tuple[int, int]]] = {}
        for slot, (shard, row) in enumerate(source.selection.locate(planned.rows)):
            by_shard.setdefault(shard, []).append((slot, row))
        found: dict[int, _Row] = {}
        asked = list(dict.fromkeys(column for one in source.fields.values() for column in one.columns))
        columns = tuple(dict.fromkeys((*_MEMBER_COLUMNS, *source.captions, *asked)))
        for shard, places in by_shard.items():
            wanted = [row for _, row in places]
            values = reader.rows(shard, wanted, columns)
            records = source.encoded.records(shard, wanted) if source.encoded is not None else [{}] * len(wanted)
            for i, (slot, _) in enumerate(places):
                key, extensions, offsets, sizes, checksums = (values[name][i] for name in _MEMBER_COLUMNS)
                captions = {name: _text(values[name][i]) for name in source.captions}
                told = {name: values[name][i] for name in asked}
                url = source.selection.shards[shard]
                found[slot] = _Row(url, key, extensions, offsets, sizes, checksums, captions, told, records[i])
        return [found[slot] for slot in range(len(found))]

    def _map(
        self, load: Callable[[int, int], _Framed | ContentError], rows: list[_Row]
    ) -> list[_Framed | ContentError]:
        """Load every member to its own slot: one after the other from a local disk, else with requests in parallel."""
        slots = range(len(rows))
        if all(protocol_of(row.shard) in ("file", "pipe") for row in rows):
            return [load(slot, slot) for slot in slots]
        with ThreadPoolExecutor(min(self.concurrency, len(rows))) as pool:
            return list(pool.map(load, slots, slots))

    def _load(
        self,
        source: ReaderSource,
        row: _Row,
        column: str,
        framing: Framing,
        image: Tensor,
        encodings: dict[str, Tensor],
    ) -> Geometry:
        """Fill a sample's image or its encodings; `column` is the caption column that was drawn for it."""
        encoded, target = source.encoded, (image.shape[1], image.shape[2])
        if encoded is not None and MOMENTS in encodings:
            original_size, crop = encoded.framing(row.record)
            geometry = Geometry(original_size, covering_size(*original_size, target), crop, target, framing.flip)
        else:
            geometry = self._load_image(row, source.background, target, framing, image)
        if encoded is not None:
            encoded.load(row.record, framing.flip, *_caption(row, column), encodings)
        return geometry

    def _load_image(
        self, row: _Row, background: Color, target: tuple[int, int], framing: Framing, out: Tensor
    ) -> Geometry:
        chosen = media_member(row.extensions)
        if chosen is None or chosen[1] != "image":
            raise ContentError(f"no picture among its members ({', '.join(row.extensions)})")
        data = self._fetch(row, chosen[0])
        try:
            decoded = decode_image(data, cover=target, background=background, max_pixels=self.max_pixels)
        except DecodeError as error:
            raise ContentError(str(error)) from error
        # A JPEG may have been decoded at a part of its size.
        return replace(frame(decoded.pixels, target, framing, out), original_size=decoded.original_size)

    def _read_fields(self, source: ReaderSource, row: _Row, geometry: Geometry, draws: Draws) -> dict[str, Any]:
        def member(extension: str) -> bytes:
            if extension not in row.extensions:
                raise ContentError(f"no .{extension} among its members ({', '.join(row.extensions)})")
            return self._fetch(row, row.extensions.index(extension))

        origin = Origin(row.columns, member, geometry, lambda purpose: draws.seeds(f"field/{purpose}")[0])
        return {name: one.read(origin) for name, one in source.fields.items()}

    def _fetch(self, row: _Row, member: int) -> bytes:
        """The bytes of one of the sample's members, held against the tar's header before them and the manifest's
        checksum."""
        checksum = row.checksums[member] if row.checksums is not None else None
        place = row.offsets[member], row.sizes[member]
        return read_member(self.store, row.shard, row.key, row.extensions[member], *place, checksum)

    def _nothing_good(self, planned: PlannedSlice, bad: Sequence[QuarantineLine]) -> str:
        examples = "; ".join(f"{line.key!r} in {line.shard}: {line.reason}" for line in bad[:3])
        return (
            f"none of the {len(bad)} samples of slice (step {planned.step}, lane {planned.lane}) of source"
            f" {self.sources[planned.source].name!r} can be used, so nothing can replace them ({examples}):"
            " leave such rows out with the source's `where`, index the shards again, or use fewer lanes"
        )


def _drawn_column(u: float, weights: dict[str, float]) -> str:
    """The caption column that a uniform number draws."""
    rest = u * sum(weights.values())
    for column, weight in weights.items():
        rest -= weight
        if rest < 0:
            return column
    return list(weights)[-1]


def _caption(row: _Row, drawn: str) -> tuple[str, str]:
    """The column that a sample's caption is of, the drawn one unless that is empty, and the caption."""
    found = ((column, row.captions[column]) for column in (drawn, *row.captions))
    return next((one for one in found if one[1]), (drawn, ""))


def _text(value: object) -> str:
    return "" if value is None else str(value)
