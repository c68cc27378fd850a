"""Record files: ordered, gathered, and cut back on resume."""

import json
from pathlib import Path

import pytest

from data.records import KeysLine, QuarantineLine, Records, RecordWriter


def keys(step: int, lane: int) -> KeysLine:
    return KeysLine(step, lane, "source", "64x64", [f"é{step}", "x" * (step % 7 * 30)])


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_records_of_all_ranks_are_written_in_order_of_step_and_lane(tmp_path):
    writer = RecordWriter(tmp_path)
    ranks = [Records(keys=[keys(s, lane) for s in range(3) for lane in mine]) for mine in ((0, 1), (2, 3))]
    writer.write(ranks)
    writer.write([Records(keys=[keys(3, 0)])])
    found = lines(tmp_path / "keys.jsonl")
    assert [(line["step"], line["lane"]) for line in found] == [(s, n) for s in range(3) for n in range(4)] + [(3, 0)]
    assert found[4] == {"step": 1, "lane": 0, "source": "source", "bucket": "64x64", "keys": ["é1", "x" * 30]}


def test_quarantine_lines_tell_everything(tmp_path):
    line = QuarantineLine(3, 1, 5, "photos", "s3://b/0.tar", "0007", "cannot decode", "0009")
    RecordWriter(tmp_path).write([Records(quarantine=[line])])
    assert lines(tmp_path / "quarantine.jsonl") == [
        {
            "step": 3,
            "lane": 1,
            "slot": 5,
            "source": "photos",
            "shard": "s3://b/0.tar",
            "key": "0007",
            "reason": "cannot decode",
            "replaced_by": "0009",
        }
    ]
    assert not (tmp_path / "keys.jsonl").exists()


@pytest.mark.parametrize("start", [0, 1, 5, 29, 30, 31])
@pytest.mark.parametrize("cut", [0, 1, 20])
def test_a_resume_keeps_exactly_the_earlier_steps(tmp_path, start, cut):
    written = [keys(step, lane) for step in range(30) if step % 3 for lane in range(2)]
    RecordWriter(tmp_path).write([Records(keys=written)])
    path = tmp_path / "keys.jsonl"
    if cut:  # as a crash within the last write leaves it
        path.write_bytes(path.read_bytes()[:-cut])
        written.pop()
    before = path.read_bytes()
    RecordWriter(tmp_path, start)
    kept = path.read_bytes()
    assert before.startswith(kept)
    assert [(line["step"], line["lane"]) for line in lines(path)] == [
        (k.step, k.lane) for k in written if k.step < start
    ]


def test_a_damaged_line_costs_only_what_follows_it(tmp_path):
    RecordWriter(tmp_path).write([Records(keys=[keys(step, 0) for step in range(10)])])
    path = tmp_path / "keys.jsonl"
    rows = path.read_bytes().splitlines(keepends=True)
    rows[9] = b"\0" * 20 + b"\n"
    path.write_bytes(b"".join(rows))
    RecordWriter(tmp_path, 100)
    assert [line["step"] for line in lines(path)] == list(range(9))
