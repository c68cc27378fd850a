"""DeepSpeed's ZeRO (Rajbhandari et al., arXiv 1910.02054), one DeepSpeed engine per trainable network.

Networks are called directly, not through `DeepSpeedEngine.forward`: the hooks that call puts on its output would start
a backward pass of a network that a loss merely passes through. The engine's own sequence around a
backward pass (prologue, reduction, epilogue) is what this module calls instead.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.engines import networks as shared
from trainer.engines.base import Shard, StepResult, boxes_of_range, storage_bytes
from trainer.engines.deepspeed_start import start_deepspeed
from trainer.engines.networks import Precision
from trainer.engines.optimizer import (
    MOMENTS,
    AdamW,
    allocate_moments,
    clip_factor,
    global_norm,
    kinds_of,
    set_learning_rate,
)
from trainer.objectives.base import Phase


@dataclass(frozen=True)
class DeepSpeed:
    """Configuration of the DeepSpeed engine.

    Args:
        stage: what ZeRO shards: 1 optimiser states, 2 gradients too, 3 parameters too. (Nothing sharded is
            `engine=hsdp` with as many replicas as ranks.)
        precision: type of weights and activations in forward and backward. Masters, moments, accumulation and
            reduction are float32 either way.
        offload: keep masters and moments, and the parameters of stage 3, in host memory and step there.
        activation_checkpointing: keep only block inputs and compute blocks again in the backward pass.
        compile: compile each block. Not with stage 3, whose hooks run within blocks.
        shard_frozen: names of frozen networks to shard over all ranks, by FSDP2; the others are whole on every rank.
        bucket_elements: elements that are reduced or gathered at once.
    """

    stage: int = 2
    precision: Precision = "bf16"
    offload: bool = False
    activation_checkpointing: bool = False
    compile: bool = False
    shard_frozen: list[str] = field(default_factory=list)
    bucket_elements: int = 50_000_000

    def __post_init__(self) -> None:
        if self.stage not in (1, 2, 3):
            raise ValueError(
                f"engine.stage={self.stage}: ZeRO's stages are 1, 2 and 3; to shard nothing, "
                "take engine=hsdp with engine.replicas set to the number of ranks"
            )
        if self.bucket_elements < 1:
            raise ValueError(f"engine.bucket_elements={self.bucket_elements}: it must be at least 1")
        if self.stage == 3 and self.compile:
            raise ValueError(
                "engine.compile=true does not go with ZeRO-3, whose hooks run within blocks: use engine=fsdp"
            )

    def check(self, ranks: int) -> None:
        """Any number of ranks will do."""

    def build(
        self,
        networks: Mapping[str, nn.Module],
        phases: Sequence[Phase],
        optimizers: Mapping[str, AdamW],
        seed: int,
        device: torch.device,
    ) -> "DeepSpeedEngine":
        """Take over the networks (see `EngineConfig.build`)."""
        return DeepSpeedEngine(self, networks, phases, optimizers, seed, device)


class DeepSpeedEngine:
    """Networks under ZeRO; see `Engine` for the methods."""

    def __init__(
        self,
        config: DeepSpeed,
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
        trainable = [name for phase in phases for name in phase.trainable]
        shared.check_frozen(config.shard_frozen, self.networks, trainable)
        self._frozen = [name for name in networks if name not in trainable]
        for name in self._frozen:
            shared.prepare_frozen(name, networks[name], name in config.shard_frozen, config.precision, seed, device)
        self._active: Phase | None = None
        self._steps = {phase.name: 0 for phase in phases}
        self._max_grad_norm = {phase.name: optimizers[phase.name].max_grad_norm for phase in phases}
        self._zeros = {
            phase.name: [
                _Zero(name, networks[name], config, optimizers[phase.name], seed, device) for name in phase.trainable
            ]
            for phase in phases
        }

    @contextlib.contextmanager
    def accumulating(self, phase: Phase, last: bool) -> Iterator[None]:
        if phase is not self._active:
            shared.set_trainable(self.networks, self._phases, phase)
            self._active = phase
        for zero in self._zeros[phase.name]:
            zero.engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, phase: Phase, loss: Tensor) -> None:
        zeros = self._zeros[phase.name]
        for zero in zeros:
            zero.begin_backward()
        # DeepSpeed averages over ranks. The sum is wanted: the loop has divided by the global batch.
        (loss * dist.get_world_size()).backward()
        for zero in zeros:
            zero.end_backward()
        for zero in self._all():
            zero.release()

    def step(self, phase: Phase, lr: float) -> StepResult:
        zeros = self._zeros[phase.name]
        gradients = [gradient for zero in zeros for gradient in zero.gradients()]
        norm = global_norm(gradients, None, self.device)
        finite = norm < float("inf")
        if finite:
            factor = clip_factor(norm, self._max_grad_norm[phase.name])
            if factor != 1.0:
                torch._foreach_mul_(gradients, factor)
            for zero in zeros:
                zero.step(lr)
            self._steps[phase.name] += 1
        self.discard(phase)
        return StepResult(grad_norm=norm, skipped=not finite)

    def discard(self, phase: Phase) -> None:
        for zero in self._zeros[phase.name]:
            zero.drop_gradients()

    def shards(self, kind: str) -> Iterator[Shard]:
        if kind not in self.kinds():
            raise ValueError(f"no state {kind!r}: one of {', '.join(self.kinds())}")
        for zero in self._all():
            yield from zero.shards(kind)

    def kinds(self) -> Sequence[str]:
        return ("weight", *MOMENTS)

    def written(self) -> None:
        for zero in self._all():
            zero.refresh()

    def steps_taken(self) -> dict[str, int]:
        return dict(self._steps)

    def set_steps_taken(self, steps: Mapping[str, int]) -> None:
        for name, zeros in self._zeros.items():
            self._steps[name] = steps[name]
            for zero in zeros:
                for state in zero.states():
                    state["step"].fill_(steps[name])

    def memory(self) -> dict[str, int]:
        zeros = list(self._all())
        parameters = [t for zero in zeros for t in (*zero.flats, *zero.compute_copies())]
        return {
            "parameters": storage_bytes(parameters),
            "gradients": storage_bytes(t for zero in zeros for t in zero.held_gradients()),
            "optimizer": storage_bytes(
                state[moment] for zero in zeros for state in zero.states() for moment in MOMENTS
            ),
            "frozen": shared.frozen_bytes(self.networks[name] for name in self._frozen),
        }

    def _all(self) -> Iterator["_Zero"]:
        for zeros in self._zeros.values():
            yield from zeros


@dataclass(frozen=True)
class _Fragment:
    """The flat range of one parameter whose master this rank holds.

    Args:
        name: qualified by the network.
        shape: of the whole parameter.
        start: of the range in the row-major parameter.
        numel: of the range; 0 where this rank holds nothing of it.
        flat: index of the flat master that the range is part of.
        offset: of the range in the flat master.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    flat: int
    offset: int


