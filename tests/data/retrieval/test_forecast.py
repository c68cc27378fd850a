"""What an index is told to take, held against the index."""

import re

import pytest
from vectors import clustered, save_database

from conf.errors import ConfigError
from data.retrieval.database import index_path
from data.retrieval.forecast import forecast, rows_of
from data.retrieval.index import IndexBuilder, IndexSettings, plan_index
from data.tasks import Tasks, run_tasks
from tests.data.curation.tiny_models import save_clip
from tools.cli import execute

WIDTH = 128


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    return save_database(tmp_path_factory.mktemp("database"), [clustered(8000, WIDTH, 80)])


@pytest.mark.parametrize("kind", ["flat", "ivf_flat", "ivf_sq8", "hnsw"])
def test_memory_is_that_of_the_index_and_probes_are_near_those_that_it_needs(database, kind):
    settings = IndexSettings(kind=kind, k=10, queries=100)
    told = forecast(8000, WIDTH, settings, rows_of(database), 2000)
    assert [one.rows for one in told.measured] == [500, 1000, 2000]
    builder = IndexBuilder(database, "image", settings)
    builder.train(1)
    run_tasks(builder.add, Tasks(1), [8000], "index")
    made = builder.finish(1)
    builder.clean()
    gib = index_path(database.folder, "image").stat().st_size / (1 << 30)
    assert told.told.gib == pytest.approx(gib, rel=0.05)
    assert told.plan == plan_index(8000, WIDTH, settings) and min(told.told.add, told.told.ms) > 0
    assert told.told.recall >= 0.95
    if kind.startswith("ivf"):
        assert [one.cells for one in told.measured] == [64, 128, 128] and told.told.cells == 256
        assert 0.3 < told.told.search["probes"] / made["search"]["probes"] < 3
        work = [min(one.rows, 50 * one.cells) * one.cells for one in (*told.measured, told.told)]
        assert told.told.train / max(one.train for one in told.measured) < 2 * work[-1] / work[0]


def test_too_few_rows_tell_nothing(database):
    with pytest.raises(ConfigError, match="300 embeddings are too few"):
        forecast(10**6, WIDTH, IndexSettings(), rows_of(database), 300)


def test_the_job_tells_and_writes_nothing(database, capsys):
    before = set(database.folder.rglob("*"))
    line = ["retrieve", f"database={database.folder}", "dry_run=true", "rows=20927907", "trial=2000", "log.wandb=null"]
    assert execute([*line, "index.memory_gib=8", "index.queries=50"]) == 0
    said = capsys.readouterr().out
    assert "IVF16384,SQ8" in said and "GiB on disk" in said
    (line,) = (one.split() for one in said.splitlines() if "<- told" in one)
    assert line[:2] == ["20,927,907", "16,384"]
    assert float(line[2]) == pytest.approx((WIDTH + 8) * 20927907 / 2**30, 0.01)
    assert set(database.folder.rglob("*")) == before
    assert execute(["retrieve", "database=nowhere", "dry_run=true"]) == 2
    assert "dry_run=true tells of rows=" in capsys.readouterr().err
    assert execute(["retrieve", f"database={database.folder}", "dry_run=true", "rows=5000", "width=64"]) == 2
    assert f"width=64, and the database {database.folder} has embeddings of {WIDTH}" in capsys.readouterr().err


def test_a_models_configuration_tells_the_width_and_its_weights_need_not_be_there(tmp_path, capsys):
    line = ["retrieve", f"database={tmp_path}/db", "dry_run=true", "rows=50000000", "trial=500", "index.queries=20"]
    (save_clip(tmp_path / "clip") / "model.safetensors").unlink()
    assert execute([*line, f"embedding.model={tmp_path}/clip"]) == 0
    assert f"{2 * 10 * 50000000 / 2**30:.2f} GiB on disk" in capsys.readouterr().out
    assert execute([*line, f"embedding.model={tmp_path}"]) == 2
    assert re.search(r"embedding\.model=.* cannot be read.*: give width=\.\.\.", capsys.readouterr().err)
    assert execute([*line, f"embedding.model={tmp_path}", "width=12"]) == 0
    assert f"{2 * 12 * 50000000 / 2**30:.2f} GiB on disk" in capsys.readouterr().out
