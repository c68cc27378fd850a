"""The data plane as the loop sees it: batches on the device, the waiting counted, the records written."""

from pathlib import Path

import torch
import torch.distributed as dist

from data.batch import Batch
from data.dataset import Loader
from data.records import RecordWriter, write_quarantine
from trainer.distributed import is_main
from trainer.meter import Meter


class Serving:
    """Serves this rank's slices from a loader.

    Args:
        loader: of the rank's lanes.
        folder: of the run, to whose record files the main rank writes.
        start: the first step to be served.
        meter: is told how long the loop waited.
        device: where batches go.
    """

    def __init__(self, loader: Loader, folder: Path, start: int, meter: Meter, device: torch.device):
        self._loader = loader
        self._folder = folder
        self._meter = meter
        self._device = device
        self._writer = RecordWriter(folder, start) if is_main() else None

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

    def rewind(self, step: int) -> None:
        """Forget the records of `step` and later ones: they are served again, or passed over."""
        self._loader.drain()
        if self._writer is not None:
            self._writer = RecordWriter(self._folder, step)

    def close(self) -> None:
        """Stop the workers, and write quarantine that `flush` has not written, for an error ends the run. Each rank
        writes its own: others may no longer answer."""
        write_quarantine(self._folder, self._loader.drain().quarantine)
        self._loader.close()
