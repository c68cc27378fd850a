"""The `encode` job: what a run's frozen encoders make of its data, computed once and kept beside the shards.

It takes the very configuration of the run. A shard's encoding is up to date if the shard, the selected rows and all
that its values depend on are what they were; any other is made anew. So a job that was stopped, at any moment, goes on
where it was, and ends with the same bytes.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import NonNegativeFloat, PositiveInt
from safetensors.torch import save
from torch import Tensor, nn

from conf.errors import ConfigError
from conf.schema import build
from data.buckets import Buckets
from data.cropped import Cropped, Cropping, read_cropped
from data.encoded import (
    FLIPPED,
    MOMENTS,
    Dtype,
    Encoded,
    Encoding,
    read_errors,
    read_stored,
    rows_hash,
    text_member,
    write_encoded,
    write_nulls,
)
from data.manifest import Manifest
from data.run_directory import RunDirectory, check_name
from data.store import redact, remove_leftovers
from data.tars import Source, TarData
from data.tasks import Task, one_thread
from data.tracking import job_log
from models.conditioner import Conditioner
from trainer.config import Config as TrainConfig
from trainer.distributed import World, first_on_node, joined
from trainer.encodings import encoder_settings, encoding_of, latent_settings, rows_of, with_moments
from trainer.engines.networks import prepare_frozen
from trainer.networks import build_conditioner
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
    text: bool
    dtype: Dtype
    batch: PositiveInt
    max_errors: NonNegativeFloat


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
    if not config.encode.latents and not config.encode.text:
        raise ConfigError("encode.latents and encode.text are both false: there is nothing to encode.")
    if not config.encode.latents:
        return
    if data.crop != "center":
        raise ConfigError(
            "data.crop=random: what is encoded once has one crop; set data.crop=center here and in train."
        )
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
    if world.is_main:
        for folder in sorted({f"{job.manifest.url.rpartition('/')[0]}/encoded-{data.encoded}" for job in jobs}):
            remove_leftovers(folder)
    one_thread()
    total = sum(len(job.rows) for job in jobs)
    meeting = RunDirectory(config.runs, config.name).path / _PART / "progress"
    with ExitStack() as resources:
        log = resources.enter_context(job_log(config, _PART)) if world.is_main else None
        tell = resources.enter_context(rank_progress(meeting, world, total, f"encode {data.encoded}", log))
        _encode_shards(config, data, buckets, networks, jobs, world.device, Task(world.rank, world.size, tell))
    if world.is_main:
        print(summary(data, jobs, time.perf_counter() - started))


def _prepare(config: Any, data: TarData, buckets: Buckets, world: World) -> tuple[dict[str, nn.Module], list[_Job]]:
    """The encoders in place, the embeddings of "" kept, and what there is to encode."""
    assert data.encoded is not None
    split = first_on_node(world, lambda: data.open(buckets))
    selections = first_on_node(world, lambda: {name: data.select(name, None) for name in data.sources})
    settings, precision = config.encode, config.engine.precision
    networks: dict[str, nn.Module] = {}
    latents = encoders = None
    if settings.latents:
        with torch.device("meta"):
            networks["first_stage"] = build(config.first_stage)
        latents = latent_settings(config, data, networks["first_stage"], world.device)
    if settings.text:
        networks["conditioner"] = build_conditioner(config.conditioner, split, world)
        encoders = encoder_settings(networks["conditioner"])
    for name, network in networks.items():
        prepare_frozen(name, network, False, precision, config.seed, world.device)
    jobs = [
        _Job(manifest, rows, encoding_of(source, settings.dtype, precision, latents, encoders), source)
        for name, source in data.sources.items()
        for manifest, rows in zip(data.manifests(name), rows_of(selections[name]), strict=True)
        if len(rows)
    ]
    url, count = Counter(job.manifest.url for job in jobs).most_common(1)[0]
    if count > 1:
        raise ConfigError(
            f"data.sources: {count} of them have the shard of {redact(url)}, which is encoded for one only."
        )
    if world.is_main and "conditioner" in networks:
        nulls = _encode_texts(networks["conditioner"], [""], getattr(torch, settings.dtype), trim=False)[0]
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
        cropping = Cropping(buckets, data.flip, (red, green, blue), data.max_pixels) if config.encode.latents else None
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
    for window in windows:
        members: list[dict[str, bytes]] = [{} for _ in window]
        if encoding.latents is not None:
            _add_latents(members, window, networks["first_stage"], batch, dtype, device)
        for number, column in enumerate(encoding.text.columns if encoding.text is not None else []):
            told = [i for i, sample in enumerate(window) if sample.captions[column]]
            for start in range(0, len(told), batch):
                part = told[start : start + batch]
                captions = [window[i].captions[column] for i in part]
                for i, tensors in zip(part, _encode_texts(networks["conditioner"], captions, dtype), strict=True):
                    members[i][text_member(number)] = save(tensors)
        for sample, own in zip(window, members, strict=True):
            yield Encoded(sample.row, sample.key, own, sample.original_size, sample.crop, sample.error)
        task.advance(len(window), Counter(_UNUSABLE for sample in window if sample.error is not None))


def _add_latents(
    members: list[dict[str, bytes]],
    samples: Sequence[Cropped],
    first_stage: nn.Module,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Encode the pictures, those of one shape together."""
    by_shape: dict[tuple[int, ...], list[tuple[int, str, Tensor]]] = {}
    for i, sample in enumerate(samples):
        for member, image in zip((MOMENTS, FLIPPED), sample.images if sample.images is not None else [], strict=False):
            by_shape.setdefault(tuple(image.shape), []).append((i, member, image))
    for alike in by_shape.values():
        for start in range(0, len(alike), batch):
            part = alike[start : start + batch]
            images = torch.stack([image for _, _, image in part]).to(device).float() / 127.5 - 1
            moments = with_moments(first_stage).moments(images).to(dtype).cpu()
            for (i, member, _), one in zip(part, moments, strict=True):
                members[i][member] = save({"moments": one.contiguous()})


@torch.no_grad()
def _encode_texts(
    conditioner: nn.Module, captions: Sequence[str], dtype: torch.dtype, trim: bool = True
) -> list[dict[str, Tensor]]:
    """What each text encoder gives for each caption; without the zeros at a sequence's end if `trim`."""
    assert isinstance(conditioner, Conditioner)
    encoders: dict[int, Any] = dict(enumerate(conditioner.encoder_modules))
    found: list[dict[str, Tensor]] = [{} for _ in captions]
    for number in conditioner.stored:
        sequences, pooled = (output.to(dtype).cpu() for output in encoders[number](captions))
        for tensors, sequence, vector in zip(found, sequences, pooled, strict=True):
            length = int(sequence.any(dim=1).nonzero().max()) + 1 if trim and sequence.any() else len(sequence)
            tensors[f"{number}.sequence"] = sequence[:length].contiguous()
            tensors[f"{number}.pooled"] = vector.contiguous()
    return found
