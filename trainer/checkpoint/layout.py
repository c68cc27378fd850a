"""Which rank writes which box, and which saved chunks a box is read from: the planners of torch.distributed.checkpoint.

Plans stay on their ranks: who writes what is agreed once per run, and what to read follows from the index alone. So
no save or load gathers plans at rank 0, which is what slows large worlds down.
"""

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from trainer.checkpoint.format import CheckpointError
from trainer.engines.base import Box, Shard

WEIGHT = "weight"


def saved_name(kind: str, name: str) -> str:
    """Name in a checkpoint of tensor `name` of a kind: weights keep their own, others are `<kind>/<name>`."""
    return name if kind == WEIGHT else f"{kind}/{name}"


def kind_of(saved: str) -> str:
    """The kind of a saved name."""
    kind, slash, _ = saved.partition("/")
    return kind if slash else WEIGHT


def box_views(shard: Shard) -> Iterator[tuple[Box, Tensor]]:
    """Each box of a shard with the view of the live tensor that holds it, of the box's shape."""
    start = 0
    for box in shard.boxes:
        size = prod(box.sizes)
        yield box, shard.tensor[start : start + size].view(box.sizes)
        start += size
    assert start == shard.tensor.numel(), f"{shard.name}: boxes hold {start} numbers, the tensor {shard.tensor.numel()}"


def chunk_of(box: Box) -> ChunkStorageMetadata:
    """The box in the words of torch.distributed.checkpoint."""
    return ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))


@dataclass(frozen=True)
class Holding:
    """Which part of one tensor a rank holds: a `Shard` without its numbers."""

    name: str
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]


def holdings(shards: Iterable[Shard]) -> list[Holding]:
    """What a rank holds, in order."""
    return [Holding(shard.name, tuple(shard.shape), tuple(shard.boxes)) for shard in shards]


@dataclass(frozen=True)
class Assignment:
    """One rank's share of a save.

    Args:
        items: what the rank writes.
        metadata: what all ranks write together; on rank 0 only.
    """

    items: list[WriteItem]
    metadata: Metadata | None


def assign_writers(held: Sequence[Sequence[Holding]]) -> tuple[list[list[WriteItem]], Metadata]:
    """Give each distinct box to exactly one of the ranks that hold it.

    A box held by several ranks (HSDP replicas, tensors too small to shard) goes to the one with the least to write so
    far, largest boxes first.

    Args:
        held: what each rank holds.

    Raises:
        CheckpointError: the ranks together do not hold a tensor exactly once.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    holders: dict[tuple[str, Box], list[int]] = {}
    for rank, ours in enumerate(held):
        for holding in ours:
            if shapes.setdefault(holding.name, holding.shape) != holding.shape:
                raise CheckpointError(
                    f"{holding.name}: shape {holding.shape} on rank {rank}, {shapes[holding.name]} on another"
                )
            for box in holding.boxes:
                holders.setdefault((holding.name, box), []).append(rank)

    items: list[list[WriteItem]] = [[] for _ in held]
    load = [0] * len(held)
    chunks: dict[str, list[ChunkStorageMetadata]] = {name: [] for name in shapes}
    # Boxes that only one rank can write come first, so that replicated ones even out what those left uneven.
    order = sorted(holders.items(), key=lambda entry: (len(entry[1]) > 1, -prod(entry[0][1].sizes)))
    for (name, box), ranks in order:
        writer = min(ranks, key=lambda rank: load[rank])
        load[writer] += prod(box.sizes)
        chunk = chunk_of(box)
        chunks[name].append(chunk)
        data = TensorWriteData(chunk, TensorProperties(torch.float32), torch.Size(shapes[name]))
        items[writer].append(WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data))

    for name, shape in shapes.items():
        held_size = sum(prod(chunk.sizes) for chunk in chunks[name])
        if held_size != prod(shape):
            raise CheckpointError(
                f"{name}: the ranks hold {held_size} numbers in distinct boxes, the tensor has {prod(shape)}"
            )
    tensors = {
        name: TensorStorageMetadata(TensorProperties(torch.float32), torch.Size(shape), chunks[name])
        for name, shape in shapes.items()
    }
    return items, Metadata(state_dict_metadata=dict(tensors))


def agree_on_writers(ours: Sequence[Holding], group: dist.ProcessGroup | None) -> Assignment:
    """This rank's share of every save of a run. Collective over `group`; None is a single process."""
    if group is None:
        (items,), whole = assign_writers([ours])
        return Assignment(items, whole)
    first = dist.get_rank(group) == 0
    everyone: list = [None] * dist.get_world_size(group)
    dist.gather_object(list(ours), everyone if first else None, group=group, group_dst=0)
    metadata: Metadata | None = None
    answers: list[list[WriteItem] | CheckpointError] = []
    if first:
        try:
            shares, metadata = assign_writers(everyone)
            answers += shares
        except CheckpointError as error:  # every rank has to hear of it, else they would wait for their share
            answers += [error] * len(everyone)
    received: list = [None]
    dist.scatter_object_list(received, answers if first else None, group=group, group_src=0)
    if isinstance(received[0], CheckpointError):
        raise received[0]
    return Assignment(received[0], metadata)