class _Zero:
    """One trainable network under one DeepSpeed engine.

    ZeRO keeps a rank's masters in a few flat tensors: of stages 1 and 2, the rank's equal share of all parameters of a
    group laid end to end; of stage 3, its equal share of each parameter.
    """

    def __init__(
        self, name: str, network: nn.Module, config: DeepSpeed, optimizer: AdamW, seed: int, device: torch.device
    ):
        import deepspeed

        self.name, self.network, self.stage, self.offload = name, network, config.stage, config.offload
        self.device = device
        start_deepspeed(device)
        network.requires_grad_(True).train()
        if config.compile:
            shared.compile_blocks(network)
        if config.activation_checkpointing:
            shared.checkpoint_blocks(network)
        shapes = {n: tuple(p.shape) for n, p in network.named_parameters()}
        kinds = kinds_of(network)
        # The first values are written into the masters: what passes through the compute type would be rounded.
        meta = shared.is_meta(network)
        ready = {} if meta else {n: p.detach().float().clone() for n, p in network.named_parameters()}
        ds_config = _ds_config(config, network, device)
        shared.cast_frozen_weights(network, shared.compute_dtype(config.precision))
        _allocate(network, shared.compute_dtype(config.precision), device, ds_config)
        parameters = dict(network.named_parameters())
        torch_optimizer = optimizer.build((p, kinds[n]) for n, p in parameters.items())
        self.engine, self.zero, _, _ = deepspeed.initialize(
            model=network, optimizer=torch_optimizer, config=ds_config, dist_init_required=False
        )
        self.flats: list[Tensor] = self._flats()
        allocate_moments(self.zero.optimizer, self.flats)
        if self.stage == 3:
            _gather_for_every_backward(network)
        self.fragments = [self._fragment(n, p, shapes[n]) for n, p in parameters.items()]
        self._set_weights(ready, meta, seed)
        shared.cast_at_border(network, shared.compute_dtype(config.precision))

    def _flats(self) -> list[Tensor]:
        if self.stage == 3:
            return self.zero.fp32_partitioned_groups_flat
        # DeepSpeed chooses another class for stage 1 in bfloat16 with float32 accumulation.
        return self.zero.fp32_groups_flat_partition if self._is_bf16 else self.zero.single_partition_of_fp32_groups

    @property
    def _is_bf16(self) -> bool:
        return hasattr(self.zero, "fp32_groups_flat_partition")

    def _fragment(self, name: str, parameter: Any, shape: tuple[int, ...]) -> _Fragment:
        qualified = f"{self.name}.{name}"
        if self.stage == 3:
            flat, offset = self._place_in_stage_3(parameter)
            share = parameter.partition_numel()
            start = min(share * dist.get_rank(), parameter.ds_numel)
            return _Fragment(qualified, shape, start, min(share, parameter.ds_numel - start), flat, offset)
        mapping = parameter._hp_mapping
        if mapping is None:
            return _Fragment(qualified, shape, 0, 0, 0, 0)
        here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
        return _Fragment(qualified, shape, here.start, here.numel, mapping.param_group_index, there.start)

    def _place_in_stage_3(self, parameter: Any) -> tuple[int, int]:
        for flat, group in enumerate(self.zero.fp16_groups):
            offset = 0
            for other in group:
                if other is parameter:
                    return flat, offset
                offset += other.partition_numel()
        raise AssertionError("a parameter of no group")

    @torch.no_grad()
    def _set_weights(self, ready: Mapping[str, Tensor], meta: bool, seed: int) -> None:
        places = {fragment.name: fragment for fragment in self.fragments}

        def store(name: str, whole: Tensor) -> None:
            fragment = places[f"{self.name}.{name}"]
            self._part(self.flats, fragment).copy_(whole.view(-1).narrow(0, fragment.start, fragment.numel))

        if meta:
            shared.fill(self.name, self.network, self._shapes(), seed, self.device, store)
        for name, whole in ready.items():
            store(name, whole)
        self.refresh()

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {fragment.name.removeprefix(f"{self.name}."): fragment.shape for fragment in self.fragments}

    @staticmethod
    def _part(flats: Sequence[Tensor], fragment: _Fragment) -> Tensor:
        return flats[fragment.flat].detach().narrow(0, fragment.offset, fragment.numel)

    def states(self) -> list[dict[str, Tensor]]:
        """The optimiser's state of each flat master."""
        return [self.zero.optimizer.state[flat] for flat in self.flats]

    def shards(self, kind: str) -> Iterator[Shard]:
        flats = self.flats if kind == "weight" else [state[kind] for state in self.states()]
        for fragment in self.fragments:
            boxes = boxes_of_range(fragment.shape, fragment.start, fragment.start + fragment.numel)
            yield Shard(fragment.name, fragment.shape, boxes, self._part(flats, fragment))

    def begin_backward(self) -> None:
        self.zero.clear_backward_seen_flag()  # what DeepSpeedEngine.forward does
        self.engine._running_engine_backward = True  # the epilogue is ours to call, not the last hook's
        self.engine._backward_prologue()

    def end_backward(self) -> None:
        if self.stage != 3 and not self._is_bf16:
            self.zero.setup_buckets()  # done by the first gradient; the loss may not have come through this network
        self.engine._backward_epilogue()
        self.engine._running_engine_backward = False

    def release(self) -> None:
        """Free whole weights that a backward pass through the network has left gathered: where modules ran twice or the
        graph was walked twice, DeepSpeed loses count of when it is done with them."""
        if self.stage == 3:
            self.zero.parameter_offload.release_backward_leftovers()

    def gradients(self) -> list[Tensor]:
        """This rank's share of the reduced gradient, after the last pass; scaling it in place scales the step's."""
        if self._is_bf16:
            return self.zero.fp32_groups_gradient_flat_partition
        if self.offload:
            return [flat.grad for flat in self.flats if flat.grad is not None]
        return [gradient for group in self.zero.averaged_gradients.values() for gradient in group]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        set_learning_rate(self.zero.optimizer, lr)
        self.zero.step()

    def drop_gradients(self) -> None:
        """Forget everything accumulated, as DeepSpeed itself does after a step."""
        zero = self.zero
        zero.zero_grad(set_to_none=True)
        if self._is_bf16:
            return
        if self.stage == 3:
            zero._pre_step()
            zero.averaged_gradients = {}
            # A parameter that the next step does not use would otherwise take this step's gradient again.
            zero.grad_partitions_flat_buffer.zero_()
        else:
            for group in zero.averaged_gradients:
                zero.averaged_gradients[group] = zero.all_grad_tensors[group] = None
            zero.micro_step_id = -1
        if self.offload:
            zero.reset_cpu_buffers()
            for gradient in self.gradients():
                gradient.zero_()

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the compute copies up to the masters."""
        if self.stage != 3:
            self.zero.update_lp_params()
            return
        self.zero._partition_all_parameters()  # whole weights that may still be gathered are outdated
        for group in range(len(self.flats)):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)

    def compute_copies(self) -> list[Tensor]:
        """The parameters that forward and backward use: whole, or this rank's share with stage 3."""
        if self.stage == 3:
            return [parameter.ds_tensor for parameter in self.network.parameters()]  # type: ignore[attr-defined]
        return list(self.network.parameters())

    def held_gradients(self) -> list[Tensor]:
        """Every gradient tensor that takes memory now."""
        held = [p.grad for p in self.network.parameters()]
        held += [getattr(p, "grad_accum", None) for p in self.network.parameters()]
        held += [flat.grad for flat in self.flats]
        if self._is_bf16:
            held += self.zero.fp32_groups_gradients_flat
        else:
            held += [g for group in self.zero.averaged_gradients.values() for g in group or ()]
        if self.stage == 3:
            held.append(self.zero.grad_partitions_flat_buffer)
        return [gradient for gradient in held if gradient is not None]


