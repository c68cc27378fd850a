"""What a finished run leaves for other runs: a network in the run's folder, as a diffusers component, or as it writes
itself."""

from collections.abc import Sequence
from typing import Any

import torch

from conf.schema import build
from data.batch import Batch
from data.run_directory import RunDirectory
from models.pretrained import save
from trainer.callbacks import averaged
from trainer.checkpoint import Checkpointer, load_weights
from trainer.distributed import barrier, is_main
from trainer.ema import Ema
from trainer.engines.base import Engine
from trainer.objectives.base import Publishes


@torch.no_grad()
def publish(
    config: Any, objective: Publishes, engine: Engine, ema: Ema, batches: Sequence[Batch], checkpointer: Checkpointer
) -> None:
    """Write the network of an objective that publishes one, from the run's last checkpoint; collective.

    The weights are those that validation is of: of an average where `validation.ema` names one.

    Args:
        batches: this rank's share of the run's first batch, on its device.
        checkpointer: of the run.
    """
    length = config.validation.ema
    with averaged(ema, length):
        published = objective.publish(engine.networks, batches)
    checkpoint = checkpointer.latest().path
    if is_main():
        assert checkpoint is not None, "a finished run has a checkpoint"
        with torch.device("meta"):
            network = build(config.networks[published.network])
        folder = RunDirectory(config.runs, config.name).path / published.folder
        weights = load_weights(checkpoint, published.network, ema=length)
        if published.config:
            network.config |= published.config
        save(network, folder, weights)
    barrier()
