"""State saved under one layout and loaded under another is bit-equal, for random layouts and on real ranks."""

import random
from math import prod
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.trainer.checkpoint.layouts import flat_boxes, part, random_cut, random_shapes, shards_of, whole_value, wrong
from tests.trainer.ranks import ranks
from trainer.checkpoint import Checkpointer, CheckpointError, CheckpointPolicy, Record, load_tensors
from trainer.checkpoint.layout import Holding, assign_writers, require_tensors
from trainer.engines.base import Box, Shard

CASES = 12


def case(index: int, ranks_of_layout: int, layout: str):
    """Shapes of a case, and a cut of them; every process draws the same."""
    shapes = random_shapes(random.Random(f"shapes {index}"))
    return shapes, random_cut(random.Random(f"{layout} {index}"), shapes, ranks_of_layout)


def save_all(folder: Path) -> None:
    """Save every case."""
    for index in range(CASES):
        shapes, cut = case(index, dist.get_world_size(), "saved")
        checkpointer = Checkpointer(folder / str(index), CheckpointPolicy(asynchronous=index % 2 == 0))
        checkpointer.save(Record(step=index), shards_of(shapes, cut, dist.get_rank(), index))
        checkpointer.wait()


def load_all(folder: Path) -> list[str]:
    """Load every case under another cut; what came out wrong."""
    failures = []
    for index in range(CASES):
        shapes, cut = case(index, dist.get_world_size(), "loaded")
        shards = shards_of(shapes, cut, dist.get_rank(), None)
        checkpointer = Checkpointer(folder / str(index))
        found = checkpointer.latest()
        assert found.path is not None and not found.refused, found
        record = checkpointer.load(found.path, shards)
        assert record.step == index
        failures += [f"case {index}: {name}" for name in wrong(shapes, cut, dist.get_rank(), shards, index)]
    return failures


@pytest.mark.parametrize(("saving", "loading"), [(1, 2), (2, 4), (4, 1), (4, 2)])
def test_any_layout_loads_into_any_other(tmp_path, saving, loading):
    ranks(saving).run(save_all, tmp_path)
    assert ranks(loading).run(load_all, tmp_path) == [[]] * loading


def test_every_number_is_written_once(tmp_path):
    ranks(4).run(save_all, tmp_path)
    for index in range(CASES):
        shapes, _ = case(index, 4, "saved")
        metadata = dcp.FileSystemReader(tmp_path / str(index) / f"step_{index:08d}").read_metadata()
        for name, shape in shapes.items():
            seen = torch.zeros(shape)
            for chunk in metadata.state_dict_metadata[name].chunks:
                seen[tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))] += 1
            assert torch.equal(seen, torch.ones(shape)), name


def test_plain_torch_tools_read_the_directory(tmp_path):
    ranks(2).run(save_all, tmp_path)
    shapes, _ = case(3, 2, "saved")
    path = tmp_path / "3" / "step_00000003"
    dcp_to_torch_save(path, tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)
    wanted = {name: torch.zeros(shape) for name, shape in shapes.items()}
    dcp.load(wanted, checkpoint_id=path, no_dist=True)
    for name, shape in shapes.items():
        assert torch.equal(whole[name], whole_value(name, shape, 3))
        assert torch.equal(wanted[name], whole_value(name, shape, 3))


def test_one_process_reads_whole_tensors_of_any_world(tmp_path):
    ranks(4).run(save_all, tmp_path)
    shapes, _ = case(5, 4, "saved")
    tensors = load_tensors(tmp_path / "5" / "step_00000005", shapes)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == shapes
    assert all(torch.equal(tensors[name], whole_value(name, shape, 5)) for name, shape in shapes.items())


def test_replicated_boxes_even_out_what_ranks_write():
    box = Box((0, 0), (8, 8))
    replicated = [Holding(f"net.p{i}", (8, 8), (box,)) for i in range(8)]
    uneven = [Holding("net.big", (16, 8), (Box((0, 0), (16, 8)),))]
    items, _ = assign_writers([uneven + replicated, replicated])
    sizes = [sum(prod(item.tensor_data.chunk.sizes) for item in ours) for ours in items]
    assert sizes == [5 * 64, 5 * 64]


def test_a_tensor_that_ranks_hold_in_part_is_refused():
    held = [[Holding("net.p", (4, 4), (Box((0, 0), (2, 4)),))], [Holding("net.p", (4, 4), (Box((2, 0), (1, 4)),))]]
    with pytest.raises(CheckpointError, match=r"net\.p: the ranks hold 12 numbers .* 16"):
        assign_writers(held)
    held[1] = [Holding("net.p", (5, 4), ())]
    with pytest.raises(CheckpointError, match=r"net\.p: shape"):
        assign_writers(held)


def hold_half(folder: Path) -> str:
    boxes = (Box((0,), (2,)),)  # the same half on both ranks
    try:
        Checkpointer(folder).save(Record(step=1), [Shard("net.p", (4,), boxes, torch.zeros(2))])
    except CheckpointError as error:
        return str(error)
    return ""


def test_every_rank_hears_of_a_layout_that_does_not_add_up(tmp_path):
    assert all("net.p" in message for message in ranks(2).run(hold_half, tmp_path))


def test_a_network_of_another_depth_is_told_by_a_few_names_and_a_count():
    with pytest.raises(CheckpointError, match=r"missing: net\.0, net\.1, net\.2 and 27 more\. "):
        require_tensors({f"net.{i}": (2,) for i in range(30)}, {})


def test_loading_names_what_is_missing_or_of_another_shape(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    path = checkpointer.save(Record(step=1), [whole_shard("net.a", (2, 3))])
    with pytest.raises(CheckpointError, match=r"missing: net\.b"):
        checkpointer.load(path, [whole_shard("net.a", (2, 3)), whole_shard("net.b", (1,))])
    with pytest.raises(CheckpointError, match=r"net\.a: saved \(2, 3\), wanted \(3, 2\)"):
        checkpointer.load(path, [whole_shard("net.a", (3, 2))])


def whole_shard(name: str, shape: tuple[int, ...]) -> Shard:
    return Shard(name, shape, (Box((0,) * len(shape), shape),), torch.zeros(prod(shape)))


def test_flat_ranges_are_cut_as_numpy_would():
    rng = random.Random(0)
    for _ in range(200):
        shape = tuple(rng.randint(1, 5) for _ in range(rng.randint(0, 4)))
        whole = torch.arange(prod(shape), dtype=torch.float32).view(shape)
        start, stop = sorted(rng.randint(0, prod(shape)) for _ in range(2))
        assert torch.equal(part(whole, flat_boxes(shape, start, stop)), whole.reshape(-1)[start:stop])
