"""Presets of where clauses: composed into a source, parsed, and selecting what they say."""

import numpy as np
import pyarrow as pa
import pytest
from shard_files import picture, write_tar

from conf.compose import ROOT, compose
from conf.errors import ConfigError
from data.index import ensure_indexed
from data.scores import write_scores
from data.selection import select
from data.store import Store
from data.where import Where

PRESETS = sorted(path.stem for path in (ROOT / "where").glob("*.yaml"))


def preset(name: str) -> str:
    config = compose("train", ["data.sources.photos.shards=/nowhere", f"+where@data.sources.photos={name}"])
    assert config.data.sources.photos.keys() == {"shards", "where"}
    return config.data.sources.photos.where


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_where_clause_of_the_source_that_it_is_put_at(name):
    columns = Where(preset(name)).columns
    assert set(columns) == {"label"} if name.startswith("imagenet_") else len(columns) >= 3


@pytest.mark.parametrize(("name", "classes"), [("dogs", 130), ("mammals", 242), ("animals", 398)])
def test_presets_of_imagenet_keep_so_many_of_its_classes(name, classes):
    import duckdb

    kept = duckdb.sql(f"SELECT count(*) FROM range(1000) classes(label) WHERE {preset(f'imagenet_{name}')}").fetchall()
    assert kept == [(classes,)]


def test_two_sources_may_have_presets_of_their_own_and_an_unknown_one_is_an_error():
    sources = compose("train", ["+where@data.sources.a=svd", "+where@data.sources.b=sd3"]).data.sources
    assert "motion" in sources.a.where and "semantic_rank" in sources.b.where
    with pytest.raises(ConfigError, match=r"Group 'where' has no choice 'svdd' \(did you mean 'svd'\?\)"):
        compose("train", ["+where@data.sources.a=svdd"])


@pytest.mark.parametrize(
    ("name", "keep"),
    [
        (
            "svd",
            lambda t: (
                (t["motion"] > quantile(t["motion"], 0.25))
                & (t["clip_aesthetic"] > quantile(t["clip_aesthetic"], 0.25))
                & (t["clip_similarity"] > quantile(t["clip_similarity"], 0.5))
                & (t["text_area"] <= quantile(t["text_area"], 0.75))
            ),
        ),
        ("sd3", lambda t: (t["clip_nsfw"] < 0.1) & (t["clip_aesthetic"] >= 4.5) & (t["semantic_rank"] == 0)),
        ("laion_aesthetics", lambda t: (t["width"] >= 512) & (t["clip_aesthetic"] > 5) & (t["clip_watermark"] < 0.5)),
    ],
)
def test_a_preset_keeps_what_its_paper_keeps(tmp_path, name, keep):
    rng, rows, store = np.random.default_rng(0), 200, Store()
    sides = np.where(rng.random(rows) < 0.5, 512, 511)
    write_tar(tmp_path / "00000.tar", [(f"{i:03d}.png", _flat(side)) for i, side in enumerate(sides.tolist())])
    (manifest,) = ensure_indexed(store.expand(str(tmp_path)), store)
    values = {column: rng.random(rows) for column in ("motion", "clip_similarity", "clip_nsfw", "clip_watermark")}
    values["text_area"] = np.where(rng.random(rows) < 0.6, 0.0, rng.random(rows))  # most pictures have none
    values["clip_aesthetic"] = 5 + rng.normal(size=rows)
    values["semantic_rank"] = rng.integers(0, 3, rows)
    write_scores(manifest, "drawn", pa.table(values), store)
    chosen = select([manifest], store, preset(name), cache_folder=str(tmp_path / "cache"))
    assert chosen.row.tolist() == np.flatnonzero(keep(values | {"width": sides})).tolist()


def quantile(values: np.ndarray, p: float) -> float:
    return float(np.quantile(values, p, method="inverted_cdf"))


_FILES: dict[int, bytes] = {}


def _flat(side: int) -> bytes:
    if side not in _FILES:
        _FILES[side] = picture(side, 512, form="PNG", mode="L")
    return _FILES[side]
