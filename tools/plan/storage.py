"""How much a run reads: bytes of a sample, as far as manifests tell."""

from typing import Any

import numpy as np
import pyarrow.compute as pc

from conf.schema import build
from data.manifest import manifest_url, read_manifest
from data.parquet import open_parquet
from data.tars import Source, TarData

# Manifests that are read of each source, evenly spread.
_MANIFESTS = 8


def mean_sample_bytes(config: Any) -> float | None:
    """Mean bytes of a sample's members over the sources of a `data` config, by their weights and before any `where`.
    None where a source has no manifests yet."""
    if not config.sources:
        return None
    data: TarData = build(config)
    weights = [source.weight for source in data.sources.values()]
    means = [_mean(source, data) for source in data.sources.values()]
    known = [mean for mean in means if mean is not None]
    return float(np.average(known, weights=weights)) if len(known) == len(means) else None


def _mean(source: Source, data: TarData) -> float | None:
    shards = data.store.expand(source.shards)
    total = rows = 0
    for i in np.unique(np.linspace(0, len(shards) - 1, _MANIFESTS).astype(int)).tolist():
        url = manifest_url(shards[i], data.store, data.manifest_folder)
        if read_manifest(shards[i], url, data.store) is None:
            return None
        with open_parquet(url, data.store) as file:
            sizes = file.read(columns=["sizes"])["sizes"]
        total += pc.sum(pc.list_flatten(sizes)).as_py() or 0
        rows += len(sizes)
    return total / rows if rows else None