class BoxSavePlanner(SavePlanner):
    """Writes boxes from CPU buffers.

    Args:
        assignment: this rank's share.
        buffers: the numbers of each item.
    """

    def __init__(self, assignment: Assignment, buffers: Mapping[MetadataIndex, Tensor]) -> None:
        self._assignment = assignment
        self._buffers = buffers

    def set_up_planner(
        self, state_dict: dict, storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        assert not state_dict, "what is saved comes from the assignment"

    def create_local_plan(self) -> SavePlan:
        return SavePlan([])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        assert self._assignment.metadata is not None, "only rank 0 knows what all ranks write"
        return all_plans, replace(self._assignment.metadata)  # a copy: the writer fills in its own fields

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return replace(new_plan, items=self._assignment.items)

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        return self._buffers[write_item.index]


class BoxLoadPlanner(LoadPlanner):
    """Reads whatever saved chunks overlap a rank's boxes straight into its live tensors.

    Args:
        shards: where to read to; names are those of the checkpoint.
    """

    def __init__(self, shards: Iterable[Shard]) -> None:
        self._shards = list(shards)
        self._targets: dict[MetadataIndex, Tensor] = {}
        self._items: list[ReadItem] = []

    def set_up_planner(self, state_dict: dict, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        """Raises CheckpointError where the checkpoint lacks a tensor or has it in another shape."""
        assert not state_dict and metadata is not None, "what is loaded comes from the shards"
        saved = metadata.state_dict_metadata
        require_tensors({shard.name: shard.shape for shard in self._shards}, saved)
        for shard in self._shards:
            tensor = saved[shard.name]
            assert isinstance(tensor, TensorStorageMetadata)
            for box, view in box_views(shard):
                chunk = chunk_of(box)
                items = create_read_items_for_chunk_list(shard.name, tensor, [chunk])
                found = sum(prod(item.lengths) for item in items)
                if found != view.numel():
                    raise CheckpointError(f"{shard.name}: {found} of the {view.numel()} numbers of {box} are saved")
                self._targets[MetadataIndex(shard.name, chunk.offsets)] = view
                self._items += items

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan(self._items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AssertionError("checkpoints hold tensors only")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        view = self._targets[read_item.dest_index]
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            view = view.narrow(dim, start, length)
        return view

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing is left to do: `resolve_tensor` gave a view of the live tensor."""


def require_tensors(wanted: Mapping[str, Sequence[int]], saved: Mapping) -> None:
    """Check that a checkpoint has all that a run needs, in its shapes.

    Raises:
        CheckpointError: lists a few names that are missing or have another shape.
    """
    missing = [name for name in wanted if name not in saved]
    other = [
        f"{name}: saved {tuple(saved[name].size)}, wanted {tuple(shape)}"
        for name, shape in wanted.items()
        if name in saved and tuple(saved[name].size) != tuple(shape)
    ]
    problems = [f"missing: {_some(missing)}"] * bool(missing) + [f"of another shape: {_some(other)}"] * bool(other)
    if problems:
        raise CheckpointError(
            "the checkpoint does not fit this run: "
            + "; ".join(problems)
            + ". Resume with the configuration it was written with, or start anew from its weights with init_from"
        )


def _some(names: Sequence[str], limit: int = 3) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
