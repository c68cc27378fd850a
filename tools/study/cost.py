"""What a run costs, told from its configuration alone: no data are read and no weights loaded."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from conf.schema import build, target
from data.buckets import Buckets
from trainer.networks import networks_on_meta


@dataclass(frozen=True)
class Cost:
    """Of a whole run.

    Args:
        parameters: of the networks that it trains.
        flops: of its training, forward and backward, counted from the networks' shapes; 0 where the objective does not
            count them. Buckets count alike.
        samples: that it trains on.
    """

    parameters: int
    flops: float
    samples: int


def cost_of(config: Any) -> Cost:
    """The cost of a `train` configuration."""
    objective = build(config.objective)
    networks: dict[str, Any] = networks_on_meta(config, objective)
    trained = {name for phase in objective.phases for name in phase.trainable}
    parameters = sum(p.numel() for name in trained for p in networks[name].parameters())
    if "conditioner" in objective.networks:
        networks["conditioner"] = _Length(context_length(config.conditioner))
    buckets: Buckets = build(config.buckets)
    per_sample = sum(objective.flops(networks, shape) for shape in buckets.shapes) / len(buckets.shapes)
    samples = config.steps * config.batch
    return Cost(parameters, per_sample * samples, samples)


class _Length(nn.Module):
    """In the place of a conditioner whose encoders are not loaded."""

    def __init__(self, context_length: int):
        super().__init__()
        self.context_length = context_length


def context_length(conditioner: Any) -> int:
    """Tokens of a conditioner's sequence: encoders next to each other that share positions count once."""
    if "encoders" not in conditioner:
        return conditioner.length
    length, shared = 0, False
    for i, encoder in enumerate(conditioner.encoders):
        shares = target(encoder["_target_"], f"conditioner.encoders.{i}").shares_positions  # type: ignore[attr-defined]
        length += 0 if shared and shares else encoder.length
        shared = shares
    return length
