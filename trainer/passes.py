"""From the slices of a step to forward passes: fused or split, the same number on every rank."""

from data.batch import Batch, fuse
from trainer.objectives.base import Scope


class Passes:
    """Arranges a rank's slices as passes of at most `size` samples.

    Ranks meet in collectives at every pass of a sharded network, so all must take the same number. Splitting keeps
    that; fusing slices does only where all have one shape, since a rank does not know the others' buckets.

    Args:
        size: samples in a pass; None is a slice, or with "global" scope all that a rank has in a step.
        slice_size: samples in a slice.
        lanes: slices that each rank serves in a step.
        buckets: shapes that occur.
        scope: of the objective.

    Raises:
        ValueError: a size that the scope or the buckets forbid, or that does not divide evenly.
    """

    def __init__(self, size: int | None, slice_size: int, lanes: int, buckets: int, scope: Scope):
        whole = slice_size * lanes if scope == "global" else slice_size
        size = whole if size is None else size
        if size != whole and scope != "sample":
            raise ValueError(
                f"pass_size={size}: with its scope, {scope!r}, this objective takes passes of {whole} samples"
            )
        if size < slice_size and slice_size % size:
            raise ValueError(f"pass_size={size} does not divide the slice of {slice_size} samples (batch / lanes)")
        if size > slice_size and (size % slice_size or lanes % (size // slice_size)):
            raise ValueError(f"pass_size={size} does not group {lanes} slices of {slice_size} samples evenly")
        if size > slice_size and buckets > 1 and scope == "global":
            raise ValueError(
                f"with its scope, {scope!r}, this objective takes a rank's {lanes} slices in one pass, which needs a"
                f" single bucket, and there are {buckets}: take buckets=square"
            )
        if size > slice_size and buckets > 1:
            raise ValueError(
                f"pass_size={size} fuses slices of {slice_size}, which needs a single bucket, and there are {buckets}:"
                " raise batch / lanes instead (fewer lanes), or leave pass_size out"
            )
        self.size = size
        self.slice_size = slice_size

    def __call__(self, slices: list[Batch]) -> list[Batch]:
        """The passes over some slices, in order."""
        if self.size < self.slice_size:
            return [part for one in slices for part in one.split(self.size)]
        group = self.size // self.slice_size
        return [fuse(slices[i : i + group]) if group > 1 else slices[i] for i in range(0, len(slices), group)]
