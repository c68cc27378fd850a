"""What a study is: the runs that its axes span, what is measured of each, and what is asked of the measurements."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from tools.study.analyses.base import Analysis
from tools.study.measure import Measure
from tools.study.results import COUNTED
from tools.study.stages import Evaluation, Preparation

_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
# What lies in a study's folder beside its runs.
RESERVED = ("analysis", "data", "prediction", "report", "slurm", "text_encoder", "wandb")


@dataclass(frozen=True)
class When:
    """Further overrides of the runs at certain labels.

    Args:
        at: labels by axis; a run must have one of them on every axis that is named.
        overrides: for `millrace train`; they stand above those of the axes.
    """

    at: dict[str, list[str]]
    overrides: list[str]

    def fits(self, labels: Mapping[str, str]) -> bool:
        """Whether a run of these labels is meant."""
        return all(labels.get(axis) in wanted for axis, wanted in self.at.items())


@dataclass(frozen=True)
class Point:
    """One run of a study.

    Args:
        name: of its folder, made of its labels and seed.
        labels: its place, by axis.
        seed: of the run.
        overrides: for `millrace train`, in order.
        held_out: whether it starts only after the analyses have predicted it.
    """

    name: str
    labels: dict[str, str]
    seed: int
    overrides: list[str]
    held_out: bool


@dataclass(frozen=True)
class Study:
    """A study file, `conf/study/<name>.yaml`.

    Args:
        name: of the study; its runs lie in `<runs>/<name>/`.
        base: overrides for `millrace train` that all runs share, the experiment first.
        axes: the runs are all combinations of one entry from each axis. An axis is either a configuration key with a
            list of values (`schedule.lr: [1.0e-4, 3.0e-4]`), or a name of its own with labels, each of which stands for
            overrides that go together (`size: {d2: [model.num_layers=2, schedule.lr=1e-3], ...}`).
        seeds: every combination runs once with each.
        measure: numbers to take from each run, by name. Beside them every run has `parameters`, `steps`, `samples`,
            `flops` (counted, of all its training) and `hours`.
        settings: numbers to take from each run's configuration, by name: {lr: schedule.lr}.
        analyses: what to make of the numbers, by name.
        when: further overrides of some combinations.
        leave_out: combinations that are not run; `seed` stands among the axes here.
        held_out: labels by axis of the runs that start only after the analyses, from the other runs, have written down
            their predictions.
        prepare: makes data that all runs share, before the first.
        evaluate: measures more of each run's checkpoint, after it.
        paths: places that the overrides name by `${study.paths.<name>}`; `???` must be given on the command line.

    Raises:
        ValueError: labels that are no names for a folder, or that `when`, `leave_out` or `held_out` name wrongly.
    """

    name: str
    base: list[str]
    axes: dict[str, list[float | int | str | bool | None] | dict[str, list[str]]]
    seeds: list[int]
    measure: dict[str, Measure]
    analyses: dict[str, Analysis]
    settings: dict[str, str] = field(default_factory=dict)
    when: list[When] = field(default_factory=list)
    leave_out: list[dict[str, list[str]]] = field(default_factory=list)
    held_out: dict[str, list[str]] = field(default_factory=dict)
    prepare: Preparation | None = None
    evaluate: Evaluation | None = None
    paths: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={self.seeds}: at least one, and each once")
        entries = self.entries()
        for axis, options in entries.items():
            if not options:
                raise ValueError(f"axes.{axis} has no values")
            for label in options:
                if not _LABEL.fullmatch(label):
                    raise ValueError(f"axes.{axis} has the label {label!r}: it takes letters, digits, . _ + -")
        seeds: dict[str, list[str]] = {str(seed): [] for seed in self.seeds}
        named = [("held_out", self.held_out, entries)]
        named += [(f"when[{i}].at", when.at, entries) for i, when in enumerate(self.when)]
        named += [(f"leave_out[{i}]", at, entries | {"seed": seeds}) for i, at in enumerate(self.leave_out)]
        for where, at, known in named:
            for axis, labels in at.items():
                if axis not in known or not {*labels} <= {*known[axis]}:
                    raise ValueError(f"{where} names {axis}={labels}, which the axes do not have: {_told(known)}")
        names = [point.name for point in self.points()]
        for name in names:
            if name in RESERVED or names.count(name) > 1:
                raise ValueError(f"two of the study's folders would be called {name!r}: rename labels")

    def entries(self) -> dict[str, dict[str, list[str]]]:
        """Overrides by axis and label."""
        return {
            axis: dict(values) if isinstance(values, Mapping) else _of_key(axis, values)
            for axis, values in self.axes.items()
        }

    def columns(self) -> list[str]:
        """Numbers that every finished run has."""
        evaluated = self.evaluate.columns() if self.evaluate is not None else ()
        return [*COUNTED, *self.settings, *self.measure, *evaluated]

    def points(self) -> list[Point]:
        """All runs, in the order of the axes, seeds last."""
        return list(self._points())

    def _points(self) -> Iterator[Point]:
        entries = self.entries()
        for chosen in product(*entries.values()):
            labels = dict(zip(entries, chosen, strict=True))
            overrides = [override for axis, label in labels.items() for override in entries[axis][label]]
            overrides += [override for when in self.when if when.fits(labels) for override in when.overrides]
            held_out = bool(self.held_out) and When(self.held_out, []).fits(labels)
            for seed in self.seeds:
                if any(When(at, []).fits(labels | {"seed": str(seed)}) for at in self.leave_out):
                    continue
                name = "_".join([*labels.values(), f"seed{seed}"])
                yield Point(name, labels, seed, [*self.base, *overrides, f"seed={seed}"], held_out)


def _of_key(key: str, values: Sequence[Any]) -> dict[str, list[str]]:
    """The entries of an axis that is a configuration key: labels are the key's last word and the value."""
    word = key.rpartition(".")[2]
    return {f"{word}{_text(value)}": [f"{key}={_text(value)}"] for value in values}


def _text(value: Any) -> str:
    """A value as a command line has it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _told(entries: Mapping[str, Mapping[str, Any]]) -> str:
    return "; ".join(f"{axis}: {', '.join(options)}" for axis, options in entries.items())
