"""FSDP2: parameters, gradients and moments sharded over ranks, one unit per block (Zhao et al., arXiv 2304.11277)."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from trainer.engines import networks as shared
from trainer.engines.base import Shard, StepResult, storage_bytes
from trainer.engines.networks import Precision
from trainer.engines.optimizer import (
    MOMENTS,
    AdamW,
    Kind,
    allocate_moments,
    clip_factor,
    global_norm,
    kinds_of,
    set_learning_rate,
)
from trainer.objectives.base import Phase


@dataclass(frozen=True)
class FSDP:
    """Configuration of the FSDP2 engine.

    Args:
        precision: type of weights and activations in forward and backward. Masters, moments and the reduction of
            gradients are float32 either way.
        replicas: 1 shards over all ranks. More is HSDP: that many groups of ranks each hold everything, sharded over
            the group's ranks; put a group on one node and its traffic stays there. Must divide the number of ranks.
        offload: keep shards, gradients and moments in host memory and step there.
        reshard_after_forward: free a block's whole weights between forward and backward and gather them twice (ZeRO-3);
            False keeps them (ZeRO-2): more memory, less traffic.
        reduce_each_pass: with several passes a step, reduce after each, so that gradients are only ever held sharded;
            False sums whole gradients locally and reduces once: more memory, less traffic. HSDP's reduction
            over replicas waits for the last pass in both cases.
        activation_checkpointing: keep only block inputs and compute blocks again in the backward pass.
        compile: compile each block.
        shard_frozen: names of frozen networks to shard too (a large teacher or text encoder); the others are whole on
            every rank, in the compute type.
    """

    precision: Precision = "bf16"
    replicas: int = 1
    offload: bool = False
    reshard_after_forward: bool = True
    reduce_each_pass: bool = True
    activation_checkpointing: bool = False
    compile: bool = False
    shard_frozen: list[str] = field(default_factory=list)

    def check(self, ranks: int) -> None:
        """`replicas` must divide the ranks (see `EngineConfig.check`)."""
        if self.replicas < 1 or ranks % self.replicas:
            raise ValueError(
                f"engine.replicas={self.replicas} does not divide the {ranks} ranks: HSDP needs replicas x shards ranks"
            )

    def build(
        self,
        networks: Mapping[str, nn.Module],
        phases: Sequence[Phase],
        optimizers: Mapping[str, AdamW],
        seed: int,
        device: torch.device,
    ) -> "FSDPEngine":
        """Take over the networks (see `EngineConfig.build`)."""
        return FSDPEngine(self, networks, phases, optimizers, seed, device)


@dataclass(frozen=True)
class _Owned:
    """A trainable parameter: its place in the network, and this rank's part of it as a plain tensor on one storage
    with it, which the optimiser updates."""

    name: str
    parameter: nn.Parameter
    local: Tensor


class FSDPEngine:
    """Networks under `fully_shard`; see `Engine` for the methods."""

    def __init__(
        self,
        config: FSDP,
        networks: Mapping[str, nn.Module],
        phases: Sequence[Phase],
        optimizers: Mapping[str, AdamW],
        seed: int,
        device: torch.device,
    ):
        shared.check_phases(networks, phases, optimizers)
        self.config = config
        self.device = device
        self.networks = dict(networks)
        self._phases = tuple(phases)
        config.check(dist.get_world_size())
        shards = dist.get_world_size() // config.replicas
        self._mesh = shared.device_mesh(device, {"replicate": config.replicas, "shard": shards})
        self._group = self._mesh["shard"].get_group()
        self._trainable = [name for phase in phases for name in phase.trainable]
        shared.check_frozen(config.shard_frozen, networks, self._trainable)
        self._frozen = [name for name in networks if name not in self._trainable]
        for name in self._frozen:
            shared.prepare_frozen(name, networks[name], name in config.shard_frozen, config.precision, seed, device)
        for name in self._trainable:
            self._prepare_trainable(name, networks[name], seed)
        self._active: Phase | None = None
        self._owned: dict[str, list[_Owned]] = {}
        self._optimizers: dict[str, torch.optim.AdamW] = {}
        self._max_grad_norm: dict[str, float | None] = {}
        self._steps = {phase.name: 0 for phase in phases}
        for phase in phases:
            self._add_optimizer(phase, optimizers[phase.name])

    def _prepare_trainable(self, name: str, network: nn.Module, seed: int) -> None:
        network.float().requires_grad_(True).train()
        if self.config.compile:
            shared.compile_blocks(network)
        if self.config.activation_checkpointing:
            shared.checkpoint_blocks(network)
        dtype = shared.compute_dtype(self.config.precision)
        shared.cast_frozen_weights(network, dtype)
        for module in (*shared.blocks_of(network), network):
            fully_shard(
                module,
                mesh=self._mesh if self.config.replicas > 1 else self._mesh["shard"],
                reshard_after_forward=self.config.reshard_after_forward and module is not network,
                mp_policy=MixedPrecisionPolicy(
                    param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
                ),
                offload_policy=CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
                if self.config.offload
                else OffloadPolicy(),
            )
            assert isinstance(module, FSDPModule)
            # Sum, not mean: the loop has divided by the global batch.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        if shared.is_meta(network):
            network.to_empty(device="cpu" if self.config.offload else self.device)
            parameters = dict(network.named_parameters())
            shapes = {inner: parameter.shape for inner, parameter in parameters.items()}

            def store(inner: str, whole: Tensor) -> None:
                shared.store_shard(parameters[inner], whole)

            shared.fill(name, network, shapes, seed, self.device, store)
            network.init_buffers()  # type: ignore[operator]
        for buffer in network.buffers():
            buffer.data = buffer.data.to(self.device)
        assert isinstance(network, FSDPModule)
        # FSDP2 notes the gradient's type at its first forward pass, from the parameters that require gradients then.
        # That pass may belong to another phase, which has frozen them: let it take note now.
        network._get_fsdp_state()._lazy_init()
        shared.cast_at_border(network, dtype)

    def _add_optimizer(self, phase: Phase, config: AdamW) -> None:
        owned: list[_Owned] = []
        parameters: list[tuple[Tensor, Kind]] = []
        for network_name in phase.trainable:
            network = self.networks[network_name]
            kinds = kinds_of(network)
            for name, parameter in network.named_parameters():
                local = nn.Parameter(shared.local_part(parameter))
                owned.append(_Owned(f"{network_name}.{name}", parameter, local))
                if local.numel():  # a small tensor leaves some ranks with nothing of it
                    parameters.append((local, kinds[name]))
        self._owned[phase.name] = owned
        self._optimizers[phase.name] = config.build(parameters)
        allocate_moments(self._optimizers[phase.name], [local for local, _ in parameters])
        self._max_grad_norm[phase.name] = config.max_grad_norm

    @contextlib.contextmanager
    def accumulating(self, phase: Phase, last: bool) -> Iterator[None]:
        if phase is not self._active:
            # First of all: while weights are gathered, a network shows those as its parameters, not the shards.
            self._drop_gathered(self._trainable)
            shared.set_trainable(self.networks, self._phases, phase)
            self._active = phase
        for name in phase.trainable:
            network = self.networks[name]
            assert isinstance(network, FSDPModule)
            network.set_requires_gradient_sync(last or self.config.reduce_each_pass)
            network.set_requires_all_reduce(last)
        yield

    def backward(self, phase: Phase, loss: Tensor) -> None:
        loss.backward()

    def step(self, phase: Phase, lr: float) -> StepResult:
        optimizer = self._optimizers[phase.name]
        owned = self._owned[phase.name]
        gradients = []
        for own in owned:
            gradient = own.parameter.grad
            # Without a gradient this step (a branch not taken): as if it were zero, which is what ZeRO does.
            own.local.grad = torch.zeros_like(own.local) if gradient is None else shared.local_part(gradient)
            gradients.append(own.local.grad)
        norm = global_norm(gradients, self._group, self.device)
        finite = norm < float("inf")
        if finite:
            factor = clip_factor(norm, self._max_grad_norm[phase.name])
            if factor != 1.0:
                torch._foreach_mul_(gradients, factor)
            set_learning_rate(optimizer, lr)
            optimizer.step()
            self._steps[phase.name] += 1
        self.discard(phase)
        self._drop_gathered(phase.trainable)
        return StepResult(grad_norm=norm, skipped=not finite)

    def discard(self, phase: Phase) -> None:
        for own in self._owned[phase.name]:
            own.local.grad = None
            own.parameter.grad = None

    def _drop_gathered(self, names: Sequence[str]) -> None:
        """Free whole weights that a forward pass without a backward pass has left gathered, for they are outdated."""
        for name in names:
            for module in self.networks[name].modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def shards(self, kind: str) -> Iterator[Shard]:
        if kind not in self.kinds():
            raise ValueError(f"no state {kind!r}: one of {', '.join(self.kinds())}")
        for phase in self._phases:
            state = self._optimizers[phase.name].state
            for own in self._owned[phase.name]:
                tensor = own.local.detach()
                if kind != "weight" and tensor.numel():
                    tensor = state[own.local][kind]
                boxes = (shared.local_box(own.parameter),) if tensor.numel() else ()
                yield Shard(own.name, tuple(own.parameter.shape), boxes, tensor.view(-1))

    def kinds(self) -> Sequence[str]:
        return ("weight", *MOMENTS)

    def written(self) -> None:
        self._drop_gathered(self._trainable)

    def steps_taken(self) -> dict[str, int]:
        return dict(self._steps)

    def set_steps_taken(self, steps: Mapping[str, int]) -> None:
        for name in self._steps:
            self._steps[name] = steps[name]
            for state in self._optimizers[name].state.values():
                state["step"].fill_(steps[name])

    def memory(self) -> dict[str, int]:
        trainable = [own for owned in self._owned.values() for own in owned]
        states = [state for optimizer in self._optimizers.values() for state in optimizer.state.values()]
        return {
            "parameters": storage_bytes(shared.local_part(own.parameter) for own in trainable),
            "gradients": storage_bytes(
                shared.local_part(g) for own in trainable if (g := own.parameter.grad) is not None
            ),
            "optimizer": storage_bytes(state[moment] for state in states for moment in MOMENTS),
            "frozen": shared.frozen_bytes(self.networks[name] for name in self._frozen),
        }
