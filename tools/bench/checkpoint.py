"""Saving and loading a sharded network with its optimiser, against the obvious alternatives on the same state.

The alternatives are `torch.save` of a state dict gathered on rank 0, and `torch.distributed.checkpoint` as it comes
(`dcp.save`, `dcp.async_save`, `dcp.load`) on the same DTensors. All four make their files durable (fsync); only ours
also takes checksums, and checks them when loading. Contestants take turns, in an order that flips from round to round.
Files are read back from the page cache, if memory allows.
"""

import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor

from models.mmdit import MMDiT
from trainer.checkpoint import CheckpointPolicy, Record
from trainer.ema import Ema
from trainer.engines.fsdp import FSDP
from trainer.engines.optimizer import AdamW
from trainer.objectives.base import Phase
from trainer.resume import resume_run, save_run

State = dict[str, DTensor]


def run(
    ranks: int = 2, layers: int = 10, heads: int = 6, repeats: int = 5, folder: str | None = None
) -> dict[str, Any]:
    """Median seconds of each contestant's save (until the run may go on; until the checkpoint is durable) and load.

    Args:
        ranks: gloo processes on this machine, one thread each.
        layers, heads: MMDiT's size; 10 and 6 give 53 million parameters, with two moments 640 MB of state.
        repeats: rounds; times are medians, ratios are medians over the rounds' own ratios.
        folder: where to write, leaving nothing; by default the system's temporary folder.
    """
    with tempfile.TemporaryDirectory(dir=folder) as where:
        return _on_ranks(ranks, (Path(where), layers, heads, repeats))


def _on_ranks(ranks: int, settings: tuple[Path, int, int, int]) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    rendezvous = settings[0] / "rendezvous"
    processes = [context.Process(target=_rank, args=(r, ranks, rendezvous, sending, settings)) for r in range(ranks)]
    for process in processes:
        process.start()
    sending.close()
    try:
        return receiving.recv()
    except EOFError:
        raise RuntimeError("a rank of the checkpoint benchmark has failed; its error is above") from None
    finally:
        for process in processes:
            process.join()


def _rank(rank: int, world: int, rendezvous: Path, sending: Connection, settings: tuple[Path, int, int, int]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=world)
    result = _Bench(*settings).run()
    if rank == 0:
        sending.send({"ranks": world, **result})
    sending.close()
    dist.barrier()
    os._exit(0)  # gloo's threads abort an ordinary exit now and then (pytorch #190489)


