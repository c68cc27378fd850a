"""The `pack` job: the selected samples of some sources as fresh, balanced tars.

A shard is finished or not there; a job that was stopped, at any moment, goes on where it was, and the same selection
gives the same bytes however often it was stopped and however many tasks share the work.
"""

import json
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import xxhash

from conf.errors import mistakes
from data.clips import CLIPS_SUFFIX
from data.manifest import STRUCTURE, Checksum
from data.manifest_reader import ManifestReader
from data.members import ContentError
from data.packing.order import Order, make_order
from data.packing.pictures import Format, Pictures
from data.packing.samples import Contents, Packed, Part, Row, check_columns, fetch, pack
from data.packing.shards import Report, read_report, write_shard
from data.parquet import open_parquet
from data.scores import open_scores, read_scored, score_columns
from data.selection import Selection
from data.store import Store, protocol_of, redact, remove_leftovers
from data.tars import TarData
from data.tasks import Task, Tasks, run_tasks
from data.tracking import LogConfig, RunLog, job_log

VERSION = 1
RECORD = "pack.json"
ROWS_HELD = 1 << 16
"""Samples whose rows a task reads at once, in whole shards: a shuffled shard has samples of nearly all manifests."""
_MEMBERS = ("key", "extensions", "offsets", "sizes", "width", "height")
_PART = ("video", "start_frame", "end_frame", "copy_start_frame", "copy_end_frame")
_FIELDS = {"caption", "url", "original_width", "original_height"}  # for the table, where samples have them
_REPORT_LINES = 20


@dataclass
class Config:
    """What `millrace pack` takes.

    Args:
        out: folder or URL that the shards go to.
        data: sources and where they lie; what is about drawing samples (weights, crops, workers ...) does not matter.
        split: of the samples, by `data.holdout`; "all" takes both.
        shuffle: whether samples are put in a random order, over all shards and sources.
        seed: of that order.
        samples_per_shard: at most; shards differ by one at most.
        bytes_per_shard: balance by bytes instead, about this many.
        short_side: see `Pictures`, as are the next three.
        format: of pictures.
        quality: of pictures.
        verify: decode also what is copied: pictures, texts and JSON.
        clips: how clips within videos (`manifest: clips` of a source) are cut out: "copy" at key frames, not encoded
            anew, or "encode" at exactly their frames.
        columns: of manifests and score files that go into the samples' `.json`.
        max_errors: share of a shard's samples that may be left out because they cannot be read.
        cluster: tasks that share the shards.
        name: of the run, which writes what it tells of itself to <runs>/<name>.
        runs: folder of runs.
        log: whether in W&B too.
    """

    out: str
    data: Any
    split: Literal["train", "validation", "all"] = "train"
    shuffle: bool = True
    seed: int = 0
    samples_per_shard: int = 10_000
    bytes_per_shard: int | None = None
    short_side: int | None = None
    format: Format | None = None
    quality: int = 95
    verify: bool = True
    clips: Literal["copy", "encode"] = "copy"
    columns: list[str] = field(default_factory=list)
    max_errors: float = 0.1
    cluster: Tasks = field(default_factory=Tasks)
    name: str = "pack"
    runs: str = "runs"
    log: LogConfig = field(default_factory=LogConfig)


def run(config: Config) -> None:
    """Pack the selection, then print what was written and what was left out.

    Raises:
        ConfigError: nothing selected, a column that is nowhere, another pack in the folder ...
        ValueError: too many samples of a shard cannot be packed.
        StoreError: a store fails.
        ChildProcessError: a task was killed.
    """
    from conf.schema import build

    started = time.perf_counter()
    with mistakes():
        if not 0 <= config.max_errors <= 1:
            raise ValueError(f"max_errors={config.max_errors} must be from 0 to 1")
        tasks = Tasks(**config.cluster)  # type: ignore[arg-type]
        data: TarData = build(config.data)
        pictures = Pictures(config.short_side, config.format, config.quality, config.verify, data.max_pixels)
        job = prepare(config, data, pictures)
    with job_log(config, tasks.part) as log:
        reports = job.run(tasks, log)
        at = sum(job.order.sizes())
        shards = [(report.name, report.samples, sum(report.failed.values())) for report in reports]
        log.log_table("shards", ["shard", "samples", "left out"], shards, at)
        log.log_table("errors", ["error"], [(error,) for report in reports for error in report.errors], at)
    print(summary(reports, job, time.perf_counter() - started))


