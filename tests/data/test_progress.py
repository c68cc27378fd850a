"""What a job's log says about its progress, against what it was told."""

import time

import pytest

from data import progress
from data.progress import Advance, Progress
from data.run_directory import RunDirectory, read_jsonl
from data.tracking import RunLog


def test_rows_count_samples_and_errors_and_what_an_earlier_run_did_is_not_speed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "ROW_INTERVAL", 0.0)
    directory = RunDirectory(str(tmp_path), "run")
    started = time.monotonic()
    with RunLog(directory, {}, None, "samples") as log, Progress(1000, "toil", log) as told:
        told.tell(Advance(600, skipped=600, errors={"torn": 2}))
        time.sleep(0.2)
        told.tell(Advance(100, errors={"torn": 1, "blank": 3}))
        time.sleep(0.2)
        told.tell(Advance(50))
    ended = time.monotonic()
    rows = read_jsonl(directory.metrics)
    assert [row["samples"] for row in rows] == [600, 700, 750]
    assert {(row["job"], row["total"]) for row in rows} == {("toil", 1000)}
    assert [row["errors"] for row in rows] == [2, 6, 6]
    assert (rows[0]["errors/torn"], rows[2]["errors/torn"], rows[2]["errors/blank"]) == (2, 3, 3)
    assert [row["skipped"] for row in rows] == [600, 600, 600]
    assert rows[0]["samples_per_s"] == 0 and rows[0]["eta_s"] is None
    for row, before, samples in ((rows[1], rows[0], 100), (rows[2], rows[1], 50)):
        assert row["samples_per_s"] == pytest.approx(samples / (row["seconds"] - before["seconds"]))
    assert rows[2]["eta_s"] == pytest.approx(250 * rows[2]["seconds"] / 150)
    assert 0.4 <= rows[2]["seconds"] <= ended - started
    assert "errors=6" in capsys.readouterr().err


def test_rows_are_seconds_apart_and_the_last_tells_the_end(tmp_path):
    directory = RunDirectory(str(tmp_path), "run")
    with RunLog(directory, {}, None, "samples") as log, Progress(200, "toil", log) as told:
        for _ in range(200):
            told.tell(Advance(1))
    assert [row["samples"] for row in read_jsonl(directory.metrics)] == [200]
