"""Nodes that are not fit are named and left out; jobs that get nowhere are given up."""

import pytest

from slurm.health import Report, verdict
from slurm.queue import seconds
from tests.slurm.submitting import Submitted


def sound(*others: str) -> Report:
    return Report([], 100.0, dict.fromkeys(others, 5.0))


def test_sound_nodes_pass():
    assert verdict({"a": sound("b", "c"), "b": sound("a", "c"), "c": sound("a", "b")}, 1.0) == {}


def test_a_node_is_bad_by_its_own_words_by_silence_and_by_its_clock():
    fast, slow = sound("a"), sound("a")
    fast.clock, slow.clock = 160.0, 40.0
    broken = Report(["3 of 4 GPUs", "cannot write to /tmp: No space left on device"])
    bad = verdict({"a": sound("b"), "b": fast, "c": None, "d": broken, "e": sound("a"), "f": slow}, None)
    assert bad == {
        "b": "its clock is +60 s off the others'",
        "c": "no answer",
        "d": "3 of 4 GPUs, cannot write to /tmp: No space left on device",
        "f": "its clock is -60 s off the others'",
    }


def test_of_a_ring_the_node_between_two_bad_links_is_bad():
    reports = {"a": sound("b", "d"), "b": sound("a", "c"), "c": sound("b", "d"), "d": sound("c", "a")}
    reports["b"].links = {"a": 0.0, "c": 0.5}
    reports["a"].links["b"] = 0.0
    reports["c"].links["b"] = 0.5
    assert verdict(reports, 1.0) == {"b": "no link to a, 0.5 GB/s to c"}


def test_slurms_times():
    assert [seconds(text) for text in ("9:05", "1:00:00", "2-01:00:01", "UNLIMITED", "INVALID")] == [
        545,
        3600,
        176401,
        None,
        None,
    ]


@pytest.mark.slow
@pytest.mark.cluster
def test_a_node_whose_disk_is_full_is_left_out(lab, folder, tmp_path):
    lab.on_node(1, "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path))
    try:
        run = Submitted(lab, folder, "left_out", "cluster.nodes=2", f"cluster.env.TMPDIR={tmp_path}")
        assert run.wait() == "COMPLETED", run.told()
    finally:
        lab.on_node(1, "umount", str(tmp_path))
    ended = [row for row in run.chain() if row["event"] == "ended"]
    assert [row["outcome"] for row in ended] == ["unhealthy", "finished"]
    assert ended[0]["reason"] == f"node1: cannot write to {tmp_path}: No space left on device"
    assert [row["nodes"] for row in run.chain() if row["event"] == "started"] == [
        ["node1", "node2"],
        ["node2", "node3"],
    ]


@pytest.mark.slow
@pytest.mark.cluster
def test_a_job_that_makes_no_progress_is_given_up_with_a_reason(lab, folder):
    fails = ["objective._target_=tests.trainer.faulty.FailsAt", "+objective.steps=[1]"]
    run = Submitted(lab, folder, "in_vain", *fails, "cluster.attempts=2", "cluster.health=false")
    assert run.wait() == "FAILED", run.told()
    assert [row["event"] for row in run.chain()].count("started") == 2
    assert run.chain()[-1]["event"] == "given up"
    assert "2 starts made no progress beyond 0 of 4" in run.chain()[-1]["reason"]
    assert "failed on purpose" in run.chain()[-1]["reason"]


@pytest.mark.slow
@pytest.mark.cluster
def test_a_mistake_that_shows_only_there_is_not_tried_again(lab, folder):
    run = Submitted(lab, folder, "mistaken", "device=cuda", "cluster.health=false")
    assert run.wait() == "FAILED", run.told()
    assert [row["event"] for row in run.chain()].count("started") == 1
    assert "no CUDA device" in run.chain()[-1]["reason"]