@dataclass(frozen=True)
class PackSource:
    """A source to be packed: its selected samples, and what they are to hold."""

    name: str
    selection: Selection
    contents: Contents


@dataclass(frozen=True)
class Job:
    """All that a task needs to know; picklable.

    Args:
        out: where shards go.
        store: of the sources and of `out`.
        sources: in order.
        order: of their samples.
        types: of the columns in the tables beyond the usual ones.
        checksum: of members, for the packed shards' manifests.
        max_errors: share of a shard's samples.
        concurrency: requests that a task has under way at a remote store.
    """

    out: str
    store: Store
    sources: tuple[PackSource, ...]
    order: Order
    types: dict[str, pa.DataType]
    checksum: Checksum | None
    max_errors: float
    concurrency: int

    def tar(self, shard: int) -> str:
        """URL of an output shard."""
        digits = max(5, len(str(self.order.shards - 1)))
        return f"{self.out.rstrip('/')}/{shard:0{digits}d}.tar"

    def run(self, tasks: Tasks, log: RunLog | None = None) -> list[Report]:
        """Write the shards of the tasks that run here, but for those that are finished; their reports, by shard. The
        log gets rows about the progress.

        When all shards are finished, `sizes.json` (open_clip, datacomp) tells how many samples each of them has.
        """
        remove_leftovers(self.out)
        shared = run_tasks(partial(_work, self), tasks, tasks.totals(self.order.sizes()), "pack", log)
        reports = sorted((report for reports in shared for report in reports), key=lambda report: report.name)
        if tasks.task is None:
            everything: list[Report | None] = list(reports)
        else:  # other tasks may have finished theirs; the last of all to get here finds them so
            everything = [read_report(self.tar(shard), self.store) for shard in range(self.order.shards)]
        counts = {report.name: report.samples for report in everything if report is not None}
        if len(counts) == self.order.shards:
            self._write_sizes(json.dumps(counts, indent=4).encode())
        remove_leftovers(self.out)  # once more: a task may outlive a job that is killed by a moment
        return reports

    def _write_sizes(self, content: bytes) -> None:
        url = f"{self.out.rstrip('/')}/sizes.json"
        if not self.store.exists(url) or self.store.read_all(url) != content:
            self.store.write(url, content)

    def rows(self, shards: Sequence[int]) -> list[list[Row]]:
        """The samples of output shards, in order. One pass over the manifests serves all that are asked for."""
        parts = [self.order.positions(shard) for shard in shards]
        positions = np.concatenate(parts)
        of_source, within = self.order.locate(positions)
        found: dict[int, Row] = {}
        for i, source in enumerate(self.sources):
            slots = np.flatnonzero(of_source == i)
            slots = slots[np.argsort(within[slots])]
            places = np.array(source.selection.locate(within[slots]), dtype=np.int64).reshape(-1, 2)
            reader = ManifestReader(self.store, source.selection.manifests, source.selection.digests)
            for place in np.unique(places[:, 0]).tolist():
                here = places[:, 0] == place
                own = slots[here]
                new_rows = _rows(source, reader, place, places[here, 1], positions[own], self.order)
                found.update(zip(own.tolist(), new_rows, strict=True))
        rows = iter([found[slot] for slot in range(len(positions))])
        return [list(islice(rows, len(part))) for part in parts]


def prepare(config: Config, data: TarData, pictures: Pictures) -> Job:
    """Select the samples and put them in order, and see to it that the folder is this pack's.

    Raises:
        ValueError: nothing selected, a column that is nowhere, or another pack in the folder.
        StoreError: a store fails.
    """
    columns = tuple(column.lower() for column in config.columns)
    check_columns(columns)
    split = None if config.split == "all" else config.split
    sources = []
    for name, source in data.sources.items():
        red, green, blue = source.background
        contents = Contents(tuple(source.captions), columns, pictures, (red, green, blue), config.clips)
        sources.append(PackSource(name, data.select(name, split), contents))
    order = make_order(
        [source.selection for source in sources],
        data.store,
        config.seed if config.shuffle else None,
        config.samples_per_shard,
        config.bytes_per_shard,
        data.cache_folder,
    )
    types, scores = _find_columns(data, {*columns, *(c for source in sources for c in source.contents.captions)})
    job = Job(
        out=config.out,
        store=data.store,
        sources=tuple(sources),
        order=order,
        types={column: types[column] for column in columns},
        checksum=data.checksum,
        max_errors=config.max_errors,
        concurrency=data.concurrency,
    )
    _claim(config.out, _record(config, data, job, scores), data.store)
    return job


