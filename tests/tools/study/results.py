"""Results of runs that never were, with numbers of our choice."""

from pathlib import Path
from typing import Any

from tools.study.results import Result


def result(
    labels: dict[str, str],
    values: dict[str, float],
    seed: int = 0,
    held_out: bool = False,
    settings: list[dict[str, Any]] | None = None,
) -> Result:
    name = "_".join([*labels.values(), f"seed{seed}"])
    return Result(name, labels, seed, held_out, "finished", Path(name), values, settings or [])
