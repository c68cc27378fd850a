"""What is measured of a model itself."""

from typing import Any

from conf.errors import ConfigError
from conf.schema import build
from trainer.distributed import World, first_on_node
from trainer.evaluation.metric import ModelMetric
from trainer.objectives.base import Validates
from trainer.validation import mean_losses, validation_batches


class ValidationLoss(ModelMetric):
    """The loss of a run's held-out samples at fixed times, as training logs it under `val/`.

    Args:
        samples: at most.
        batch: of them at a time.
    """

    name = "validation_loss"

    def __init__(self, samples: int = 1024, batch: int = 16) -> None:
        if samples < 1 or batch < 1:
            raise ValueError(f"samples={samples} and batch={batch} must be at least 1")
        self.samples, self.batch = samples, batch

    def measure(self, loaded: Any, world: World) -> dict[str, float]:
        config = loaded.config
        if "objective" not in config:
            raise ConfigError(f"validation_loss is of a run's held-out samples, and {loaded.source} is no run of ours.")
        data, buckets, objective = (build(config[key]) for key in ("data", "buckets", "objective"))
        if not data.holdout or not isinstance(objective, Validates):
            raise ConfigError(
                f"validation_loss: {loaded.source} holds no samples out (data.holdout), or has no such loss."
            )
        split = first_on_node(world, lambda: data.open(buckets, "validation"))
        batches = validation_batches(split, self.samples, self.batch, world.rank, world.size)
        losses = mean_losses(batches, objective, loaded.networks, world.device)
        return {self.name: losses["val/loss"]}