def _record(config: Config, data: TarData, job: Job, scores: dict[str, str]) -> dict[str, Any]:
    """All that the packed bytes depend on."""
    return {
        "version": VERSION,
        "split": config.split,
        "holdout": data.holdout,
        "sources": {
            source.name: {
                "where": data.sources[source.name].where,
                "selection": source.selection.fingerprint,
                "samples": len(source.selection),
                "captions": list(source.contents.captions),
                "background": list(source.contents.background),
            }
            for source in job.sources
        },
        "order": job.order.fingerprint,
        "seed": job.order.seed,
        "shards": job.order.shards,
        "pictures": asdict(job.sources[0].contents.pictures),
        "clips": config.clips,
        "columns": sorted(job.types),
        "scores": scores,
        "checksum": data.checksum,
    }


def summary(reports: Sequence[Report], job: Job, seconds: float) -> str:
    """What was written and what was left out, for people."""
    samples, failed = sum(r.samples for r in reports), sum(sum(r.failed.values()) for r in reports)
    lines = [f"{redact(job.out)}: {len(reports)} of {job.order.shards} shards, {samples} samples, {seconds:.1f} s"]
    if failed:
        lines.append(
            f"{failed} samples could not be read and were left out (status and error_message in the .parquet):"
        )
        errors = [error for report in reports for error in report.errors]
        lines += [f"  {error}" for error in errors[:_REPORT_LINES]]
        if failed > _REPORT_LINES:
            lines.append(f"  and {failed - min(len(errors), _REPORT_LINES)} more")
    return "\n".join(lines)


def _work(job: Job, task: Task) -> list[Report]:
    """One task's shards."""
    sizes = job.order.sizes()
    reports = {shard: read_report(job.tar(shard), job.store) for shard in task.own(range(job.order.shards))}
    due = [shard for shard, report in reports.items() if report is None]
    for shard, report in reports.items():
        if report is not None:
            task.skip(sizes[shard], report.failed)
    while due:
        held = max(1, int(np.searchsorted(np.cumsum([sizes[shard] for shard in due]), ROWS_HELD, side="right")))
        now, due = due[:held], due[held:]
        for shard, rows in zip(now, job.rows(now), strict=True):
            most_errors = job.max_errors * len(rows)
            reports[shard] = write_shard(
                job.tar(shard), _packed(job, rows, task), job.store, job.types, job.checksum, most_errors
            )
    return [report for report in reports.values() if report is not None]


def _rows(
    source: PackSource, reader: ManifestReader, shard: int, rows: np.ndarray, positions: np.ndarray, order: Order
) -> list[Row]:
    """Rows of one shard of a source."""
    columns = _columns(source.contents)
    parts = _PART if source.selection.manifests[shard].endswith(CLIPS_SUFFIX) else ()
    values = reader.rows(shard, rows, [*_MEMBERS, "checksums", *parts, *columns])
    made = []
    for i, position in enumerate(positions.tolist()):
        key, extensions = values["key"][i], values["extensions"][i]
        checksums = values["checksums"][i] or [None] * len(extensions)
        made.append(
            Row(
                source=source.name,
                shard=source.selection.shards[shard],
                key=key,
                new_key=order.new_key(key, position),
                members=list(zip(extensions, values["offsets"][i], values["sizes"][i], checksums, strict=True)),
                size=(values["height"][i], values["width"][i]),
                values={name: values[name][i] for name in columns},
                part=_part({name: values[name][i] for name in parts}) if parts else None,
            )
        )
    return made


