"""What a job asks SLURM for, and how its ranks are started there."""

import shlex
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt


@dataclass(frozen=True)
class Resources:
    """conf/cluster/slurm.yaml, whose comments explain the keys."""

    kind: Literal["slurm"]
    nodes: PositiveInt
    min_nodes: PositiveInt | None
    gpus_per_node: NonNegativeInt
    gpu: str | None
    ranks_per_node: PositiveInt | None
    launcher: Literal["srun", "torchrun"]
    cpus_per_rank: PositiveInt
    mem: str | int | None
    time: str | int
    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    nodelist: str | None
    exclude: str | None
    dependency: str | None
    sbatch: dict[str, str | int | bool]
    python: str | None
    modules: list[str]
    env: dict[str, str | int]
    prologue: list[str]
    srun: list[str]
    prefix: list[str]
    signal_lead: PositiveInt
    attempts: PositiveInt
    health: bool
    min_bandwidth: PositiveFloat | None
    tasks: PositiveInt
    max_parallel: PositiveInt | None

    def __post_init__(self) -> None:
        if self.min_nodes is not None and self.min_nodes > self.nodes:
            raise ValueError(f"cluster.min_nodes={self.min_nodes} must be at most cluster.nodes={self.nodes}")

    @property
    def ranks(self) -> int:
        """Of each node."""
        return self.ranks_per_node or max(1, self.gpus_per_node)

    @property
    def fewest_nodes(self) -> int:
        """That the job can start on."""
        return self.min_nodes or self.nodes

    def options(self) -> dict[str, Any]:
        """Options of sbatch, by their names there with "_" for "-"."""
        tasks = self.ranks if self.launcher == "srun" else 1
        cpus = self.cpus_per_rank * self.ranks
        options: dict[str, Any] = {"nodes": self.nodes, "ntasks_per_node": tasks, "cpus_per_task": cpus // tasks}
        if self.fewest_nodes < self.nodes:
            # Told the tasks of a node, sbatch multiplies them by the fewest nodes, and is content with so many.
            options = {"nodes": f"{self.fewest_nodes}-{self.nodes}", "mincpus": cpus}
        options |= {
            "gpus_per_node": self.gpus_per_node or None,
            # To the batch script alone, which passes it on.
            "signal": f"B:USR1@{self.signal_lead}",
            "requeue": True,
            "kill_on_invalid_dep": "yes",
        }
        for name in ("mem", "time", "partition", "account", "qos", "constraint", "nodelist", "exclude", "dependency"):
            options[name] = getattr(self, name)
        options |= {name.replace("-", "_"): value for name, value in self.sbatch.items()}
        return {name: value for name, value in options.items() if value is not None and value is not False}

    def setup(self) -> list[str]:
        """Shell lines that prepare the batch script's environment, which the ranks inherit."""
        lines = [f"module load {shlex.quote(module)}" for module in self.modules]
        lines += [f"export {name}={shlex.quote(str(value))}" for name, value in self.env.items()]
        return lines + self.prologue
