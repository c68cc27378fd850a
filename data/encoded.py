"""Encodings: what frozen encoders make of a shard's samples, kept in a tar beside it, and read instead of them.

In the folder of a shard's manifest lies, for an encoding `name`,

    encoded-<name>/<shard>.tar       <key>.moments.safetensors    mean and log variance of the latent, (2 C, H/f, W/f)
                                     <key>.flipped.safetensors    the same of the mirrored picture
                                     <key>.image.safetensors      of the picture: <i>.sequence (tokens, width) and
                                                                  <i>.pooled of the conditioner's i-th encoder
                                     <key>.image_flipped.safetensors
                                     <key>.text0.safetensors      the same of the first caption column
                                     ...
    encoded-<name>/<shard>.parquet   a row for each manifest row: where its members lie, how its picture was cropped,
                                     or why there is nothing
    encoded-<name>/null.safetensors  what the conditioner's encoders give for nothing

The Parquet file is written last. Its metadata name what made the encoding, and the state of the shard.
"""

import tarfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from io import BytesIO
from typing import Any, BinaryIO, Literal

import numpy as np
import pyarrow as pa
import torch
import xxhash
from safetensors.torch import load, save
from torch import Tensor

from data.buckets import Bucket
from data.manifest import SUFFIX, Manifest
from data.parquet import open_parquet, to_parquet, told_at
from data.store import Store, redact
from models.given import Outputs

VERSION = 2
MOMENTS, FLIPPED = "moments", "flipped"
IMAGE, IMAGE_FLIPPED = "image", "image_flipped"
Dtype = Literal["bfloat16", "float32"]


@dataclass(frozen=True)
class CropSettings:
    """What of pictures is encoded.

    Args:
        buckets: shapes that pictures are cropped to, HxW, in order.
        crop: where.
        flip: whether mirrored pictures are encoded as well.
        background: colour below transparent pixels.
    """

    buckets: list[str]
    crop: str
    flip: bool
    background: list[int]


@dataclass(frozen=True)
class LatentSettings:
    """What latents are made with.

    Args:
        encoder: fingerprint of the first stage.
        channels: 2 C, of mean and log variance together.
        downsampling: f.
    """

    encoder: str
    channels: int
    downsampling: int


@dataclass(frozen=True)
class EncoderSettings:
    """One of the conditioner's encoders: its number there, its fingerprint, and the shape of its outputs."""

    number: int
    fingerprint: str
    length: int
    width: int
    pooled_width: int


@dataclass(frozen=True)
class TextSettings:
    """What text embeddings are made with: encoders, and the caption columns that they read."""

    encoders: list[EncoderSettings]
    columns: list[str]