def _gather_for_every_backward(network: nn.Module) -> None:
    """Let ZeRO-3 gather a module's weights whenever a backward pass comes to it.

    It counts forward passes and gathers for so many backward passes only. But a graph may be walked more often than it
    was built: once for each loss whose gradient at a last layer is asked for, and once more for the step.
    """
    for module in network.modules():
        module.applied_pre_backward_ref_cnt = 1 << 60  # type: ignore[assignment]


def live_elements(network: nn.Module) -> int:
    """How many of a network's elements stage 3 may have gathered before it fetches no further ones ahead: those of the
    largest block twice, of the one in use and of the next.

    DeepSpeed fetches a bucket ahead at each module that it comes to, however much is fetched already: without a limit
    it gathers all weights, from the second step on.
    """
    return 2 * max(sum(p.numel() for p in block.parameters()) for block in shared.blocks_of(network) or [network])


def _ds_config(config: DeepSpeed, network: nn.Module, device: torch.device) -> dict[str, Any]:
    numel = sum(p.numel() for p in network.parameters())
    bucket = max(2, min(config.bucket_elements, numel) // 2 * 2)  # DeepSpeed wants an even number
    zero: dict[str, Any] = {
        "stage": config.stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "contiguous_gradients": True,
        "overlap_comm": device.type == "cuda",
    }
    if config.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    if config.stage == 3:
        # Small parameters are gathered with their neighbours rather than kept on every rank, and what a block has used
        # is freed, whatever uses it next.
        zero |= {
            "stage3_prefetch_bucket_size": bucket,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_max_live_parameters": live_elements(network),
        }
        if config.offload:
            zero["offload_param"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    return {
        # Passes and their last one are the caller's to count; DeepSpeed's own counts stay at 1.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "bf16": {"enabled": config.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _allocate(network: nn.Module, dtype: torch.dtype, device: torch.device, ds_config: dict[str, Any]) -> None:
    """Bring the network to the device in the compute type: whole with stages 1 and 2; with stage 3 one parameter at a
    time, of which only this rank's share stays. Values of the parameters are left open."""
    import deepspeed

    meta = shared.is_meta(network)
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(device)
    first: Any = None
    replaced: dict[int, nn.Parameter] = {}  # tied parameters stay tied
    for module in network.modules():
        for name, old in module.named_parameters(recurse=False):
            if id(old) not in replaced:
                new: Any = nn.Parameter(torch.zeros(old.shape, dtype=dtype, device=device)) if meta else old
                if not meta:
                    new.data = old.data.to(device, dtype)
                replaced[id(old)] = new
                if ds_config["zero_optimization"]["stage"] == 3:
                    if first is None:
                        deepspeed.zero.Init(module=nn.ParameterList([new]), config_dict_or_path=ds_config, dtype=dtype)
                        first = new
                    else:
                        first.convert_to_zero_parameters(param_list=[new])
            module._parameters[name] = replaced[id(old)]
    if meta:
        network.init_buffers()  # type: ignore[operator]
