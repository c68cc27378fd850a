"""Validation loss that can be compared: the same samples and noise, whatever the step, run, slices or world size."""

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.batch import Batch, PlannedSlice, fuse
from data.hashing import mix64, text64
from data.reader import BadSliceError, SliceReader
from data.tars import TarSplit
from trainer.callbacks import averaged
from trainer.distributed import all_reduce_sum
from trainer.ema import Ema
from trainer.engines.base import Engine
from trainer.objectives.base import Compares, Summarizes, Validates
from trainer.rehearsal import Fields, blank

log = logging.getLogger(__name__)

# Validation is the same for every run on the same data: its order and noise have a seed of their own, and a "step" that
# is no training step's.
_SEED = 0
VALIDATION_STEP = -1


class Validation:
    """The losses of held-out samples.

    Args:
        batches: this rank's share of them; all ranks must have the same number of batches. Samples whose key is "" only
            fill a batch up, and do not count.
        alive: called after each batch: validation may take long.
    """

    def __init__(self, batches: Sequence[Batch], alive: Callable[[], None] = lambda: None):
        self.batches, self._alive = batches, alive

    def __call__(self, objective: Validates, engine: Engine, ema: Ema, length: str | None) -> dict[str, float]:
        """`val/<name>`, averages over all samples; collective, the same on every rank.

        Args:
            length: the average whose weights to validate; None takes the weights themselves.
        """
        with averaged(ema, length):
            return mean_losses(self.batches, objective, engine.networks, engine.device, self._alive)


@torch.no_grad()
def mean_losses(
    batches: Sequence[Batch],
    objective: Validates,
    networks: Mapping[str, nn.Module],
    device: torch.device,
    alive: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """`val/<name>`, averages over all ranks' samples; see `Validation`. Collective, the same on every rank."""
    sums: dict[str, float] = defaultdict(float)
    vectors: dict[str, Tensor] = {}
    rows: dict[str, list[Tensor]] = defaultdict(list)
    for batch in batches:
        counts = torch.tensor([key != "" for key in batch.keys], device=device)
        sums["count"] += float(counts.sum())
        for name, values in objective.validation_losses(networks, batch.to(device)).items():
            if values.ndim > 1 and isinstance(objective, Compares):
                rows[name].append(values[counts])
            elif values.ndim > 1:
                vectors[name] = vectors.get(name, 0) + values[counts].double().sum(0)
            else:
                sums[f"val/{name}"] += values[counts].double().sum().item()
        alive()
    sums = all_reduce_sum(sums, device)
    count = sums.pop("count")
    row = {name: total / count for name, total in sums.items()}
    if vectors and isinstance(objective, Summarizes):
        if dist.is_initialized():
            for total in vectors.values():
                dist.all_reduce(total)
        averages = {name: total / count for name, total in vectors.items()}
        row |= {f"val/{name}": value for name, value in objective.summary(averages).items()}
    if isinstance(objective, Compares):
        together = {name: _of_all_ranks(torch.cat(parts)) for name, parts in rows.items()}
        row |= {f"val/{name}": value for name, value in objective.compare(together).items()}
    return row


def _of_all_ranks(rows: Tensor) -> Tensor:
    """All ranks' rows, of which they may have different numbers."""
    if not dist.is_initialized():
        return rows
    gathered: list[Tensor] = [rows] * dist.get_world_size()
    dist.all_gather_object(gathered, rows.cpu())
    return torch.cat(gathered).to(rows.device)


def validation_samples(split: TarSplit, count: int) -> list[PlannedSlice]:
    """The first `count` samples of a split, or all it has, each once and as a slice of its own, so that it has
    draws of its own. Their order is that of a hash of source and row, which mixes sources, shards and buckets."""
    tables = [compiled.bucket.reshape(-1)[: compiled.rows] for compiled in split.compiled.values()]
    source_of = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
    rows = np.concatenate([np.arange(len(table)) for table in tables])
    names = np.array([text64(name) for name in split.compiled], dtype=np.uint64)
    order = np.argsort(mix64(_SEED, names[source_of], rows), kind="stable")[:count]
    return [
        PlannedSlice(VALIDATION_STEP, lane, source, int(tables[source][row]), np.array([row]))
        for lane, (source, row) in enumerate(zip(source_of[order].tolist(), rows[order].tolist(), strict=True))
    ]


def validation_batches(split: TarSplit, samples: int, size: int, rank: int, world: int) -> list[Batch]:
    """This rank's share of the first `samples` samples of a split, as batches of one bucket each.

    Every batch has `size` samples, the shape of training's passes, and every rank as many batches as the others: black
    pictures that do not count fill them up, and stand in for samples that cannot be read.

    Args:
        samples: how many at most; fewer where the split has fewer.
        size: samples in a batch.
    """
    by_bucket: dict[int, list[PlannedSlice]] = {}
    for planned in validation_samples(split, samples):
        by_bucket.setdefault(planned.bucket, []).append(planned)
    passes = [part[i : i + size] for _, part in sorted(by_bucket.items()) for i in range(0, len(part), size)]
    reader = split.reader(_SEED, crop="center", flip=False)
    batches = [_read(reader, part, size, split.data.blank_fields) for part in passes[rank::world]]
    spare = blank(split.buckets[passes[0][0].bucket], size, fields=split.data.blank_fields)
    return batches + [spare] * (math.ceil(len(passes) / world) - len(batches))


def _read(reader: SliceReader, part: Sequence[PlannedSlice], size: int, fields: Fields) -> Batch:
    batches = []
    for planned in part:
        try:
            batches.append(reader[planned].batch)
        except BadSliceError as error:
            log.warning("validation goes without a sample: %s", error)
    if len(batches) < size:
        batches.append(blank(reader.buckets[part[0].bucket], size - len(batches), fields=fields))
    return fuse(batches)
