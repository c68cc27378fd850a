"""The checkpoint benchmark, small: it checks that every contestant restores what it saved, and cleans up."""

from pathlib import Path

import pytest

from tools.bench.checkpoint import run


@pytest.mark.slow
def test_every_contestant_saves_and_restores(tmp_path: Path):
    result = run(ranks=2, layers=1, heads=1, repeats=1, folder=str(tmp_path))
    assert set(result["save_durable_s"]) == {"ours", "torch_save", "dcp", "dcp_async"}
    assert set(result["load_s"]) == {"ours", "torch_save", "dcp"}
    for name, ratio in result["load_ratio"].items():
        assert ratio == pytest.approx(result["load_s"]["ours"] / result["load_s"][name], rel=0.1)
    assert result["state_bytes"] == 12 * result["parameters"]
    assert not list(tmp_path.iterdir())
