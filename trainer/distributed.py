"""Processes: who this rank is, the process group, and an end that does not crash.

Ranks come from torchrun (RANK, WORLD_SIZE, LOCAL_RANK) or from SLURM tasks (SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID);
without a launcher one process is a world of its own, so that the code behind it never asks whether it is distributed.
"""

import contextlib
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Cluster:
    """`cluster` of a job's config.

    Args:
        kind: where the ranks run; "local" is this machine.
        processes: ranks that the command starts, unless it was itself started as one of several.
        restarts: how often all ranks are started anew after a failure.
    """

    kind: Literal["local"]
    processes: PositiveInt
    restarts: NonNegativeInt


@dataclass(frozen=True)
class World:
    """This process among all.

    Args:
        rank: 0 .. size - 1 over all nodes.
        size: number of processes.
        local_rank: index of the process on its node, which is the index of its GPU.
        device: where networks and batches of this rank live.
        launched: whether a launcher (torchrun, SLURM) started this process beside others.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    launched: bool

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0


def read_environment(environment: Mapping[str, str]) -> tuple[int, int, int] | None:
    """(rank, world size, local rank) from torchrun's or SLURM's variables; None without a launcher.

    An `salloc` or `sbatch` shell has SLURM_NTASKS too, but only a task that srun started has SLURM_STEP_ID.

    Raises:
        ValueError: a launcher's variables are there in part.
    """
    launchers = {"torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    if "SLURM_STEP_ID" in environment:
        launchers["SLURM"] = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    for launcher, names in launchers.items():
        there = [name for name in names if name in environment]
        if len(there) == len(names):
            rank, size, local_rank = (int(environment[name]) for name in names)
            return rank, size, local_rank
        if there:
            missing = ", ".join(name for name in names if name not in environment)
            raise ValueError(f"{launcher} environment lacks {missing} (found {', '.join(there)}): unset all or set all")
    return None


def _rendezvous(environment: Mapping[str, str]) -> str:
    """The `init_method` for a launched world: MASTER_ADDR and MASTER_PORT, which SLURM does not set by itself."""
    if "MASTER_ADDR" in environment and "MASTER_PORT" in environment:
        return "env://"
    node_list = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if node_list is None:
        raise ValueError("no MASTER_ADDR and MASTER_PORT: start through torchrun or srun, or set both")
    # A port that every task of the same step derives alike, and that two steps on one node hardly share.
    step = int(environment.get("SLURM_JOB_ID", "0")) * 31 + int(environment.get("SLURM_STEP_ID", "0"))
    return f"tcp://{first_host(node_list)}:{20_000 + step % 20_000}"


def first_host(node_list: str) -> str:
    """The first host of a SLURM node list such as `gpu[003-005,9],login1` (gpu003)."""
    match = re.match(r"([^\[,]*)(?:\[([^\],-]+)[^\]]*\])?([^,]*)", node_list)
    assert match
    return "".join(part or "" for part in match.groups())


def start(device: str = "auto", timeout_s: float = 1800.0) -> World:
    """Join (or be) the world and choose this rank's device.

    Args:
        device: "auto" takes CUDA where there is any; "cpu" and "cuda" insist.
        timeout_s: how long a collective may wait for the slowest rank before the run fails.

    Raises:
        ValueError: CUDA asked for and absent, fewer GPUs than local ranks, or a launcher's variables in part.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={device!r}: one of auto, cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no CUDA device here")
    place = read_environment(os.environ)
    rank, size, local_rank = place or (0, 1, 0)
    if device != "cpu" and torch.cuda.is_available():
        # Under `srun --gpus-per-task` each task sees its own GPU only, as device 0.
        visible = torch.cuda.device_count()
        index = 0 if visible == 1 else local_rank
        if index >= visible:
            raise ValueError(f"local rank {local_rank} has no GPU: this node shows {visible}")
        chosen = torch.device("cuda", index)
        torch.cuda.set_device(chosen)
        # gloo beside NCCL: offloaded parameters and the checkpoint's plans are reduced on the CPU.
        backend = "cpu:gloo,cuda:nccl"
    else:
        chosen, backend = torch.device("cpu"), "gloo"
    # How many collectives torch keeps a record of.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "512")
    if not dist.is_initialized():
        if backend == "gloo" and "GLOO_SOCKET_IFNAME" not in os.environ and not _resolves_own_name():
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # a laptop or container whose host name is not in any hosts file
        alone = {"store": dist.HashStore()} if place is None else {"init_method": _rendezvous(os.environ)}
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s), world_size=size, rank=rank, **alone)
    return World(rank, size, local_rank, chosen, launched=place is not None)


