"""The `encode` job: what a run's frozen encoders make of its data, computed once and kept beside the shards.

It takes the very configuration of the run. A shard's encoding is up to date if the shard, the selected rows and all
that its values depend on are what they were; any other is made anew. So a job that was stopped, at any moment, goes on
where it was, and ends with the same bytes. `encode.tasks` shares the shards among commands that know nothing of each
other, as the elements of a job array; the ranks of each share those of its task.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt
from safetensors.torch import save
from torch import Tensor, nn

from conf.errors import ConfigError
from conf.schema import build
from data.buckets import Buckets
from data.cropped import Cropped, Cropping, read_cropped
from data.encoded import (
    FLIPPED,
    IMAGE,
    IMAGE_FLIPPED,
    MOMENTS,
    Dtype,
    Encoded,
    EncoderSettings,
    Encoding,
    read_errors,
    read_stored,
    rows_hash,
    text_member,
    write_encoded,
    write_nulls,
)
from data.manifest import Manifest
from data.parquet import open_parquet
from data.run_directory import RunDirectory, check_name
from data.store import Store, redact, remove_leftovers
from data.tars import Source, TarData
from data.tasks import Task, one_thread
from data.tracking import job_log
from models.conditioner import Conditioner
from trainer.config import Config as TrainConfig
from trainer.distributed import World, first_on_node, joined
from trainer.encodings import of_source, rows_of, wanted_encoding, with_moments
from trainer.engines.networks import prepare_frozen
from trainer.networks import adapts_text, build_conditioner, conditioner_learns, embeds_images
from trainer.rank_progress import rank_progress

# Ranks meet only at the end, some long after the others.
_LONGEST_WAIT_S = 30 * 24 * 3600.0
# The job may share the name of the run that it encodes for, and keeps to a folder of its own there.
_PART = "encode"
# Why samples fail; the exact reasons are as many as there are ways to be damaged.
_UNUSABLE = "unusable picture"
_ERRORS_SHOWN = 20
# Batches that are read at once, so that every bucket fills some.
_WINDOW = 4


@dataclass
class EncodeConfig:
    """`encode` of conf/encode.yaml, whose comments explain the keys."""

    latents: bool
    conditions: bool
    dtype: Dtype
    batch: PositiveInt
    max_errors: NonNegativeFloat
    tasks: PositiveInt
    task: NonNegativeInt | None


@dataclass
class Config(TrainConfig):
    """conf/encode.yaml: that of the run, and `encode`."""

    encode: EncodeConfig


def preflight(config: Any, ranks: int) -> None:
    """Refuse what cannot be encoded. Reads no data, loads no weights and writes nothing.

    Raises:
        ConfigError: names the key at fault.
    """
    check_name(config.name)
    data: TarData = build(config.data)
    if data.encoded is None:
        raise ConfigError("data.encoded must name the encoding: add data.encoded=<name>, here and in train.")
    tasks, task = config.encode.tasks, config.encode.task
    if task is not None and task >= tasks:
        raise ConfigError(f"encode.task={task} is not one of the {tasks} tasks, 0 to {tasks - 1}.")
    latents, conditions = config.encode.latents, config.encode.conditions
    if not latents and not conditions:
        raise ConfigError("encode.latents and encode.conditions are both false: there is nothing to encode.")
    embedded = embeds_images(config.conditioner)
    if embedded and not conditions:
        raise ConfigError(
            "encode.conditions=false: the conditioner embeds pictures, which are not read where latents are; keep both."
        )
    if not latents and not embedded:
        return
    if data.crop != "center":
        raise ConfigError(
            "data.crop=random: what is encoded once has one crop; set data.crop=center here and in train."
        )
    for name, source in data.sources.items():
        if source.manifest == "clips":
            raise ConfigError(
                f"data.sources.{name}.manifest=clips: of videos nothing can be encoded yet, but their captions"
                " (encode.latents=false)."
            )
    if not latents:
        return
    with torch.device("meta"):
        f = with_moments(build(config.first_stage)).downsampling
    for bucket in build(config.buckets).shapes:
        if bucket.height % f or bucket.width % f:
            raise ConfigError(f"buckets: {bucket} is no multiple of {f}, by which the first stage divides sides.")


def run(config: Any) -> None:
    """Encode all shards of all sources, the ranks sharing them."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    with joined(config.device, _LONGEST_WAIT_S) as world:
        encode(config, world)


@dataclass(frozen=True)
class _Job:
    """One shard to encode."""

    manifest: Manifest
    rows: np.ndarray
    encoding: Encoding
    source: Source


