"""World-independent initialisation: a parameter's first values depend on the run's seed and its qualified name,
`<network>.<parameter>`, alone. Two networks of one class thus start apart.

An engine builds a network on the meta device, and fills it one whole parameter at a time, keeping of each only its own
shard. So no rank ever holds a whole network, and 1 rank and 512 start from the same weights.
"""

import hashlib
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


def parameter_generator(seed: int, network: str, name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """The generator that parameter `name` of the run's network `network` is drawn from."""
    # torch's CPU generator reads the low 32 bits of a seed only: all of them must depend on everything.
    digest = hashlib.blake2b(f"{seed} {network}.{name}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


@torch.no_grad()
def initialize(network: Network, seed: int, name: str = "") -> Network:
    """Fill an unsharded network (not on the meta device) and return it; the reference that engines must equal.

    Args:
        name: the network's in the run.
    """
    assert isinstance(network, Initializable), f"{type(network).__name__} lacks init_parameter and init_buffers"
    for inner, parameter in network.named_parameters():
        network.init_parameter(inner, parameter, parameter_generator(seed, name, inner, parameter.device))
    network.init_buffers()
    return network
