"""Progress over real ranks that share their work unevenly."""

import time
from pathlib import Path

import torch
import torch.distributed as dist

from data import progress
from data.progress import Advance
from data.run_directory import RunDirectory, read_jsonl
from data.tracking import RunLog
from tests.trainer.ranks import ranks
from trainer.distributed import World
from trainer.rank_progress import rank_progress


def work_unevenly(folder: Path) -> float:
    """Rank 0 is done at once, rank 2 is not for seconds. When this rank was let go, after all were."""
    rank, size = dist.get_rank(), dist.get_world_size()
    world = World(rank, size, rank, torch.device("cpu"), launched=False)
    progress.ROW_INTERVAL = 0.0
    log = RunLog(RunDirectory(str(folder), f"of_rank_{rank}"), {}, None, "samples") if world.is_main else None
    with rank_progress(folder / "meeting", world, 60, "share", log) as tell:
        tell(Advance(5, skipped=5, errors={"torn": 1}))
        for _ in range(5 * rank):
            time.sleep(0.3)
            tell(Advance(3, errors={"torn": 1} if rank == 2 else {}))
    progress.ROW_INTERVAL = 5.0
    return time.time()


def test_one_bar_and_one_log_follow_all_ranks(tmp_path):
    ends = ranks(3).run(work_unevenly, tmp_path)
    rows = read_jsonl(tmp_path / "of_rank_0" / "metrics.jsonl")
    samples = [row["samples"] for row in rows]
    assert samples[0] == 5 and samples[-1] == 60 and samples == sorted(samples)
    assert any(15 < count < 60 for count in samples)  # while rank 0 had nothing left to do
    assert (rows[-1]["errors"], rows[-1]["errors/torn"]) == (13, 13)
    assert max(ends) - min(ends) < 2
    assert not (tmp_path / "meeting").exists()
