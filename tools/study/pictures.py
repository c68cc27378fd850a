"""What a study's runs draw, measured by `millrace evaluate`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from data.run_directory import read_jsonl

_FOLDER = "evaluation"


@dataclass(frozen=True)
class Drawn:
    """Settings of the sampler: all combinations.

    Args:
        steps: numbers of steps.
        guidance: scales of classifier-free guidance.
    """

    steps: list[int]
    guidance: list[float]


@dataclass(frozen=True)
class PictureEvaluation:
    """Has `millrace evaluate` draw from each run, and takes numbers from its rows. On a cluster its commands are an
    array of their own, between the runs and the analysis.

    Args:
        values: the study's names of numbers, and what `millrace evaluate` calls them: {fid: clip_fid}.
        settings: of the sampler. Each of these groups is a command of its own.
        averages: names of the averages to draw from, "none" for the weights themselves, which rows call "raw".
        overrides: for `millrace evaluate`: the reference, metrics, how many pictures.
    """

    values: dict[str, str]
    settings: list[Drawn]
    averages: list[str]
    overrides: list[str]

    def __post_init__(self) -> None:
        groups = [Drawn(**group) if isinstance(group, Mapping) else group for group in self.settings]
        object.__setattr__(self, "settings", groups)

    def columns(self) -> Sequence[str]:
        return list(self.values)

    def commands(self, run: Path) -> list[list[str]]:
        """For those of the groups that have not all their rows."""
        return [
            [
                *(f"source={run}", f"runs={run.parent}", f"name={run.name}/{_FOLDER}/{number}", "log.wandb=null"),
                *self.overrides,
                f"averages={_listed(self.averages)}",
                f"guidance_scales={_listed(group.guidance)}",
                f"steps={_listed(group.steps)}",
            ]
            for number, group in enumerate(self.settings)
            if None in self._rows(run, number, group).values()
        ]

    def evaluate(self, run: Path) -> list[dict[str, float | str]]:
        """A row for each setting and average.

        Raises:
            ValueError: the commands have not run to their end, or measure another thing.
        """
        rows: list[dict[str, float | str]] = []
        for number, group in enumerate(self.settings):
            for (average, guidance, steps), row in self._rows(run, number, group).items():
                if row is None or not set(self.values.values()) <= row.keys():
                    raise ValueError(
                        f"{run / _FOLDER / str(number)} has no row of {steps} steps, guidance {guidance} and average"
                        f" {average} with {', '.join(self.values.values())}: see its logs, or remove it to have"
                        " it made anew"
                    )
                weights = "raw" if average == "none" else average
                told: dict[str, float | str] = {"steps": steps, "guidance": guidance, "weights": weights}
                rows.append(told | {name: row[column] for name, column in self.values.items()})
        return rows

    def _rows(self, run: Path, number: int, group: Drawn) -> Mapping[tuple[str, float, int], dict[str, Any] | None]:
        """By average, guidance and steps, the newest row that is finished."""
        path = run / _FOLDER / str(number) / "evaluation.jsonl"
        found: dict[tuple[str, float, int], dict[str, Any] | None] = {
            (average, float(guidance), steps): None
            for average, guidance, steps in product(self.averages, group.guidance, group.steps)
        }
        for row in read_jsonl(path) if path.exists() else []:
            place = row["average"], row["guidance"], row["steps"]
            if place in found:
                found[place] = row
        return found


def _listed(values: Sequence[object]) -> str:
    return f"[{','.join(map(str, values))}]"
