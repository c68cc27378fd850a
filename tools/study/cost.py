"""What a run costs, told from its configuration alone: no data are read and no weights loaded."""

from dataclasses import dataclass
from typing import Any

import torch

from conf.schema import build
from data.buckets import Buckets
from tools.plan.rehearsal import planned_networks


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
    """The cost of a `train` configuration.

    Raises:
        ConfigError: a text encoder whose size nothing here tells.
    """
    objective = build(config.objective)
    with torch.device("meta"):  # text encoders too
        networks = planned_networks(config, objective)
    trained = {name for phase in objective.phases for name in phase.trainable}
    parameters = sum(p.numel() for name in trained for p in networks[name].parameters())
    buckets: Buckets = build(config.buckets)
    per_sample = sum(objective.flops(networks, shape) for shape in buckets.shapes) / len(buckets.shapes)
    samples = config.steps * config.batch
    return Cost(parameters, per_sample * samples, samples)
