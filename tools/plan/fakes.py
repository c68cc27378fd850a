"""A run without its memory: fake tensors, a fake world of any size, and an account of what would be allocated.

Fake tensors have shape, type and storage size, and no values (torch's FakeTensorMode, which is meta tensors with a
device); collectives of the fake process group do nothing. The run's own code goes over them as over real ones.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

STATES, GRADIENTS, GATHERED, ACTIVATIONS = "states", "gradients", "gathered", "activations"
# torch counts attention by the names of its kernels on GPUs; here fakes of the CPU stand for these.
_FLOPS: dict[Any, Callable[..., int]] = dict(flop_registry) | {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda query, key, value, *_, **__: sdpa_flop_count(query.shape, key.shape, value.shape)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, query, key, value, *_, **__: sdpa_backward_flop_count(
            grad.shape, query.shape, key.shape, value.shape
        )
    ),
}


@contextmanager
def fake_world(ranks: int) -> Iterator[None]:
    """This process as rank 0 of so many, none of which exist.

    Raises:
        RuntimeError: it is a rank of a real world.
    """
    if dist.is_initialized():
        raise RuntimeError("a plan needs a process of its own: this one is a rank of a run")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


class Fakes(FakeTensorMode):
    """FakeTensorMode in which modules can be moved and cast.

    torch remembers by weak references which tensors it has made fake. `Module.to` swaps fake parameters, and refuses
    where there are weak references. Here it remembers no longer than an operator takes.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)  # a process's tables are real
        self._memo: dict[Any, Tensor] = {}
        self.fake_tensor_converter.meta_converter.tensor_memo = self._memo  # type: ignore[assignment]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See FakeTensorMode."""
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self._memo.clear()
        return out


@dataclass
class _Held:
    """A storage that is there: its size now, its kind, and what tells when it is freed."""

    size: int
    kind: str
    reference: weakref.ref


class Account(TorchDispatchMode):
    """Follows every storage that is allocated and freed while it is entered, and counts FLOPs and traffic.

    Storages are of a kind:

    - "states": there when `settle` was called. Not in the peak.
    - "gradients": what reductions leave a rank of them, and what `settle` was told to be. Not in the peak: they stay
      until the step, and the sharded ones' size depends on the world.
    - "gathered": buffers of collectives, and whole weights that FSDP gathers (it frees these by resizing storages).
    - "activations": everything else, that is, what the forward pass keeps and what either pass needs for a moment.

    Attributes:
        peak: most bytes of gathered and activations at once.
        at_peak: these bytes by kind.
        flops: of matrix products, convolutions and attention, 2 per multiplication.
        traffic: bytes by collective: of what "all_gather" makes whole and "reduce_scatter" takes whole, and of the
            shard that "all_reduce" adds up.
    """

    def __init__(self) -> None:
        super().__init__()
        self._held: dict[int, _Held] = {}
        self._bytes: Counter[str] = Counter()
        self.start()

    def start(self) -> None:
        """Count peak, FLOPs and traffic anew from here."""
        self.peak, self.flops = 0, 0
        self.at_peak: dict[str, int] = {}
        self.traffic: Counter[str] = Counter()

    def settle(self, kind: str) -> None:
        """What now counts as activations is of this kind from here on."""
        for held in self._held.values():
            if held.kind == ACTIVATIONS:
                self._change(held, kind)

    def bytes(self, kind: str) -> int:
        """Bytes of a kind that are there now."""
        return self._bytes[kind]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the operator, and take note of what it allocates, computes and sends."""
        kwargs = kwargs or {}
        if func.namespace == "prim":  # asks for a tensor's device and the like
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        if (count := _FLOPS.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        for storage in _storages(out):
            self._note(storage)
        if func.namespace in ("c10d", "fsdp"):
            self._note_collective(func._opname, args, kwargs)
        self._see_peak()
        return out

    def __enter__(self) -> "Account":
        resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            self._note_resize(storage)
            return result

        self._resize = resize
        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign, assignment]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._held:
            return

        def freed(_: Any) -> None:
            held = self._held.pop(key)
            self._bytes[held.kind] -= held.size

        self._held[key] = _Held(storage.nbytes(), ACTIVATIONS, weakref.ref(storage, freed))
        self._bytes[ACTIVATIONS] += storage.nbytes()

    def _note_resize(self, storage: torch.UntypedStorage) -> None:
        held = self._held.get(storage._cdata)
        if held is None:
            return
        self._bytes[held.kind] += storage.nbytes() - held.size
        held.size = storage.nbytes()
        if held.kind == ACTIVATIONS:
            self._change(held, GATHERED)
        self._see_peak()

    def _note_collective(self, name: str, args: Any, kwargs: Any) -> None:
        for storage in _storages((args, kwargs)):
            held = self._held.get(storage._cdata)
            if held is not None and held.kind == ACTIVATIONS:
                self._change(held, GATHERED)
        if name == "_allgather_base_":
            self.traffic["all_gather"] += args[0].nbytes
        elif name == "_reduce_scatter_base_":
            self.traffic["reduce_scatter"] += args[1].nbytes
            (output,) = _storages(args[0])
            self._change(self._held[output._cdata], GRADIENTS)
        elif name == "allreduce_":
            self.traffic["all_reduce"] += sum(tensor.nbytes for tensor in args[0])

    def _change(self, held: _Held, kind: str) -> None:
        self._bytes[held.kind] -= held.size
        self._bytes[kind] += held.size
        held.kind = kind

    def _see_peak(self) -> None:
        total = self._bytes[ACTIVATIONS] + self._bytes[GATHERED]
        if total > self.peak:
            self.peak = total
            self.at_peak = {kind: self._bytes[kind] for kind in (ACTIVATIONS, GATHERED)}


def _storages(values: Any) -> list[torch.UntypedStorage]:
    """Of all tensors among the values; a DTensor's is its local tensor's."""
    tensors = [value for value in tree_leaves(values) if isinstance(value, Tensor)]
    return [(t._local_tensor if isinstance(t, DTensor) else t).untyped_storage() for t in tensors]
