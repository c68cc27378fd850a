"""Serving between a loader and the loop: waiting is counted, the records of all ranks land in one file."""

from pathlib import Path

import torch
import torch.distributed as dist

from data.batch import Batch
from data.buckets import Bucket
from data.records import KeysLine, QuarantineLine, Records
from data.run_directory import read_jsonl
from tests.trainer.ranks import ranks
from trainer.meter import Meter
from trainer.objectives.base import Phase
from trainer.rehearsal import blank
from trainer.serving import Serving

CPU = torch.device("cpu")


class OneLane:
    """A loader of one lane, the rank's, that waits 2 s for each step."""

    def __init__(self) -> None:
        self.waited = 0.0
        self._records = Records()

    def step(self, step: int) -> list[Batch]:
        lane = dist.get_rank()
        self.waited += 2.0
        self._records.keys.append(KeysLine(step, lane, "scenes", "8x8", [f"{step}-{lane}"]))
        if step == 1 and lane == 1:
            self._records.quarantine.append(QuarantineLine(1, 1, 0, "scenes", "a.tar", "bad", "torn", "1-1"))
        return [blank(Bucket(8, 8), 1, lane)]

    def drain(self) -> Records:
        records, self._records = self._records, Records()
        return records


def serve(folder: Path) -> float:
    meter = Meter((Phase("denoise", ()),), 2, CPU)
    serving = Serving(OneLane(), folder, 0, meter, CPU)  # type: ignore[arg-type]
    for step in (0, 1):
        assert len(serving.step(step)) == 1
    serving.flush(2)
    for step in (2, 3):
        serving.step(step)
    serving.flush(4)
    serving.step(4)
    serving.rewind(1)  # forgets what was written of steps 1 to 3, and step 4, which was not written yet
    for step in (1, 5):
        serving.step(step)
    serving.flush(6)
    return float(meter.row(6)["data_wait"] or 0)


def test_records_of_all_ranks_stand_in_order_and_once(tmp_path):
    shares = ranks(2).run(serve, tmp_path)
    assert shares[0] == shares[1] > 1, "14 seconds of waiting, so the loader says, in less than a second"
    keys = [(row["step"], row["lane"], row["keys"]) for row in read_jsonl(tmp_path / "keys.jsonl")]
    assert keys == [(step, lane, [f"{step}-{lane}"]) for step in (0, 1, 5) for lane in (0, 1)]
    (quarantined,) = read_jsonl(tmp_path / "quarantine.jsonl")
    assert (quarantined["key"], quarantined["replaced_by"]) == ("bad", "1-1")