def _part(values: Mapping[str, Any]) -> Part:
    copyable = (values["copy_start_frame"], values["copy_end_frame"])
    span = (values["start_frame"], values["end_frame"])
    return Part(values["video"], span, copyable if copyable[0] is not None else None)


def _packed(job: Job, rows: Sequence[Row], task: Task) -> Iterator[Packed]:
    contents = {source.name: source.contents for source in job.sources}
    for row, fetched in _fetched(rows, job.store, job.concurrency):
        packed = pack(row, fetched, contents[row.source])
        task.advance(1, {} if packed.status == "success" else {packed.status: 1})
        yield packed


def _fetched(
    rows: Sequence[Row], store: Store, concurrency: int
) -> Iterator[tuple[Row, dict[str, bytes] | ContentError]]:
    """Each sample's members, in order: one after the other from a local disk, else with requests in parallel."""
    if all(protocol_of(row.shard) in ("file", "pipe") for row in rows):
        for row in rows:
            yield row, fetch(row, store)
        return
    under_way: deque[tuple[Row, Future]] = deque()
    with ThreadPoolExecutor(concurrency) as pool:
        for row in rows:
            under_way.append((row, pool.submit(fetch, row, store)))
            if len(under_way) > concurrency:
                first, future = under_way.popleft()
                yield first, future.result()
        for first, future in under_way:
            yield first, future.result()


def _columns(contents: Contents) -> list[str]:
    """Manifest and score columns that packing a source reads."""
    return sorted(_FIELDS | {*contents.captions, *contents.columns})


def _find_columns(data: TarData, columns: set[str]) -> tuple[dict[str, pa.DataType], dict[str, str]]:
    """Types of the columns, and for those that are in score files, a hash of what these hold (a selection's fingerprint
    knows of manifests only)."""
    kinds: dict[str, set[pa.DataType]] = {column: set() for column in columns - STRUCTURE.keys()}
    hashes: dict[str, xxhash.xxh3_128] = {}
    for name in data.sources if kinds else ():
        manifests = data.manifests(name)
        missing = set(kinds)
        for manifest in manifests:
            with open_parquet(manifest.url, data.store) as file:
                own = {f.name: f.type for f in file.schema_arrow if f.name in kinds}
            for column, kind in own.items():
                kinds[column].add(kind)
            missing -= own.keys()
        for filter_name, schema in score_columns(manifests[0].url, data.store).items() if missing else ():
            scored = {f.name: f.type for f in schema if f.name in missing}
            for column, kind in scored.items():
                kinds[column].add(kind)
                for manifest in manifests:
                    found = read_scored(manifest, filter_name, data.store)
                    if found is None:
                        open_scores(manifest, filter_name, data.store).close()  # says what is wrong with them
                    told = found.content if found is not None else "none"
                    hashes.setdefault(column, xxhash.xxh3_128()).update(told.encode())
            missing -= scored.keys()
    if nowhere := sorted(column for column, found in kinds.items() if not found):
        raise ValueError(f"columns: no manifest and no score file has a column {nowhere[0]!r}")
    types = {column: _common(found) for column, found in kinds.items()}
    return types, {column: hashed.hexdigest() for column, hashed in sorted(hashes.items())}


def _common(kinds: set[pa.DataType]) -> pa.DataType:
    if len(kinds) == 1:
        return next(iter(kinds))
    numbers = all(pa.types.is_integer(kind) or pa.types.is_floating(kind) for kind in kinds)
    return pa.float64() if numbers else pa.string()


def _claim(out: str, record: dict[str, Any], store: Store) -> None:
    """Note in the folder what is packed there; refuse one that holds anything else."""
    url = f"{out.rstrip('/')}/{RECORD}"
    record = json.loads(json.dumps(record))
    if not store.exists(url):
        if store.glob(f"{out.rstrip('/')}/*.tar"):
            raise ValueError(f"out={redact(out)} holds tars that no pack has written: choose another folder")
        store.write(url, json.dumps(record, indent=4, ensure_ascii=False).encode())
    found = json.loads(store.read_all(url))
    if found != record:
        differs = sorted(name for name in found.keys() | record.keys() if found.get(name) != record.get(name))
        raise ValueError(
            f"out={redact(out)} holds another pack ({', '.join(differs)} differ, see its {RECORD}): choose another"
            " folder, or delete that one"
        )
