"""The data of a run: sources of tars, from a config to a plan and a loader."""

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np
from torch import Tensor

from data.buckets import Bucket, Buckets
from data.clips import ensure_clips
from data.compiled import Compiled, compile_sizes
from data.dataset import Loader
from data.decode import MAX_PIXELS
from data.encoded import Encoding
from data.encoded_reader import EncodedReader
from data.fields import Field, blank_fields
from data.index import ensure_indexed
from data.manifest import STRUCTURE, Checksum, Manifest
from data.manifest_reader import ManifestReader
from data.mixing import Mixture
from data.parquet import open_parquet
from data.plan import Plan, PlanSource
from data.reader import ReaderSource, SliceReader
from data.scores import open_scores, score_columns
from data.selection import NothingSelectedError, Selection, Split, select
from data.store import Store, cache_root

log = logging.getLogger(__name__)

_CHUNK = 1 << 20
_NAME = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True)
class Source:
    """One source of samples.

    Args:
        shards: tars, folders of tars, globs or brace patterns; paths or URLs.
        where: SQL predicate over manifest and score columns; null keeps all.
        manifest: "samples", or the "clips" that the filter `cuts` found in them.
        weight: its share of the slices is this over the sum of all sources' weights.
        caption: a manifest column, or several with weights; `caption` is the `.txt` member or else the JSON's caption.
        background: RGB below transparent pixels.
        fields: what its samples come with beside these, where it is told otherwise than in `TarData`'s fields.
    """

    shards: str | list[str]
    where: str | None = None
    manifest: Literal["samples", "clips"] = "samples"
    weight: float = 1.0
    caption: str | dict[str, float] = "caption"
    background: list[int] = field(default_factory=lambda: [255, 255, 255])
    fields: dict[str, Field] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.manifest not in ("samples", "clips"):
            raise ValueError(f"manifest {self.manifest!r} must be 'samples' or 'clips'")
        if len(self.background) != 3 or not all(0 <= value <= 255 for value in self.background):
            raise ValueError(f"background {self.background} must be three numbers from 0 to 255")
        if not self.captions or not all(weight > 0 for weight in self.captions.values()):
            raise ValueError(f"caption {self.caption} must name at least one column, each with a positive weight")

    @property
    def captions(self) -> dict[str, float]:
        """Columns and weights; columns in lower case, as manifests have them."""
        given = {self.caption: 1.0} if isinstance(self.caption, str) else self.caption
        return {column.lower(): weight for column, weight in given.items()}