def encode(config: Any, world: World) -> None:
    """Bring the encoding `data.encoded` up to date, as one of the world's ranks; those that are done are skipped.

    Raises:
        ConfigError: a shard is in two sources.
        ValueError: too many samples of a shard cannot be encoded.
        StoreError: the store fails.
    """
    started = time.perf_counter()
    data, buckets = build(config.data), build(config.buckets)
    networks, jobs = _prepare(config, data, buckets, world)
    task, part = config.encode.task, _PART
    if task is not None:
        jobs, part = jobs[task :: config.encode.tasks], f"{_PART}/task_{task}"
    if world.is_main:
        for folder in sorted({f"{job.manifest.url.rpartition('/')[0]}/encoded-{data.encoded}" for job in jobs}):
            remove_leftovers(folder)
    one_thread()
    total = sum(len(job.rows) for job in jobs)
    meeting = RunDirectory(config.runs, config.name).path / part / "progress"
    with ExitStack() as resources:
        log = resources.enter_context(job_log(config, part)) if world.is_main else None
        tell = resources.enter_context(rank_progress(meeting, world, total, f"encode {data.encoded}", log))
        _encode_shards(config, data, buckets, networks, jobs, world.device, Task(world.rank, world.size, tell))
    if world.is_main:
        print(summary(data, jobs, time.perf_counter() - started))


def _prepare(config: Any, data: TarData, buckets: Buckets, world: World) -> tuple[dict[str, nn.Module], list[_Job]]:
    """The encoders in place, what they give for nothing kept, and what there is to encode."""
    assert data.encoded is not None
    split = first_on_node(world, lambda: data.open(buckets))
    selections = first_on_node(world, lambda: {name: data.select(name, None) for name in data.sources})
    settings = config.encode
    networks: dict[str, nn.Module] = {}
    if settings.latents:
        with torch.device("meta"):
            networks["first_stage"] = build(config.first_stage)
    if settings.conditions and not (conditioner_learns(config.conditioner) or adapts_text(config)):
        networks["conditioner"] = build_conditioner(config.conditioner, split, world)
    encoding = wanted_encoding(
        config, data, networks.get("first_stage"), networks.get("conditioner"), world.device, settings.dtype
    )
    if encoding.latents is None and not encoding.encoders:
        raise ConfigError("encode.latents=false: the conditioner has no encoder, so that there is nothing to encode.")
    for name, network in networks.items():
        prepare_frozen(name, network, False, config.engine.precision, config.seed, world.device)
    jobs = [
        _Job(manifest, rows, of_source(encoding, source), source)
        for name, source in data.sources.items()
        for manifest, rows in zip(data.manifests(name), rows_of(selections[name]), strict=True)
        if len(rows)
    ]
    url, count = Counter(job.manifest.url for job in jobs).most_common(1)[0]
    if count > 1:
        raise ConfigError(
            f"data.sources: {count} of them have the shard of {redact(url)}, which is encoded for one only."
        )
    if encoding.crops is not None:
        _refuse_videos(jobs, data.store)
    if world.is_main and encoding.encoders:
        nulls = _nulls(networks["conditioner"], getattr(torch, settings.dtype))
        write_nulls([job.manifest for job in jobs], data.encoded, nulls, data.store)
    return networks, jobs


def summary(data: TarData, jobs: Sequence[_Job], seconds: float) -> str:
    """What there is and what went wrong, for people."""
    assert data.encoded is not None
    errors = 0
    lines: list[str] = []
    for job in jobs:
        stored = read_stored(job.manifest, data.encoded, data.store)
        if stored is None or not stored.errors:
            continue
        errors += stored.errors
        if len(lines) < _ERRORS_SHOWN:
            of_shard = read_errors(job.manifest, data.encoded, data.store)
            lines += [f"  {redact(job.manifest.shard)}: {key}: {error}" for key, error in of_shard]
    shown = lines[:_ERRORS_SHOWN]
    if errors > len(shown):
        shown.append(f"  and {errors - len(shown)} more")
    samples = sum(len(job.rows) for job in jobs)
    return "\n".join([f"{len(jobs)} shards, {samples} samples, {errors} of them with errors, {seconds:.1f} s", *shown])


def _refuse_videos(jobs: Sequence[_Job], store: Store) -> None:
    """Raises ValueError for a shard with videos among what is selected of it."""

    def check(job: _Job) -> None:
        with open_parquet(job.manifest.url, store) as file:
            columns = file.read(columns=["frames", "duration"], use_threads=False)
        moving = np.logical_or(*(columns[name].is_valid().to_numpy()[job.rows] for name in columns.column_names))
        if count := int(moving.sum()):
            raise ValueError(
                f"{count} of {len(job.rows)} samples selected of {redact(job.manifest.shard)} are videos, of which"
                " nothing can be encoded yet: leave them out with the source's where, by `duration is null`"
            )

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(check, jobs))