@dataclass(frozen=True)
class Encoding:
    """All that an encoding's values depend on, beside the shard.

    Args:
        dtype: that values are kept in.
        precision: that encoders computed in.
        crops: of the pictures, where any are encoded.
        latents, text, images: of first stage, captions' encoders and pictures' encoders; None where there are none.
    """

    dtype: Dtype
    precision: str
    crops: CropSettings | None = None
    latents: LatentSettings | None = None
    text: TextSettings | None = None
    images: list[EncoderSettings] | None = None

    @classmethod
    def parse(cls, told: Mapping[str, Any]) -> "Encoding":
        """Of what `asdict` gives."""
        crops, latents, text, images = (told[name] for name in ("crops", "latents", "text", "images"))
        return cls(
            told["dtype"],
            told["precision"],
            CropSettings(**crops) if crops is not None else None,
            LatentSettings(**latents) if latents is not None else None,
            TextSettings(_encoders(text["encoders"]), text["columns"]) if text is not None else None,
            _encoders(images) if images is not None else None,
        )

    @property
    def encoders(self) -> list[EncoderSettings]:
        """Those of the conditioner, of captions and of pictures."""
        return (self.text.encoders if self.text is not None else []) + (self.images or [])

    @property
    def members(self) -> list[str]:
        """Names of a sample's members."""
        names = [MOMENTS, FLIPPED] if self.latents is not None else []
        names += [IMAGE, IMAGE_FLIPPED] if self.images is not None else []
        if self.crops is not None and not self.crops.flip:
            names = [name for name in names if name not in (FLIPPED, IMAGE_FLIPPED)]
        return names + [text_member(i) for i in range(len(self.text.columns) if self.text is not None else 0)]

    def fields(self, size: int, bucket: Bucket) -> dict[str, Tensor]:
        """Zeros in the place of `Batch.fields` that hold the encodings of `size` samples."""
        dtype = getattr(torch, self.dtype)
        fields = {}
        if self.latents is not None:
            f = self.latents.downsampling
            shape = (size, self.latents.channels, bucket.height // f, bucket.width // f)
            fields[MOMENTS] = torch.zeros(shape, dtype=dtype)
        for one in self.encoders:
            fields[f"encoder/{one.number}/sequence"] = torch.zeros(size, one.length, one.width, dtype=dtype)
            fields[f"encoder/{one.number}/pooled"] = torch.zeros(size, one.pooled_width, dtype=dtype)
        return fields

    def differs(self, wanted: "Encoding") -> str | None:
        """Why a run that would itself encode as `wanted` must not read this encoding, or None."""
        if self.latents is not None and wanted.latents is not None and self.latents.encoder != wanted.latents.encoder:
            return "its latents are another first stage's (first_stage and, where weights are random, seed)"
        ours, theirs = self.crops, wanted.crops
        if ours is not None and theirs is not None:
            if ours.buckets != theirs.buckets:
                return f"its crops are {_some(ours.buckets)}, and this run's buckets are {_some(theirs.buckets)}"
            if ours.crop != theirs.crop:
                return f"its crops are those of data.crop={ours.crop}, and this run has data.crop={theirs.crop}"
            if theirs.flip and not ours.flip:
                return "it holds no mirrored pictures, and this run has data.flip=true"
            if ours.background != theirs.background:
                return f"its transparent pictures lie on {ours.background}, this run's on {theirs.background}"
        if self.text is not None and wanted.text is not None:
            missing = [column for column in wanted.text.columns if column not in self.text.columns]
            if missing:
                return f"it has captions of {_some(self.text.columns)}, and this run reads {missing[0]!r}"
        if self.encoders and wanted.encoders:
            for one, other in zip(self.encoders, wanted.encoders, strict=False):
                if one != other:
                    return f"its embeddings are another conditioner's: encoder {one.number} is not the same"
            if len(self.encoders) != len(wanted.encoders):
                return "its embeddings are another conditioner's, with other encoders"
        return None


def _encoders(told: Sequence[Mapping[str, Any]]) -> list[EncoderSettings]:
    return [EncoderSettings(**one) for one in told]


def _some(items: Sequence[str], most: int = 4) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


@dataclass(frozen=True)
class Encoded:
    """One sample's part of an encoding.

    Args:
        row: in the manifest.
        key: of the sample.
        members: their bytes, by name.
        original_size: height and width of the picture, where it was encoded.
        crop: top and left of the crop in the resized picture.
        error: why it could not be encoded.
    """

    row: int
    key: str
    members: Mapping[str, bytes] = field(default_factory=dict)
    original_size: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    error: str | None = None


@dataclass(frozen=True)
class Stored:
    """What the metadata of a shard's encoding say: what made it, of which rows (a hash), how many of them failed."""

    encoding: Encoding
    rows: str
    errors: int


def text_member(column: int) -> str:
    """Name of the member with the embeddings of a caption column."""
    return f"text{column}"


def extension(member: str) -> str:
    """What follows the key in a member's name."""
    return f"{member}.safetensors"


def encoded_url(manifest: str, name: str, ending: str) -> str:
    """Of a shard's file in an encoding: ending ".tar" or ".parquet"."""
    folder, slash, file = manifest.rpartition("/")
    return f"{folder}{slash}encoded-{name}/{file.removesuffix(SUFFIX)}{ending}"


def _nulls_url(manifest: str, name: str) -> str:
    return encoded_url(manifest, name, "").rpartition("/")[0] + "/null.safetensors"


def rows_hash(rows: np.ndarray) -> str:
    """Of the manifest rows that are encoded."""
    return xxhash.xxh3_128(rows.astype("<u4").tobytes()).hexdigest()


def write_nulls(manifests: Sequence[Manifest], name: str, nulls: Mapping[str, Tensor], store: Store) -> None:
    """Keep what encoders give for nothing in every folder of the encoding."""
    content = save(dict(nulls))
    for url in sorted({_nulls_url(manifest.url, name) for manifest in manifests}):
        if not store.exists(url) or store.read_all(url) != content:
            store.write(url, content)


def read_nulls(manifest: str, name: str, store: Store) -> dict[int, Outputs]:
    """What encoders give for nothing, by number: sequence (length, width) and pooled (pooled_width,)."""
    return outputs_of(load(store.read_all(_nulls_url(manifest, name))))


def outputs_of(tensors: Mapping[str, Tensor]) -> dict[int, Outputs]:
    """Encoders' outputs by number, of a member's tensors."""
    numbers = sorted({int(key.partition(".")[0]) for key in tensors})
    return {i: (tensors[f"{i}.sequence"], tensors[f"{i}.pooled"]) for i in numbers}


def write_encoded(
    manifest: Manifest,
    name: str,
    encoding: Encoding,
    rows: np.ndarray,
    samples: Iterable[Encoded],
    store: Store,
    max_errors: float,
) -> Stored:
    """Write a shard's part of an encoding: two files, each of which appears whole.

    Args:
        rows: of the manifest that are encoded.
        samples: these, in order.
        max_errors: share of them that may fail.

    Raises:
        ValueError: more failed; nothing is written then.
        StoreError: the store fails.
    """
    table: dict[str, list[Any]] = {column: [None] * manifest.rows for column in _schema(encoding.members).names}
    table["encoded"] = [False] * manifest.rows
    errors: list[Encoded] = []
    with store.composing(encoded_url(manifest.url, name, ".tar")) as path:
        with path.open("wb") as file:
            for sample, places in _write_tar(file, samples):
                row = sample.row
                table["key"][row], table["error"][row], table["encoded"][row] = sample.key, sample.error, True
                if sample.original_size is not None and sample.crop is not None:
                    table["original_height"][row], table["original_width"][row] = sample.original_size
                    table["crop_top"][row], table["crop_left"][row] = sample.crop
                for member, (offset, size) in places.items():
                    table[f"{member}_offset"][row], table[f"{member}_size"][row] = offset, size
                if sample.error is not None:
                    errors.append(sample)
        if len(errors) > max_errors * len(rows):
            raise ValueError(
                f"{len(errors)} of {len(rows)} samples of {redact(manifest.shard)} cannot be encoded, more than"
                f" encode.max_errors={max_errors} allows; the first is {errors[0].key!r}: {errors[0].error}"
            )
    stored = Stored(encoding, rows_hash(rows), len(errors))
    told = {"version": VERSION, "identity": manifest.identity, "digest": manifest.digest, **asdict(stored)}
    content = to_parquet(pa.table(table, _schema(encoding.members)), told)
    store.write(encoded_url(manifest.url, name, ".parquet"), content)
    return stored


def _schema(members: Sequence[str]) -> pa.Schema:
    places = {f"{member}_{what}": pa.int64() for member in members for what in ("offset", "size")}
    framing = dict.fromkeys(("original_height", "original_width", "crop_top", "crop_left"), pa.int32())
    return pa.schema({"key": pa.string(), "encoded": pa.bool_(), "error": pa.string(), **framing, **places})


def _write_tar(file: BinaryIO, samples: Iterable[Encoded]) -> Iterable[tuple[Encoded, dict[str, tuple[int, int]]]]:
    """Write a tar, in which nothing tells when; with each sample, offsets and sizes of its members."""
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for sample in samples:
            places = {}
            for member, data in sample.members.items():
                info = tarfile.TarInfo(f"{sample.key}.{extension(member)}")
                info.size, info.mode = len(data), 0o444
                tar.addfile(info, BytesIO(data))
                padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                places[member] = tar.offset - padded, len(data)
            yield sample, places


def read_stored(manifest: Manifest, name: str, store: Store) -> Stored | None:
    """What is there of a shard in an encoding; None where there is nothing, or only of another state of the shard."""
    if not store.exists(encoded_url(manifest.url, name, ".tar")):
        return None
    told = told_at(encoded_url(manifest.url, name, ".parquet"), store)
    state = (told.get("version"), told.get("identity"), told.get("digest"))
    if state != (VERSION, manifest.identity, manifest.digest):
        return None
    return Stored(Encoding.parse(told["encoding"]), told["rows"], told["errors"])


def read_errors(manifest: Manifest, name: str, store: Store) -> list[tuple[str, str]]:
    """Keys of the samples of a shard that could not be encoded, and why."""
    with open_parquet(encoded_url(manifest.url, name, ".parquet"), store) as file:
        table = file.read(columns=["key", "error"], use_threads=False)
    failed = table.filter(table["error"].is_valid())
    return list(zip(failed["key"].to_pylist(), failed["error"].to_pylist(), strict=True))


def check_encoded(
    manifests: Sequence[Manifest], rows: Sequence[np.ndarray], name: str, wanted: Encoding, store: Store
) -> Encoding:
    """Hold an encoding against what a run would itself compute, and against the samples that it trains on.

    Args:
        manifests: of a source's shards.
        rows: of each, those that the run trains on or validates with.
        wanted: as the run would encode.

    Returns:
        The encoding, the same for all shards.

    Raises:
        ValueError: a shard is not encoded, or otherwise, or not all of the rows are; says what differs.
    """

    def check(i: int) -> Encoding | None:
        if len(rows[i]) == 0:
            return None
        shard, stored = redact(manifests[i].shard), read_stored(manifests[i], name, store)
        if stored is None:
            raise ValueError(_again(name, f"{shard} is not encoded, or was before it changed"))
        if reason := stored.encoding.differs(wanted):
            raise ValueError(_again(name, f"{shard}: {reason}"))
        if stored.rows != rows_hash(rows[i]):
            with open_parquet(encoded_url(manifests[i].url, name, ".parquet"), store) as file:
                there = file.read(columns=["encoded"], use_threads=False)["encoded"].to_numpy()
            if missing := int((~there[rows[i]]).sum()):
                raise ValueError(_again(name, f"{missing} of the samples selected of {shard} are not encoded"))
        return stored.encoding

    with ThreadPoolExecutor(16) as pool:
        found = [encoding for encoding in pool.map(check, range(len(manifests))) if encoding is not None]
    first = found[0]
    for encoding in found:
        if (encoding.dtype, encoding.members) != (first.dtype, first.members):
            raise ValueError(_again(name, "its shards were encoded with different settings"))
    return first


def _again(name: str, reason: str) -> str:
    return (
        f"data.encoded={name} does not fit this run: {reason}. Encode again with this command's overrides"
        " (millrace encode ...), restore the configuration, or leave data.encoded out"
    )


def encoder_outputs(fields: Mapping[str, Any]) -> dict[int, Outputs]:
    """The conditioner's encoders' outputs among a batch's fields, by number: (n, length, width), (n, pooled_width)."""
    numbers = [int(name.split("/")[1]) for name in fields if name.startswith("encoder/") and name.endswith("/pooled")]
    return {i: (fields[f"encoder/{i}/sequence"], fields[f"encoder/{i}/pooled"]) for i in numbers}