class TarData:
    """Tars of images with captions, local or in object stores.

    Args:
        sources: by name.
        holdout: share of the samples, by a hash of their keys, that only validation sees.
        workers: reading processes per rank; 0 reads within the training process.
        prefetch: steps prepared ahead.
        crop: offsets of crops, uniform ("random") or in the middle ("center").
        flip: mirror half of the images.
        max_pixels: larger images are refused by their header.
        max_bad_in_a_row: so many unusable samples one after the other stop the run.
        log_keys: write which keys each slice held to `keys.jsonl`.
        block: consecutive selected rows that stay together in every epoch's order.
        window: blocks that are shuffled together.
        replan: on resume, accept data, lanes or weights that changed since the checkpoint, and follow a new plan.
        checksum: have `index` compute members' checksums, which reading then verifies.
        storage_options: fsspec options by protocol; no keys or tokens.
        allow_pipe: allow `pipe:` URLs, which run shell commands.
        manifest_folder: where manifests go that cannot lie beside their shards.
        cache_folder: for selections; the user's cache folder by default.
        concurrency: requests that a worker has under way at a remote store.
        encoded: name of an encoding (`millrace encode`) to read latents, the conditioner's embeddings or both from.
        fields: what samples come with beside picture and caption, by name (data/fields.py).
    """

    def __init__(
        self,
        sources: dict[str, Source],
        holdout: float = 0.0,
        workers: int = 2,
        prefetch: int = 2,
        crop: Literal["random", "center"] = "random",
        flip: bool = False,
        max_pixels: int = MAX_PIXELS,
        max_bad_in_a_row: int = 16,
        log_keys: bool = False,
        block: int = 256,
        window: int = 16,
        replan: bool = False,
        checksum: Checksum | None = None,
        storage_options: dict[str, dict] | None = None,
        allow_pipe: bool = False,
        manifest_folder: str | None = None,
        cache_folder: str | None = None,
        concurrency: int = 16,
        encoded: str | None = None,
        fields: dict[str, Field] | None = None,
    ) -> None:
        if not sources:
            raise ValueError(
                "data.sources is empty: name a source and its tars, e.g. data.sources.photos.shards=/data/photos"
            )
        if not 0 <= holdout < 1:
            raise ValueError(f"data.holdout={holdout}: a share of the samples, at least 0 and below 1")
        at_least = {
            "workers": (workers, 0),
            "prefetch": (prefetch, 1),
            "max_pixels": (max_pixels, 1),
            "max_bad_in_a_row": (max_bad_in_a_row, 1),
            "block": (block, 1),
            "window": (window, 1),
            "concurrency": (concurrency, 1),
        }
        for key, (value, least) in at_least.items():
            if value < least:
                raise ValueError(f"data.{key}={value}: it must be at least {least}")
        self.sources = {name: _source(name, given) for name, given in sources.items()}
        Mixture([source.weight for source in self.sources.values()], seed=0)  # refuses weights that are no shares
        self.holdout, self.workers, self.prefetch = holdout, workers, prefetch
        self.crop, self.flip, self.max_pixels = crop, flip, max_pixels
        self.max_bad_in_a_row, self.log_keys = max_bad_in_a_row, log_keys
        self.block, self.window, self.replan, self.checksum = block, window, replan, checksum
        self.manifest_folder, self.cache_folder, self.concurrency = manifest_folder, cache_folder, concurrency
        if encoded is not None and not _NAME.fullmatch(encoded):
            raise ValueError(f"data.encoded={encoded!r}: a name of letters, digits, '-', '_' and '.'")
        self.encoded, self.fields = encoded, fields or {}
        self._check_fields()
        self.encodings: dict[str, Encoding] = {}
        """By source, what is read instead of pictures or captions; set by who has held it against the run's own."""
        self.store = Store(storage_options, allow_pipe, cache_folder=cache_folder)
        self._manifests: dict[str, list[Manifest]] = {}

    @property
    def encoding(self) -> Encoding | None:
        """An encoding whose `fields` are those of all sources."""
        return next(iter(self.encodings.values()), None)

    def fields_of(self, name: str) -> dict[str, Field]:
        """The fields of a source."""
        return self.fields | self.sources[name].fields

    def show_fields(self) -> None:
        """Let samples come with what shows on a contact sheet those of their fields that cannot be looked at."""
        for known in (self.fields, *(source.fields for source in self.sources.values())):
            known |= {f"{name}, shown": shown for name, one in known.items() if (shown := one.shown()) is not None}

    def blank_fields(self, size: int, bucket: Bucket) -> dict[str, Tensor | list]:
        """`Batch.fields` of samples that stand for none."""
        encoded = self.encoding.fields(size, bucket) if self.encoding is not None else {}
        return encoded | blank_fields(self.fields_of(next(iter(self.sources))), size, bucket)

    def _check_fields(self) -> None:
        first, *others = self.sources
        kinds = {field: type(one) for field, one in self.fields_of(first).items()}
        for name in others:
            if kinds != {field: type(one) for field, one in self.fields_of(name).items()}:
                raise ValueError(
                    f"data.sources.{name}.fields: all sources must have the same kinds of fields, which are those of"
                    f" {first!r}: {', '.join(kinds) or 'none'}"
                )

    def manifests(self, name: str) -> list[Manifest]:
        """The manifests of a source's shards, which are indexed if they are not yet."""
        if name not in self._manifests:
            shards = self.store.expand(self.sources[name].shards)
            found = ensure_indexed(shards, self.store, self.manifest_folder, self.checksum)
            if self.sources[name].manifest == "clips":
                found = ensure_clips(found, self.store)
            self._check_columns(name, found)
            for one in self.fields_of(name).values():
                one.check(found, self.store)
            self._manifests[name] = found
        return self._manifests[name]

    def select(self, name: str, split: Split | None) -> Selection:
        """The samples of a source that its `where` keeps, of one split, or of both if None.

        Raises:
            ValueError: as `open`; names the source.
        """
        source, holdout = self.sources[name], self.holdout if split is not None else 0.0
        try:
            manifests = self.manifests(name)
            return select(manifests, self.store, source.where, holdout, split or "train", self.cache_folder)
        except NothingSelectedError as error:
            raise NothingSelectedError(f"source {name!r}: {error}") from error
        except ValueError as error:
            raise ValueError(f"source {name!r}: {error}") from error

    def open(self, buckets: Buckets, split: Split = "train") -> "TarSplit":
        """Select and compile one split of all sources. All ranks may do so at once.

        The validation split goes without sources that have no held-out sample, and says so in a warning.

        Raises:
            ValueError: no shards, nothing to train on in a source, nothing held out in any of them, a wrong `where`, a
                caption column that is nowhere.
            StoreError: a store fails.
        """
        selections, compiled = {}, {}
        for name in self.sources:
            try:
                chosen = self.select(name, split)
            except NothingSelectedError as error:
                if split == "train":
                    raise
                log.warning("validation goes without %s", error)
                continue
            selections[name] = chosen
            compiled[name] = compile_sizes(
                _sizes(chosen), len(chosen), buckets, cache_root(self.cache_folder), chosen.fingerprint, self.block
            )
        if not selections:
            raise ValueError(
                f"no sample is held out for validation at data.holdout={self.holdout}: raise it, or set it to 0 to"
                " train without"
            )
        return TarSplit(self, buckets, selections, compiled)

    def _check_columns(self, name: str, manifests: Sequence[Manifest]) -> None:
        captions = self.sources[name].captions
        fields = self.fields_of(name).values()
        asked = {column for one in fields if not one.optional for column in one.columns}
        missing = (captions.keys() | asked) - STRUCTURE.keys()
        seen: set[str] = set()
        for manifest in manifests:  # a field may occur in some shards only
            if not missing:
                return
            with open_parquet(manifest.url, self.store) as file:
                seen.update(file.schema_arrow.names)
            missing = missing - seen
        for filter_name, schema in score_columns(manifests[0].url, self.store).items() if missing else ():
            seen.update(schema.names)
            if missing & set(schema.names):
                open_scores(manifests[0], filter_name, self.store).close()  # are they of the shard as it is now?
        missing = missing - seen
        if missing:
            what = "caption column" if min(missing) in captions else "column for a field,"
            raise ValueError(f"there is no {what} {min(missing)!r}; the columns are {', '.join(sorted(seen))}")


