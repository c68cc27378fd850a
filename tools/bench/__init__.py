"""The `bench` job: each benchmark runs Millrace against a named alternative in the same run, alternating, and prints
one JSON object with the medians, their ratio, and the machine."""

import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.schema import build


@dataclass
class Config:
    """conf/bench.yaml.

    Args:
        bench: the benchmark, a function to call; chosen by `millrace bench <name>`.
        out: a file that the JSON is also written to.
    """

    bench: Any
    out: str | None


def run(config: Any) -> None:
    """Run the benchmark and print its JSON."""
    text = json.dumps({"machine": machine(), **build(config.bench)}, indent=2)
    print(text)
    if config.out:
        Path(config.out).write_text(text + "\n")


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    return {"device": name, "cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