class _Bench:
    """One rank's part: the network on an engine, and what each contestant does with it."""

    def __init__(self, folder: Path, layers: int, heads: int, repeats: int) -> None:
        self.folder, self.repeats = folder, repeats
        with torch.device("meta"):
            network = MMDiT(
                num_layers=layers, num_attention_heads=heads, joint_attention_dim=512, pos_embed_max_size=96
            )
        self.parameters = sum(p.numel() for p in network.parameters())
        phases = (Phase("main", ("denoiser",)),)
        self.engine = FSDP().build({"denoiser": network}, phases, {"main": AdamW()}, 0, torch.device("cpu"))
        self.ema = Ema({})
        self.ema.attach(self.engine)
        self.checkpointer = CheckpointPolicy(keep_last=None).build(folder / "ours")
        self.state = self._as_dtensors()
        self.group = dist.new_group(backend="gloo")

    def _as_dtensors(self) -> State:
        parameters = {f"denoiser.{name}": p for name, p in self.engine.networks["denoiser"].named_parameters()}
        state: State = {}
        for kind in self.engine.kinds():
            for shard in self.engine.shards(kind):
                whole = parameters[shard.name]
                assert isinstance(whole, DTensor)
                local = shard.tensor.view(whole.to_local().shape)
                state[f"{kind}/{shard.name}"] = DTensor.from_local(
                    local,
                    whole.device_mesh,
                    whole.placements,
                    run_check=False,
                    shape=whole.shape,
                    stride=whole.stride(),
                )
        return state

    def run(self) -> dict[str, Any]:
        saves = {"ours": self.save, "torch_save": self.torch_save, "dcp": self.dcp_save, "dcp_async": self.dcp_async}
        loads = {"ours": self.load, "torch_save": self.torch_load, "dcp": self.dcp_load}
        blocked: dict[str, list[float]] = {name: [] for name in saves}
        durable: dict[str, list[float]] = {name: [] for name in saves}
        loaded: dict[str, list[float]] = {name: [] for name in loads}
        for turn in range(self.repeats + 1):  # the first warms up: buffers, pages, imports
            for name in _in_turn(saves, turn):
                start = _together()
                finish = saves[name](turn)
                blocking = time.perf_counter() - start
                finish()
                if turn:
                    blocked[name].append(blocking)
                    durable[name].append(_together() - start)
            for name in _in_turn(loads, turn):
                self._spoil()
                start = _together()
                loads[name](turn)
                if turn:
                    loaded[name].append(_together() - start)
                self._check(name)
            self._remove(turn)
        return {
            "parameters": self.parameters,
            "state_bytes": 12 * self.parameters,
            "repeats": self.repeats,
            "save_blocking_s": _medians(blocked),
            "save_durable_s": _medians(durable),
            "load_s": _medians(loaded),
            "blocking_ratio": _ratios(blocked),
            "durable_ratio": _ratios(durable),
            "load_ratio": _ratios(loaded),
        }

    def save(self, turn: int) -> Callable[[], None]:
        save_run(self.checkpointer, Record(step=turn), self.engine, self.ema)
        return self.checkpointer.wait

    def load(self, turn: int) -> None:
        resume_run(self.checkpointer, self.folder / "ours" / f"step_{turn:08d}", self.engine, self.ema)

    def torch_save(self, turn: int) -> Callable[[], None]:
        whole: dict[str, Tensor] = {}
        for name, tensor in self.state.items():
            gathered = tensor.full_tensor()
            if dist.get_rank() == 0:
                whole[name] = gathered
        if dist.get_rank() == 0:
            with (self.folder / f"whole_{turn}.pt").open("wb") as file:
                torch.save(whole, file)
                file.flush()
                os.fsync(file.fileno())
        dist.barrier()
        return lambda: None

    def torch_load(self, turn: int) -> None:
        whole = torch.load(self.folder / f"whole_{turn}.pt", weights_only=True)
        for name, tensor in self.state.items():
            rows = -(-tensor.shape[0] // dist.get_world_size())
            local = tensor.to_local()
            start = dist.get_rank() * rows
            local.copy_(whole[name][start : start + local.shape[0]])
        self.engine.written()

    def dcp_save(self, turn: int) -> Callable[[], None]:
        dcp.save(dict(self.state), checkpoint_id=self.folder / f"dcp_{turn}")
        return lambda: None

    def dcp_async(self, turn: int) -> Callable[[], None]:
        future: Any = dcp.async_save(
            dict(self.state), checkpoint_id=self.folder / f"dcp_async_{turn}", process_group=self.group
        )
        return future.result

    def dcp_load(self, turn: int) -> None:
        dcp.load(dict(self.state), checkpoint_id=self.folder / f"dcp_{turn}")
        self.engine.written()

    def _spoil(self) -> None:
        """Keep what was saved apart, and leave nothing of it where a load has to put it."""
        self.sums = {name: tensor.to_local().double().sum().item() for name, tensor in self.state.items()}
        for tensor in self.state.values():
            tensor.to_local().fill_(float("nan"))

    def _check(self, name: str) -> None:
        for key, tensor in self.state.items():
            assert tensor.to_local().double().sum().item() == self.sums[key], f"{name} did not restore {key}"

    def _remove(self, turn: int) -> None:
        dist.barrier()
        if dist.get_rank() == 0:
            (self.folder / f"whole_{turn}.pt").unlink()
            for name in (f"ours/step_{turn:08d}", f"dcp_{turn}", f"dcp_async_{turn}"):
                shutil.rmtree(self.folder / name)
        dist.barrier()


def _together() -> float:
    dist.barrier()
    return time.perf_counter()


def _in_turn(contestants: Iterable[str], turn: int) -> list[str]:
    return list(contestants)[:: -1 if turn % 2 else 1]


def _medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: round(statistics.median(times), 4) for name, times in seconds.items()}


def _ratios(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Ours over each alternative: below 1 is faster."""
    return {
        name: round(statistics.median(a / b for a, b in zip(seconds["ours"], times, strict=True)), 3)
        for name, times in seconds.items()
        if name != "ours"
    }
