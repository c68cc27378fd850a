"""What DeepSpeed's ZeRO holds and sends, computed: its engine does real work, which fakes cannot stand in for.

Of a network with P parameters on N ranks (Rajbhandari et al., arXiv 1910.02054, figure 1, with float32 accumulation).
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from trainer.engines import networks as shared
from trainer.engines.deepspeed import DeepSpeed
from trainer.objectives.base import Phase

_FP32 = 4


def zero_states(config: DeepSpeed, numel: int, ranks: int, passes: int) -> dict[str, int]:
    """Bytes that a rank holds of a trained network, by kind: weights, masters, gradients, moments.

    Args:
        numel: P.
        passes: in a step.
    """
    share = -(-numel // ranks)
    whole = numel if config.stage < 3 else share
    bf16 = config.precision == "bf16"
    gradients = _FP32 * share
    if config.stage == 1 and bf16:
        # A whole float32 accumulator, and the last pass's gradient beside it, which is dropped after the step.
        gradients = (_FP32 + 2) * numel
    elif config.stage == 1 and passes > 1:
        gradients = _FP32 * numel
    return {
        "weights": (2 if bf16 else _FP32) * whole,
        "masters": _FP32 * share,
        "gradients": gradients,
        "moments": 2 * _FP32 * share,
    }


def zero_buffers(config: DeepSpeed, numel: int, live: int, overlap: bool = True) -> int:
    """Bytes of the buckets that gradients are reduced through, of the gradients that wait for one to fill, and with
    stage 3 of gathered weights.

    Args:
        numel: of the network.
        live: elements that are gathered at once (`live_elements`).
        overlap: whether a bucket fills while another is reduced, as on a GPU.
    """
    width = 2 if config.precision == "bf16" else _FP32
    bucket = min(config.bucket_elements, numel)
    gathered = min(numel, live) if config.stage == 3 else 0
    return (_FP32 * (2 if overlap else 1) + width) * bucket + width * gathered


def zero_traffic(config: DeepSpeed, numel: int, passes: int) -> dict[str, int]:
    """Bytes of a step by collective, of the whole tensors that are gathered or reduced. Stage 1 all-reduces gradients,
    which is a reduction and a gathering."""
    weights = (2 if config.precision == "bf16" else _FP32) * numel
    gradients = _FP32 * numel
    if config.stage == 3:
        return {"all_gather": 2 * passes * weights, "reduce_scatter": passes * gradients}
    if config.stage == 2:
        return {"all_gather": weights, "reduce_scatter": passes * gradients}
    return {"all_gather": weights + gradients, "reduce_scatter": gradients}


class Whole:
    """Networks that are whole on every rank, as forward and backward see them under ZeRO: an engine to rehearse on.
    Gradients are let go as they arrive, as a bucket takes them."""

    def __init__(
        self, networks: Mapping[str, nn.Module], phases: Sequence[Phase], config: DeepSpeed, device: torch.device
    ) -> None:
        self.networks, self.device, self._phases = networks, device, phases
        dtype = shared.compute_dtype(config.precision)
        trainable = [name for phase in phases for name in phase.trainable]
        for name, network in networks.items():
            if name not in trainable:
                sharded = name in config.shard_frozen
                shared.prepare_frozen(name, network, sharded, config.precision, 0, device)
                continue
            network.to(dtype).to_empty(device=device).requires_grad_(True).train()
            for parameter in network.parameters():
                parameter.register_post_accumulate_grad_hook(_let_go)
            if config.activation_checkpointing:
                shared.checkpoint_blocks(network)
            shared.cast_at_border(network, dtype)

    @contextlib.contextmanager
    def accumulating(self, phase: Phase, last: bool) -> Iterator[None]:
        """The other phases' networks are frozen within."""
        shared.set_trainable(self.networks, self._phases, phase)
        yield

    def backward(self, phase: Phase, loss: Tensor) -> None:
        """Backward."""
        loss.backward()

    def discard(self, phase: Phase) -> None:
        """There is nothing left."""


def _let_go(parameter: Tensor) -> None:
    parameter.grad = None
