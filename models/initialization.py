"""World-independent initialisation: a parameter's first values depend on the seed and its name alone.

An engine builds a network on the meta device, and fills it one whole parameter at a time, keeping of each only its own
shard. So no rank ever holds a whole network, and 1 rank and 512 start from the same weights.
"""

import zlib
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


@runtime_checkable
class Initializable(Protocol):
    """A network that can be built on the meta device and filled afterwards."""

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fill the whole parameter `name` (as in `named_parameters`) in place, drawing only from `generator`."""

    def init_buffers(self) -> None:
        """Compute every buffer anew, in place (after `to_empty`)."""


def parameter_generator(seed: int, name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """The generator that parameter `name` of a run is drawn from."""
    return torch.Generator(device).manual_seed((seed << 32 ^ zlib.crc32(name.encode())) & (2**63 - 1))


@torch.no_grad()
def initialize(network: Network, seed: int) -> Network:
    """Fill an unsharded network (not on the meta device) and return it; the reference that engines must equal."""
    assert isinstance(network, Initializable), f"{type(network).__name__} lacks init_parameter and init_buffers"
    for name, parameter in network.named_parameters():
        network.init_parameter(name, parameter, parameter_generator(seed, name, parameter.device))
    network.init_buffers()
    return network
