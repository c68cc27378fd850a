"""The optimiser of a phase, shared by the engines: its configuration, its parameter groups, norms and clipping."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter, arXiv 1711.05101), fp32 moments, one fused kernel.

    Args:
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: applies to matrices and convolutions; never to biases, norms, other vectors and embeddings.
        max_grad_norm: the gradient of a phase, over all its networks and all ranks, is scaled down to this 2-norm;
            None never clips.
    """

    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.01
    max_grad_norm: float | None = 1.0

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={list(self.betas)}: two numbers in [0, 1)")
        if self.eps <= 0:
            raise ValueError(f"eps={self.eps}: it must be positive")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay={self.weight_decay}: it must not be negative")
        if self.max_grad_norm is not None and self.max_grad_norm <= 0:
            raise ValueError(f"max_grad_norm={self.max_grad_norm}: a positive number, or null to never clip")

    def build(self, parameters: Iterable[tuple[Tensor, "Kind"]]) -> torch.optim.AdamW:
        """The torch optimiser over parameters of each kind; see `allocate_moments`. Its learning rate is 0 until
        `set_learning_rate`."""
        of_kind: dict[Kind, list[Tensor]] = {}
        for parameter, kind in parameters:
            of_kind.setdefault(kind, []).append(parameter)
        # The factor divides the decay: what a step takes off a weight, rate times decay, is as at the base width.
        groups = [
            {"params": tensors, "weight_decay": kind.decays * self.weight_decay / kind.factor, "factor": kind.factor}
            for kind, tensors in of_kind.items()
        ]
        return torch.optim.AdamW(groups, lr=0.0, betas=(self.betas[0], self.betas[1]), eps=self.eps, fused=True)


def allocate_moments(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> None:
    """Give every parameter its moments before the first step, so that a checkpoint can be read into them."""
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            **{moment: torch.zeros_like(parameter, requires_grad=False) for moment in MOMENTS},
        }


@dataclass(frozen=True)
class Kind:
    """How the optimiser treats a parameter.

    Args:
        decays: whether weight decay applies to it.
        factor: on the learning rate (muP).
    """

    decays: bool
    factor: float = 1.0


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of all parameters, each times its kind's factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["factor"]


def kinds_of(network: nn.Module) -> dict[str, Kind]:
    """The kind of each parameter of the network, by name. Networks that know muP have `learning_rate_factor(name)`."""
    embeddings = {
        id(module.weight) for module in network.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)
    }
    factor: Callable[[str], float] = getattr(network, "learning_rate_factor", lambda name: 1.0)
    return {name: Kind(p.ndim >= 2 and id(p) not in embeddings, factor(name)) for name, p in network.named_parameters()}


def global_norm(parts: Iterable[Tensor], group: dist.ProcessGroup | None, device: torch.device) -> float:
    """2-norm of a vector whose parts lie on the ranks of `group` (None: all), each part on one rank. Summed in
    float64."""
    parts = [part for part in parts if part.numel()]
    square = torch.zeros((), dtype=torch.float64, device=device)
    if parts:
        square += torch.stack(torch._foreach_norm(parts)).to(device, torch.float64).square().sum()
    dist.all_reduce(square, group=group)
    return square.sqrt().item()


def clip_factor(norm: float, max_norm: float | None) -> float:
    """What to multiply a gradient of that norm with, so that it is at most `max_norm`."""
    return 1.0 if max_norm is None or norm <= max_norm else max_norm / norm
