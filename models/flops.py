"""FLOPs of networks whose formula is long: counted by torch, on shapes alone."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def forward_flops(kind: type[nn.Module], config: Mapping[str, Any], *shapes: Sequence[int]) -> float:
    """FLOPs of a forward pass (matrix products, convolutions, attention) of a network, for inputs of these shapes.

    Args:
        kind: its class.
        config: what it was constructed with; keys that the constructor does not take are passed over.
    """
    takes = inspect.signature(kind).parameters
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        twin = kind(**{key: value for key, value in config.items() if key in takes})
        twin(*(torch.empty(tuple(shape)) for shape in shapes))
    return float(counter.get_total_flops())
