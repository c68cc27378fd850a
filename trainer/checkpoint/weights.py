"""Reads one set of weights out of a checkpoint of any world size, on one process."""

from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from trainer.checkpoint.checkpointer import load_shards
from trainer.checkpoint.format import CheckpointError, read_index
from trainer.checkpoint.layout import WEIGHT, kind_of, saved_name
from trainer.engines.base import Box, Shard


def saved_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in a checkpoint, by its saved name."""
    return {name: tuple(entry["shape"]) for name, entry in read_index(path).items()}


def load_weights(path: str | Path, network: str, ema: str | None = None) -> dict[str, Tensor]:
    """A network's parameters, or an average of them, whole.

    Only the files that hold them are read, each checked against its checksum.

    Args:
        path: a checkpoint directory, `.../step_00000020`.
        network: the network's name in the run ("denoiser").
        ema: name of an EMA length; None gives the weights.

    Returns:
        float32 by parameter name, ready for `load_state_dict(..., strict=False)` (buffers are not saved).

    Raises:
        CheckpointError: no checkpoint there, a damaged file, or no such network or length; lists what there is.
    """
    path = Path(path)
    kind = WEIGHT if ema is None else f"ema.{ema}"
    shapes = saved_shapes(path)
    prefix = saved_name(kind, f"{network}.")
    names = [name for name in shapes if name.startswith(prefix) and kind_of(name) == kind]
    if not names:
        networks = sorted({name.partition(".")[0] for name in shapes if kind_of(name) == WEIGHT})
        lengths = sorted({kind_of(name).removeprefix("ema.") for name in shapes if kind_of(name).startswith("ema.")})
        raise CheckpointError(
            f"{path} has no {'weights' if ema is None else f'EMA {ema!r}'} of {network!r}: "
            f"it holds the networks {', '.join(networks) or 'none'} and the EMA lengths {', '.join(lengths) or 'none'}"
        )
    return {name.removeprefix(prefix): tensor for name, tensor in load_tensors(path, names, shapes).items()}


def load_tensors(
    path: Path, names: Iterable[str], shapes: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, Tensor]:
    """Tensors of a checkpoint by their saved names, whole, float32.

    Args:
        path: the checkpoint directory.
        names: of what `saved_shapes` lists.
        shapes: what `saved_shapes` gives, where it is at hand.

    Raises:
        CheckpointError: no checkpoint there, or a damaged file.
    """
    shapes = shapes or saved_shapes(path)
    shards = [_whole(name, shapes[name]) for name in names]
    load_shards(path, shards)
    return {shard.name: shard.tensor.view(shard.shape) for shard in shards}


def _whole(name: str, shape: tuple[int, ...]) -> Shard:
    tensor = torch.empty(prod(shape))
    boxes = (Box((0,) * len(shape), shape),) if tensor.numel() else ()
    return Shard(name, shape, boxes, tensor)
