"""Clips within videos: a manifest of their own beside each shard's, with a row for each shot that the filter `cuts`
found. To filters, selections and the `pack` job a clip is a sample like any other.

A clip's row has the members and the JSON fields of its video, and

    key                   <the video's key>-<n>, n from 0 on
    key_hash              the video's: all clips of a video fall into one split
    video                 the video's key
    start, end            seconds from the video's first frame
    start_frame, end_frame
    copy_start, copy_end, copy_start_frame, copy_end_frame
                          the longest part that can be cut out without encoding anew (see `Timeline.copyable`); null if
                          there is none
    frames, duration      of the clip
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from data.manifest import SUFFIX, Manifest, read_manifest, write
from data.parquet import open_parquet, told_by
from data.scores import open_scores, read_scored
from data.store import Store, redact

CLIPS_SUFFIX = ".clips" + SUFFIX
CUTS = "cuts"
"""The filter whose score files say where clips lie, in the column `clips`."""

_SECONDS, _FRAME = pa.float64(), pa.uint32()
CLIP = pa.struct(
    {
        "start": _SECONDS,
        "end": _SECONDS,
        "start_frame": _FRAME,
        "end_frame": _FRAME,
        "copy_start": _SECONDS,
        "copy_end": _SECONDS,
        "copy_start_frame": _FRAME,
        "copy_end_frame": _FRAME,
    }
)
"""An entry of the column `clips`."""


def is_clips(manifest: Manifest) -> bool:
    """Whether the rows of a manifest are clips within its samples."""
    return manifest.url.endswith(CLIPS_SUFFIX)


def ensure_clips(manifests: Sequence[Manifest], store: Store) -> list[Manifest]:
    """The clips manifests of all shards, in order; those that are missing or out of date are written.

    Raises:
        ValueError: cuts were not looked for in a shard as it is now.
        StoreError: the store fails.
    """
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda manifest: _up_to_date(manifest, store), manifests))


def _up_to_date(manifest: Manifest, store: Store) -> Manifest:
    scored = read_scored(manifest, CUTS, store)
    if scored is None:
        raise ValueError(
            f"{redact(manifest.shard)}: nothing is known of the clips in it: run `millrace curate` with filter=[{CUTS}]"
        )
    url = manifest.url.removesuffix(SUFFIX) + CLIPS_SUFFIX
    made_from = {"digest": manifest.digest, CUTS: scored.content}
    found = read_manifest(manifest.shard, url, store)
    if found is not None and found.identity == manifest.identity:
        with open_parquet(url, store) as file:
            if told_by(file)["made_from"] == made_from:
                return found
    table = _table(manifest, store)
    return write(table, manifest.shard, manifest.identity, (), store, url, manifest.checksum, made_from)


def _table(manifest: Manifest, store: Store) -> pa.Table:
    with open_parquet(manifest.url, store) as file:
        videos = file.read(use_threads=False).replace_schema_metadata(None)
    with open_scores(manifest, CUTS, store) as file:
        clips = file.read(columns=["clips"], use_threads=False)["clips"].to_pylist()
    rows = [row for row, found in enumerate(clips) for _ in found or ()]
    flat = [clip for found in clips for clip in found or ()]
    own = pa.array(flat, CLIP)
    columns = {field.name: own.field(field.name) for field in CLIP}
    keys = videos["key"].to_pylist()
    columns["video"] = pa.array([keys[row] for row in rows], pa.string())
    columns["key"] = pa.array(
        [f"{keys[row]}-{n}" for row, found in enumerate(clips) for n in range(len(found or ()))], pa.string()
    )
    columns["frames"] = pa.array([clip["end_frame"] - clip["start_frame"] for clip in flat], _FRAME)
    columns["duration"] = pa.array([clip["end"] - clip["start"] for clip in flat], _SECONDS)
    replaced = {"key", "frames", "duration"}
    table = videos.take(pa.array(rows, pa.int64()))
    kept = {(f"json_{n}" if n in columns and n not in replaced else n): table[n] for n in table.column_names}
    return pa.table({**kept, **columns})