def _encode_shards(
    config: Any,
    data: TarData,
    buckets: Buckets,
    networks: dict[str, nn.Module],
    jobs: Sequence[_Job],
    device: torch.device,
    task: Task,
) -> None:
    """What one rank does."""
    assert data.encoded is not None
    for job in task.own(jobs):
        stored = read_stored(job.manifest, data.encoded, data.store)
        if stored is not None and (stored.encoding, stored.rows) == (job.encoding, rows_hash(job.rows)):
            task.skip(len(job.rows), {_UNUSABLE: stored.errors} if stored.errors else {})
            continue
        red, green, blue = job.source.background
        cropping = Cropping(buckets, data.flip, (red, green, blue), data.max_pixels) if job.encoding.crops else None
        batch = config.encode.batch
        columns = job.encoding.text.columns if job.encoding.text is not None else []
        threads = max(1, data.workers)
        windows = read_cropped(job.manifest, job.rows, data.store, columns, cropping, _WINDOW * batch, threads)
        samples = _encode_samples(windows, networks, job.encoding, batch, device, task)
        write_encoded(job.manifest, data.encoded, job.encoding, job.rows, samples, data.store, config.encode.max_errors)


@torch.no_grad()
def _encode_samples(
    windows: Iterator[list[Cropped]],
    networks: dict[str, nn.Module],
    encoding: Encoding,
    batch: int,
    device: torch.device,
    task: Task,
) -> Iterator[Encoded]:
    """The samples' encodings, in order."""
    dtype = getattr(torch, encoding.dtype)
    conditioner = networks.get("conditioner")

    def latents(images: Tensor) -> list[dict[str, Tensor]]:
        moments = with_moments(networks["first_stage"]).moments(images.float() / 127.5 - 1).to(dtype).cpu()
        return [{"moments": one.contiguous()} for one in moments]

    def embedded(images: Tensor) -> list[dict[str, Tensor]]:
        return _outputs(conditioner, encoding.images or [], images, dtype)

    for window in windows:
        members: list[dict[str, bytes]] = [{} for _ in window]
        if encoding.latents is not None:
            _add_of_pictures(members, window, (MOMENTS, FLIPPED), latents, batch, device)
        if encoding.images is not None:
            _add_of_pictures(members, window, (IMAGE, IMAGE_FLIPPED), embedded, batch, device)
        for number, column in enumerate(encoding.text.columns if encoding.text is not None else []):
            assert encoding.text is not None
            told = [i for i, sample in enumerate(window) if sample.captions[column]]
            for start in range(0, len(told), batch):
                part = told[start : start + batch]
                captions = [window[i].captions[column] for i in part]
                tensors = _outputs(conditioner, encoding.text.encoders, captions, dtype)
                for i, one in zip(part, tensors, strict=True):
                    members[i][text_member(number)] = save(one)
        for sample, own in zip(window, members, strict=True):
            yield Encoded(sample.row, sample.key, own, sample.original_size, sample.crop, sample.error)
        task.advance(len(window), Counter(_UNUSABLE for sample in window if sample.error is not None))


def _add_of_pictures(
    members: list[dict[str, bytes]],
    samples: Sequence[Cropped],
    names: tuple[str, str],
    encode: Callable[[Tensor], list[dict[str, Tensor]]],
    batch: int,
    device: torch.device,
) -> None:
    """Encode the pictures, those of one shape together, into members of these names: of the picture as it is, and
    mirrored."""
    by_shape: dict[tuple[int, ...], list[tuple[int, str, Tensor]]] = {}
    for i, sample in enumerate(samples):
        for name, image in zip(names, sample.images if sample.images is not None else [], strict=False):
            by_shape.setdefault(tuple(image.shape), []).append((i, name, image))
    for alike in by_shape.values():
        for start in range(0, len(alike), batch):
            part = alike[start : start + batch]
            encoded = encode(torch.stack([image for _, _, image in part]).to(device))
            for (i, name, _), tensors in zip(part, encoded, strict=True):
                members[i][name] = save(tensors)


def _outputs(
    conditioner: nn.Module | None,
    encoders: Sequence[EncoderSettings],
    inputs: Sequence[str] | Tensor,
    dtype: torch.dtype,
) -> list[dict[str, Tensor]]:
    """What the encoders give for each input, without the zeros at a sequence's end."""
    assert isinstance(conditioner, Conditioner)
    found: list[dict[str, Tensor]] = [{} for _ in inputs]
    for one in encoders:
        sequences, pooled = (output.to(dtype).cpu() for output in conditioner.numbered()[one.number](inputs))
        for tensors, sequence, vector in zip(found, sequences, pooled, strict=True):
            length = int(sequence.any(dim=1).nonzero().max()) + 1 if sequence.any() else len(sequence)
            # Copies: safetensors takes no two tensors of one memory, as an image's token and pooled vector are.
            tensors[f"{one.number}.sequence"] = sequence[:length].clone()
            tensors[f"{one.number}.pooled"] = vector.clone()
    return found


@torch.no_grad()
def _nulls(conditioner: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the encoders give for nothing."""
    assert isinstance(conditioner, Conditioner)
    found = {}
    for number in conditioner.stored:
        sequence, pooled = conditioner.numbered()[number].null()
        found[f"{number}.sequence"] = sequence[0].to(dtype).cpu().contiguous()
        found[f"{number}.pooled"] = pooled[0].to(dtype).cpu().contiguous()
    return found