class TarSplit:
    """One split of the data, selected and compiled for some buckets.

    Args:
        data: whose split it is.
        buckets: what its images are cropped to.
        selections: by source; without those that have no sample of this split.
        compiled: by source, the same ones.
    """

    def __init__(
        self, data: TarData, buckets: Buckets, selections: dict[str, Selection], compiled: dict[str, Compiled]
    ) -> None:
        self.data, self.buckets, self.selections, self.compiled = data, buckets, selections, compiled

    def shares(self) -> dict[Bucket, float]:
        """The buckets that have samples and their shares of them, the commonest first."""
        totals = self.totals()
        order = np.argsort(-totals, kind="stable")
        return {self.buckets[i]: float(totals[i] / totals.sum()) for i in order.tolist() if totals[i]}

    def totals(self) -> np.ndarray:
        """(buckets,) int64, samples of each bucket, all sources together."""
        return np.sum([compiled.totals for compiled in self.compiled.values()], axis=0)

    def captions(self, limit: int) -> list[str]:
        """Captions of the split, at most `limit` of each source and evenly spread over it; empty ones are left out."""
        found: list[str] = []
        for name, selection in self.selections.items():
            columns = list(self.data.sources[name].captions)
            reader = ManifestReader(self.data.store, selection.manifests, selection.digests)
            positions = np.linspace(0, len(selection) - 1, min(limit, len(selection))).astype(np.int64)
            by_shard: dict[int, list[int]] = {}
            for shard, row in selection.locate(positions):
                by_shard.setdefault(shard, []).append(row)
            for shard, rows in by_shard.items():
                values = reader.rows(shard, rows, columns)
                found += [caption for column in columns for caption in values[column] if caption]
        return found

    def plan(self, lanes: int, slice_size: int, seed: int, start: int = 0) -> Plan:
        """The plan that begins at step `start`."""
        sources = [PlanSource(name, table, self.data.sources[name].weight) for name, table in self.compiled.items()]
        return Plan(sources, lanes, slice_size, seed, self.data.window, start, self.made_of())

    def made_of(self) -> dict[str, str]:
        """What fields are of beside the samples' shards, by field and source."""
        found = {}
        for name in self.compiled:
            manifests = self.data.manifests(name)
            for key, one in self.data.fields_of(name).items():
                if (told := one.made_of(manifests, self.data.store)) is not None:
                    found[f"field {key} of {name}"] = told
        return found

    def loader(
        self,
        plan: Plan,
        lanes: range,
        pin_memory: bool = False,
        crop: Literal["random", "center"] | None = None,
        flip: bool | None = None,
        workers: int | None = None,
    ) -> Loader:
        """Reads some lanes of a plan of this split. `crop`, `flip` and `workers` are the config's unless given."""
        data = self.data
        return Loader(
            self.reader(plan.seed, crop, flip),
            plan,
            lanes,
            workers=data.workers if workers is None else workers,
            prefetch=data.prefetch,
            pin_memory=pin_memory,
            log_keys=data.log_keys,
            max_bad_in_a_row=data.max_bad_in_a_row,
        )

    def reader(
        self,
        seed: int,
        crop: Literal["random", "center"] | None = None,
        flip: bool | None = None,
        encoded: bool = True,
    ) -> SliceReader:
        """Reads planned slices of this split, whose draws have that seed. `crop` and `flip` are the config's unless
        given; without `encoded` the pictures and captions themselves are read."""
        data = self.data
        encodings = {name: self._encoded(name) if encoded else None for name in self.selections}
        return SliceReader(
            [
                ReaderSource(
                    name, selection, source.captions, _color(source.background), encodings[name], data.fields_of(name)
                )
                for name, selection in self.selections.items()
                for source in [data.sources[name]]
            ],
            self.buckets,
            data.store,
            seed,
            crop=data.crop if crop is None else crop,
            flip=data.flip if flip is None else flip,
            max_pixels=data.max_pixels,
            concurrency=data.concurrency,
        )

    def _encoded(self, name: str) -> EncodedReader | None:
        data = self.data
        if name not in data.encodings:
            return None
        assert data.encoded is not None
        return EncodedReader(data.store, self.selections[name], data.encoded, data.encodings[name])


def _source(name: str, given: Source | dict[str, Any]) -> Source:
    """A source as the config has it, a plain mapping."""
    if isinstance(given, Source):
        return given
    known = [f.name for f in fields(Source)]
    for key in given:
        if key not in known:
            raise ValueError(f"data.sources.{name}.{key} is no key of a source; it takes {', '.join(known)}")
    if "shards" not in given:
        raise ValueError(f"data.sources.{name}.shards is missing: the source's tars")
    try:
        return Source(**given)
    except ValueError as error:
        raise ValueError(f"data.sources.{name}: {error}") from error


def _sizes(selection: Selection) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, len(selection), _CHUNK):
        part = slice(start, start + _CHUNK)
        yield selection.width[part], selection.height[part]


def _color(values: list[int]) -> tuple[int, int, int]:
    red, green, blue = values
    return red, green, blue
