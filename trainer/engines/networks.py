"""What every engine does to a network before sharding it: precision at its border, per-block checkpointing and
compilation, filling from the meta device, freezing."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import CodeType, FunctionType, MethodType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from models.initialization import Initializable, parameter_generator
from trainer.engines.base import Box, storage_bytes
from trainer.objectives.base import Phase

Precision = Literal["bf16", "fp32"]

# Noise levels and times lose their meaning in bfloat16 (999 becomes 1000), so networks take them in float32.
FLOAT32_INPUTS = ("timestep",)


def compute_dtype(precision: Precision) -> torch.dtype:
    """The type of weights and activations in forward and backward. Masters, moments and reductions are float32."""
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The network's repeated blocks, in order: the members of the ModuleLists named by its `block_lists`. Blocks are
    the unit of sharding, checkpointing and compilation; a network without the attribute is one unit."""
    lists: tuple[str, ...] = getattr(network, "block_lists", ())
    return [block for name in lists for block in network.get_submodule(name).children()]


def checkpoint_blocks(network: nn.Module) -> None:
    """Keep only each block's inputs in the forward pass and compute the block again in the backward pass.

    It wraps `forward`, not the module, so that parameter names stay and hooks (which gather parameters) run outside.
    """
    for block in blocks_of(network):
        block.forward = _Checkpointed(block.forward)


class _Checkpointed:
    def __init__(self, forward: Callable[..., Any]):
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(self.forward, *args, use_reentrant=False, **kwargs)


def compile_blocks(network: nn.Module) -> None:
    """Compile each block's forward. Blocks of one kind (a class at one size) share graphs: the first shape gives a
    static one, the next a second one in which what changed (the number of tokens, the batch) is dynamic. `fullgraph`
    turns a graph break, and passing the compiler's limit of recompilations, into an error instead of a silent fall back
    to eager.

    The compiler counts and looks up graphs by a function's code. Each kind has a copy of its own, so that a network of
    many kinds (a UNet has one for each pair of widths) neither reaches the limit nor tries all others' graphs.
    """
    compile_all(blocks_of(network), getattr(network, "compiler_options", None))


def compile_all(blocks: Iterable[nn.Module], options: dict[str, Any] | None = None) -> None:
    """Compile each module's forward; see `compile_blocks`.

    Args:
        options: of the compiler.
    """
    codes: dict[Any, CodeType] = {}
    for block in blocks:
        forward = type(block).forward
        code = codes.setdefault(_kind(block), forward.__code__.replace(co_name=f"forward_{len(codes)}"))
        own = FunctionType(code, forward.__globals__, code.co_name, forward.__defaults__, forward.__closure__)
        own.__kwdefaults__ = forward.__kwdefaults__
        block.forward = torch.compile(MethodType(own, block), fullgraph=True, options=options)


def _kind(block: nn.Module) -> Any:
    """What graphs of the block depend on, beside its inputs: classes, sizes and settings of its modules."""
    return tuple(
        (
            name,
            type(module),
            tuple(sorted((k, v) for k, v in vars(module).items() if isinstance(v, int | float | str))),
            tuple((k, tuple(p.shape)) for k, p in module.named_parameters(recurse=False)),
        )
        for name, module in block.named_modules()
    )


def cast_at_border(network: nn.Module, dtype: torch.dtype) -> None:
    """Let the network take float32 and give float32 while it computes in `dtype`.

    Floating-point inputs become `dtype`, except those that the class names in `float32_inputs` (by default the
    timestep); outputs become float32. Call it after sharding, so that the casts lie outside of the engine's hooks.
    """
    if dtype == torch.float32:
        return
    keep = getattr(network, "float32_inputs", FLOAT32_INPUTS)
    names = [
        p.name
        for p in inspect.signature(network.forward).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]

    def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        kept = {i for i, name in enumerate(names) if name in keep}
        args = tuple(value if i in kept else _cast(value, dtype) for i, value in enumerate(args))
        return args, {name: value if name in keep else _cast(value, dtype) for name, value in kwargs.items()}

    def leave(module: nn.Module, args: tuple, output: Any) -> Any:
        return _cast(output, torch.float32)

    network.register_forward_pre_hook(enter, with_kwargs=True)
    network.register_forward_hook(leave)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, value)


def cast_frozen_weights(network: nn.Module, dtype: torch.dtype) -> None:
    """Bring what a trained network holds fixed, its `frozen_weights`, to the compute type: they are buffers, of which
    there are no masters."""
    names: tuple[str, ...] = getattr(network, "frozen_weights", ())
    for name in names:
        prefix, _, leaf = name.rpartition(".")
        module = network.get_submodule(prefix)
        module._buffers[leaf] = module._buffers[leaf].to(dtype)  # type: ignore[union-attr]


def is_meta(network: nn.Module) -> bool:
    """Whether the network's parameters are still to be filled.

    Raises:
        ValueError: they are, but the network has no way to fill them.
    """
    meta = any(p.is_meta for p in network.parameters())
    if meta and not isinstance(network, Initializable):
        raise ValueError(f"{type(network).__name__} is on the meta device but lacks init_parameter and init_buffers")
    return meta


