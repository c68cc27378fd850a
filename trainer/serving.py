"""The data plane as the loop sees it: batches on the device, the waiting counted, the records written."""

import torch
import torch.distributed as dist

from data.batch import Batch
from data.dataset import Loader
from data.records import RecordWriter
from trainer.meter import Meter


class Serving:
    """Serves this rank's slices from a loader.

    Args:
        loader: of the rank's lanes.
        writer: of the run's record files, on the main rank only.
        meter: is told how long the loop waited.
        device: where batches go.
    """

    def __init__(self, loader: Loader, writer: RecordWriter | None, meter: Meter, device: torch.device):
        self._loader = loader
        self._writer = writer
        self._meter = meter
        self._device = device

    def step(self, step: int) -> list[Batch]:
        """See `trainer.loop.Loader`."""
        waited = self._loader.waited
        batches = self._loader.step(step)
        self._meter.add_wait(self._loader.waited - waited)
        return [batch.to(self._device) for batch in batches]

    def flush(self, step: int) -> None:
        """Gather the records of all ranks and write them; collective."""
        records = self._loader.drain()
        gathered = [records]
        if dist.is_initialized() and dist.get_world_size() > 1:
            gathered = [records] * dist.get_world_size() if self._writer is not None else None  # type: ignore[assignment]
            dist.gather_object(records, gathered)
        if self._writer is not None:
            self._writer.write(gathered)

    def close(self) -> None:
        """Stop the workers."""
        self._loader.close()
