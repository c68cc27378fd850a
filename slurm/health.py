"""Whether nodes are fit to train on, before any time is spent: a task on each looks at its devices, disks and clock,
and exchanges a buffer with two others.

The tasks' reports are files, so that a node which cannot reach the others is told from those that it keeps waiting.
Takes some seconds on sound nodes.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from slurm.step import Step, interpreter
from slurm.work import Work

_PROBE_BYTES = 1 << 20
_BUFFER_BYTES = 64 << 20
_REPEATS = 3
_LINK_TIMEOUT_S = 20.0
_TIMEOUT_S = 150.0
MAX_SKEW_S = 5.0
"""Beyond it, clocks are taken for wrong. They are read at the same moment, to the time that a message takes."""


@dataclass
class Report:
    """What a node says of itself.

    Args:
        faults: sentences.
        clock: time.time() at a moment that all nodes share; None if that moment never came.
        links: GB/s of an all-reduce with a neighbour, by its name; 0 where it failed.
    """

    faults: list[str] = field(default_factory=list)
    clock: float | None = None
    links: dict[str, float] = field(default_factory=dict)


def examine(nodes: Sequence[str], work: Work) -> dict[str, str]:
    """The unfit ones among the nodes of this job's allocation, each with what is wrong."""
    folder = work.logs / "health"
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.json"):
        stale.unlink()
    resources = work.resources
    command = [*interpreter(resources), "-m", "slurm.health", str(folder), str(resources.gpus_per_node), *nodes]
    cpus = resources.cpus_per_rank * resources.ranks
    step = Step([*resources.prefix, *command], nodes, 1, cpus, resources.srun, folder)
    if not step.wait(_TIMEOUT_S):
        step.kill()
        step.wait(_TIMEOUT_S)
    reports = {node: _read(folder / f"{node}.json") for node in nodes}
    return verdict(reports, resources.min_bandwidth)


def verdict(reports: Mapping[str, Report | None], min_bandwidth: float | None) -> dict[str, str]:
    """The unfit nodes, each with what is wrong.

    A node is at fault for a link if all of its links are bad, for a sound one has a neighbour that can vouch for it. Of
    two nodes alone, both are.
    """
    bad = {node: "no answer" for node, report in reports.items() if report is None}
    known = {node: report for node, report in reports.items() if report is not None}
    bad |= {node: ", ".join(report.faults) for node, report in known.items() if report.faults}
    clocks = [report.clock for report in known.values() if report.clock is not None]
    for node, report in known.items():
        skew = report.clock - statistics.median(clocks) if report.clock is not None else 0.0
        if abs(skew) > MAX_SKEW_S:
            bad.setdefault(node, f"its clock is {skew:+.0f} s off the others'")
        slow = {other: speed for other, speed in report.links.items() if speed <= (min_bandwidth or 0.0)}
        if slow and len(slow) == len(report.links) and not slow.keys() & bad.keys():
            found = {other: f"{speed:.2g} GB/s" if speed else "no link" for other, speed in slow.items()}
            bad.setdefault(node, ", ".join(f"{what} to {other}" for other, what in found.items()))
    return bad


def _read(path: Path) -> Report | None:
    return Report(**json.loads(path.read_text())) if path.exists() else None


def main(folder: Path, gpus: int, nodes: Sequence[str]) -> None:
    """In the task of a node: look, and write the report."""
    me = os.environ["SLURMD_NODENAME"]
    report = Report()

    def write() -> None:
        scratch = folder / f"{me}.tmp"
        scratch.write_text(json.dumps(asdict(report)))
        scratch.replace(folder / f"{me}.json")

    temporary = Path(os.environ.get("TMPDIR", tempfile.gettempdir()))  # which passes over one that is full
    report.faults += [*_disk_faults(folder), *_disk_faults(temporary), *_device_faults(gpus)]
    write()
    if len(nodes) > 1:
        _meet(nodes, nodes.index(me), gpus > 0, report)
        write()


def _disk_faults(folder: Path) -> list[str]:
    content = os.urandom(_PROBE_BYTES)
    path = folder / f".probe-{os.uname().nodename}-{os.getpid()}"
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        read = path.read_bytes()
    except OSError as error:
        return [f"cannot write to {folder}: {error.strerror}"]
    finally:
        path.unlink(missing_ok=True)
    return [] if read == content else [f"{folder} gives back other bytes than were written"]


def _device_faults(gpus: int) -> list[str]:
    if not gpus:
        return []
    import torch

    seen = torch.cuda.device_count()
    if seen != gpus:
        return [f"{seen} of {gpus} GPUs"]
    faults = []
    for index in range(gpus):
        try:
            ones = torch.ones(1024, 1024, device=f"cuda:{index}")
            right = bool(((ones @ ones) == 1024).all())
        except RuntimeError as error:  # what CUDA raises for a device that has fallen off the bus
            faults.append(f"GPU {index}: {str(error).splitlines()[0]}")
        else:
            faults += [] if right else [f"GPU {index} multiplies wrongly"]
    return faults


def _meet(nodes: Sequence[str], rank: int, cuda: bool, report: Report) -> None:
    """Read the clock together, and measure the links to both neighbours on a ring."""
    import torch.distributed as dist

    port = 40_000 + int(os.environ["SLURM_JOB_ID"]) % 20_000
    limit = timedelta(seconds=_LINK_TIMEOUT_S)
    try:
        store = dist.TCPStore(nodes[0], port, is_master=rank == 0, timeout=limit, wait_for_workers=False)
        if store.add("here", 1) == len(nodes):
            store.set("all here", "")
        store.wait(["all here"])
        report.clock = time.time()
    except (dist.DistNetworkError, dist.DistStoreError):
        # The node that is missing gives no report; the others have nothing to say.
        return
    for edge in _edges(len(nodes)):
        if rank in edge:
            other = edge[0] if edge[1] == rank else edge[1]
            pair = dist.PrefixStore(f"{edge}", store)
            report.links[nodes[other]] = _bandwidth(pair, edge.index(rank), cuda, limit)
    if store.add("left", 1) == len(nodes):
        store.set("all left", "")
    if rank == 0:
        store.wait(["all left"])


def _edges(count: int) -> list[tuple[int, int]]:
    """Of a ring, in an order in which neighbours never wait for each other in a circle."""
    ring = [(i, i + 1) for i in range(count - 1)] + ([(0, count - 1)] if count > 2 else [])
    return sorted(ring, key=lambda edge: (edge[0] % 2, edge))


def _bandwidth(store: Any, rank: int, cuda: bool, limit: timedelta) -> float:
    """GB/s of an all-reduce of two: bytes of the buffer by time. 0 where it fails."""
    import torch
    import torch.distributed as dist

    backend, device = ("nccl", "cuda:0") if cuda else ("gloo", "cpu")
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=2, timeout=limit)
        buffer = torch.ones(_BUFFER_BYTES // 4, device=device)
        dist.all_reduce(buffer)
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(_REPEATS):
            dist.all_reduce(buffer)
        right = bool((buffer == 2 ** (_REPEATS + 1)).all())
        seconds = (time.perf_counter() - start) / _REPEATS
        dist.destroy_process_group()
    except (RuntimeError, dist.DistError):  # gloo and NCCL raise these when the other end is silent
        return 0.0
    return _BUFFER_BYTES / seconds / 1e9 if right else 0.0


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
    sys.stdout.flush()
    os._exit(0)  # gloo's threads abort the interpreter's exit now and then