@torch.no_grad()
def fill(
    network_name: str,
    network: nn.Module,
    shapes: Mapping[str, Sequence[int]],
    seed: int,
    device: torch.device,
    store: Callable[[str, Tensor], object],
) -> None:
    """Draw a network's first parameters, one whole parameter at a time, and hand each to `store(name, whole)`.

    Args:
        network_name: the network's in the run.
        shapes: of the whole parameters, by name.
    """
    assert isinstance(network, Initializable)
    for name, shape in shapes.items():
        whole = torch.empty(tuple(shape), dtype=torch.float32, device=device)
        network.init_parameter(name, whole, parameter_generator(seed, network_name, name, device))
        store(name, whole)


def prepare_frozen(
    name: str, network: nn.Module, sharded: bool, precision: Precision, seed: int, device: torch.device
) -> None:
    """Place a network that is only used: in the compute type, whole on every rank or sharded over all of them by FSDP2,
    filled if it is still on the meta device.

    Args:
        name: the network's in the run.
        seed: of the run.
    """
    dtype = compute_dtype(precision)
    network.requires_grad_(False).eval().to(dtype)
    meta = is_meta(network)
    if sharded:
        mesh = device_mesh(device, {"shard": dist.get_world_size()})
        for module in (*blocks_of(network), network):
            fully_shard(
                module, mesh=mesh, reshard_after_forward=True, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False)
            )
    if meta:
        network.to_empty(device=device)
        parameters = dict(network.named_parameters())
        shapes = {inner: parameter.shape for inner, parameter in parameters.items()}
        fill(name, network, shapes, seed, device, lambda inner, whole: store_shard(parameters[inner], whole))
        network.init_buffers()  # type: ignore[operator]
    network.to(device)
    cast_at_border(network, dtype)


def device_mesh(device: torch.device, sides: Mapping[str, int]) -> DeviceMesh:
    """All ranks as a grid with sides of these names and sizes. Real also where tensors are fake (a forecast of a run):
    a mesh reads its ranks from a tensor."""
    with unset_fake_temporarily():
        return init_device_mesh(device.type, tuple(sides.values()), mesh_dim_names=tuple(sides))


def frozen_bytes(networks: Iterable[nn.Module]) -> int:
    """Bytes of parameters that this rank holds of the networks."""
    return storage_bytes(local_part(parameter) for network in networks for parameter in network.parameters())


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor under FSDP2, on the same storage; a plain tensor as it is."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_box(tensor: Tensor) -> Box:
    """Where `local_part` lies in the whole: FSDP2 cuts dimension 0 into equal chunks, the last of which may be smaller
    or empty."""
    if not isinstance(tensor, DTensor):
        return Box((0,) * tensor.ndim, tuple(tensor.shape))
    shards = tensor.device_mesh["shard"]
    rows = tensor.shape[0]
    chunk = -(-rows // shards.size())
    start = min(shards.get_local_rank() * chunk, rows)
    return Box((start, *(0,) * (tensor.ndim - 1)), (min(chunk, rows - start), *tensor.shape[1:]))


@torch.no_grad()
def store_shard(parameter: Tensor, whole: Tensor) -> None:
    """Copy this rank's part of `whole` into the parameter."""
    box = local_box(parameter)
    part = whole.narrow(0, box.offsets[0], box.sizes[0]) if box.sizes else whole
    local_part(parameter).copy_(part)


def check_frozen(sharded: Iterable[str], networks: Iterable[str], trainable: Iterable[str]) -> None:
    """Raises ValueError when a network to be sharded while frozen does not exist or is trained."""
    frozen = set(networks) - set(trainable)
    if unknown := set(sharded) - frozen:
        raise ValueError(
            f"engine.shard_frozen names {sorted(unknown)}; this run's frozen networks are {sorted(frozen)}"
        )


def set_trainable(networks: Mapping[str, nn.Module], phases: Iterable[Phase], phase: Phase) -> None:
    """Of all phases' networks, let only `phase`'s collect gradients; the others still let gradients through."""
    for other in phases:
        for name in other.trainable:
            networks[name].requires_grad_(other.name == phase.name)


def check_phases(networks: Mapping[str, nn.Module], phases: Iterable[Phase], optimizers: Iterable[str]) -> None:
    """Raises ValueError for a phase that names no network, shares one with another phase, has no optimiser, or trains
    one whose buffers change in training: they are not in checkpoints, and ranks would differ over them."""
    owners: dict[str, str] = {}
    optimizers = set(optimizers)
    for phase in phases:
        if phase.name not in optimizers:
            raise ValueError(f"phase {phase.name!r} has no optimizer; there are {sorted(optimizers)}")
        for name in phase.trainable:
            if name not in networks:
                raise ValueError(f"phase {phase.name!r} trains {name!r}, which is none of {sorted(networks)}")
            if name in owners:
                raise ValueError(f"network {name!r} is trained by phases {owners[name]!r} and {phase.name!r}")
            owners[name] = phase.name
            for inner, module in networks[name].named_modules():
                if getattr(module, "track_running_stats", False):
                    raise ValueError(
                        f"{name}.{inner} keeps running statistics, which no checkpoint would hold: take a norm without"
                        " (track_running_stats=False, or GroupNorm)"
                    )
