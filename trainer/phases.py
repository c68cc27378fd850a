"""Objects of which each phase of an objective has its own: optimizers, schedules."""

from collections.abc import Sequence
from typing import Any

from conf.errors import ConfigError
from conf.schema import build
from trainer.objectives.base import Phase


def build_by_phase(config: Any, phases: Sequence[Phase], key: str) -> dict[str, Any]:
    """An object for each phase, by the phase's name.

    Args:
        config: one node with a `_target_` for all phases alike, or a mapping of phase to node.
        key: where the config stands, for errors.

    Raises:
        ConfigError: the mapping lacks a phase, has one that the objective does not, or does not describe an object.
    """
    names = [phase.name for phase in phases]
    if "_target_" in config:
        return {name: build(config) for name in names}
    if sorted(config) != sorted(names):
        raise ConfigError(
            f"{key} is given for {', '.join(config) or 'no phase'}, but the objective's phases are {', '.join(names)}:"
            " give one for each of them, or a single one for all."
        )
    for name in names:
        if "_target_" not in config[name]:
            raise ConfigError(f"{key}.{name} has no _target_: add +{key}@{key}.{name}=<choice> to the command.")
    return {name: build(config[name]) for name in names}