def _resolves_own_name() -> bool:
    try:
        socket.getaddrinfo(socket.gethostname(), None)
    except socket.gaierror:
        return False
    return True


def end(world: World, code: int = 0) -> None:
    """Leave the world after the last collective.

    A launched process does not return from here: gloo's threads abort the interpreter's exit now and then ("terminate
    called without an active exception", pytorch #190489), which a launcher would take for a failed run. So it
    flushes and leaves at once. Join your own threads (checkpoint writers, loggers) first.
    """
    if dist.is_initialized():
        if code == 0:
            dist.barrier()
        dist.destroy_process_group()
    if world.launched:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@contextlib.contextmanager
def joined(device: str = "auto", timeout_s: float = 1800.0) -> Iterator[World]:
    """`start` and, unless an exception passes, `end`; after an exception the launcher stops the other ranks."""
    world = start(device, timeout_s)
    yield world
    end(world)


def first_on_node(world: World, work: Callable[[], T]) -> T:
    """`work`'s result, done first by one rank of each node, so that the others find its cached files. Collective."""
    if world.local_rank == 0:
        result = work()
    barrier()
    return result if world.local_rank == 0 else work()


def barrier() -> None:
    """Wait for all ranks; nothing to wait for outside a process group."""
    if dist.is_initialized():
        dist.barrier()


def is_main() -> bool:
    """Whether this process writes what is written once."""
    return not dist.is_initialized() or dist.get_rank() == 0


def collectives() -> int:
    """How many collectives this rank has entered, over all its process groups.

    Torch counts them for its own check that ranks agree, and has no public name for that.
    """
    count = 0
    for group in dist.distributed_c10d._world.pg_map:
        backends: dict[int, Any] = {id(b): b for b in map(group._get_backend, group._device_types)}
        count += sum(backend._get_sequence_number_for_group() for backend in backends.values())
    return count


def flight_record() -> bytes:
    """Torch's record of this rank's last collectives, as JSON: NCCL's where torch has NCCL. Empty without any."""
    module = torch._C._distributed_c10d
    dump = getattr(module, "_dump_nccl_trace_json", None) or getattr(module, "_dump_fr_trace_json", None)
    return dump() if dump is not None else b""


def gather_rows(rows: Tensor) -> Tensor:
    """All ranks' rows, (ranks * n, ...), in the order of ranks; each has n. The gradient of a row is the sum of what
    all ranks make of it."""
    return _GatherRows.apply(rows)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        if not dist.is_initialized():
            return rows.clone()
        of_ranks = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(of_ranks, rows.contiguous())
        return torch.cat(of_ranks)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        if not dist.is_initialized():
            return gradient
        total = gradient.clone()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def all_reduce_sum(values: Mapping[str, float], device: torch.device | str = "cpu") -> dict[str, float]:
    """Sums over all ranks, in float64, on each of them. Ranks may have different keys: a key that a rank lacks is 0
    there."""
    if not dist.is_initialized():
        return dict(values)
    keys: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(keys, list(values))
    union = list(dict.fromkeys(key for of_rank in keys for key in of_rank))
    packed = torch.tensor([values.get(key, 0.0) for key in union], dtype=torch.float64, device=device)
    dist.all_reduce(packed)
    return dict(zip(union, packed.tolist(), strict=True))
