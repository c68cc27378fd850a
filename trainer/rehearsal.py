"""A pass over every shape before the first step, without an update.

Running out of memory, or compiling too often, shows in the first minute and not on the first day.
"""

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from data.batch import Batch
from data.buckets import Bucket
from data.draws import slice_draws
from data.encoded import MOMENTS
from trainer.engines.base import Engine
from trainer.objectives.base import Objective

log = logging.getLogger(__name__)

Fields = Callable[[int, Bucket], Mapping[str, Tensor | list]]


def rehearse(
    objective: Objective,
    engine: Engine,
    buckets: Sequence[Bucket],
    slice_size: int,
    slices: int,
    arrange: Callable[[list[Batch]], list[Batch]],
    steps: int,
    fields: Fields = lambda size, bucket: {},
    alive: Callable[[], None] = lambda: None,
) -> None:
    """Forward and backward through all phases at each shape; collective. Gradients are dropped.

    Args:
        buckets: shapes that occur in the run.
        slice_size: samples in a slice.
        slices: that a rank serves in a step; as many as one pass takes are rehearsed.
        arrange: slices to passes, as in training.
        steps: of the run: its last step is rehearsed, for what begins late.
        fields: of samples that stand for none.
        alive: called after each shape: compiling takes long.

    Raises:
        ValueError: a shape does not fit into the GPU's memory; names it.
        RuntimeError: torch's own: a block compiles too often.
    """
    for bucket in buckets:
        blanks = (blank(bucket, slice_size, lane, fields, steps - 1) for lane in range(slices))
        first = arrange([batch.to(engine.device) for batch in blanks])[0]
        for phase in objective.phases:
            try:
                with engine.accumulating(phase, last=True):
                    losses = objective.losses(phase, engine.networks, first)
                    engine.backward(phase, losses.per_sample.sum() / len(first))
            except torch.cuda.OutOfMemoryError as error:
                raise ValueError(
                    f"a pass of {len(first)} samples of {bucket} does not fit into this GPU's memory: lower pass_size,"
                    " or turn on engine.activation_checkpointing"
                ) from error
            engine.discard(phase)
        alive()
    log.info("rehearsed %d shapes", len(buckets))


def blank(bucket: Bucket, size: int, lane: int = 0, fields: Fields = lambda size, bucket: {}, step: int = 0) -> Batch:
    """Black pictures without captions, in a bucket's shape, or zeros as their encoding; with `fields` of as many
    samples of the bucket. Their draws are some step's: draws are keyed, and drawing takes nothing from that step."""
    own = fields(size, bucket)
    return Batch(
        draws=slice_draws(0, step, lane, size),
        keys=[""] * size,
        captions=[""] * size,
        images=torch.zeros(size, 0 if MOMENTS in own else 3, bucket.height, bucket.width, dtype=torch.uint8),
        original_size=torch.tensor([[bucket.height, bucket.width]] * size),
        crop=torch.zeros(size, 2, dtype=torch.int64),
        fields=dict(own),
    )
