"""What of a run goes into a checkpoint, and how a run goes on from one."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from trainer.checkpoint import Checkpointer, Record
from trainer.checkpoint.layout import saved_name
from trainer.ema import Ema
from trainer.engines.base import Engine, Shard


def run_shards(engine: Engine, ema: Ema) -> Iterator[Shard]:
    """This rank's part of all state of a run, by checkpoint name: weights `<network>.<parameter>`, moments
    `<moment>/<network>.<parameter>`, averages `ema.<length>/<network>.<parameter>`."""
    for kind in engine.kinds():
        for shard in engine.shards(kind):
            yield replace(shard, name=saved_name(kind, shard.name))
    yield from ema.shards()


def save_run(checkpointer: Checkpointer, record: Record, engine: Engine, ema: Ema) -> Path:
    """Save a run (collective). `record` holds what the caller knows: step, config, plan, skipped steps.

    Raises:
        CheckpointError: the last save failed; see `Checkpointer.save`.
    """
    record = replace(record, steps_taken=engine.steps_taken(), ema=ema.state())
    return checkpointer.save(record, run_shards(engine, ema))


def resume_run(checkpointer: Checkpointer, path: Path, engine: Engine, ema: Ema, verify: bool = True) -> Record:
    """Put a checkpoint's state into the engine and its averages, whatever engine and world size it comes from.

    Collective. `ema` must be attached to the engine.

    Raises:
        CheckpointError: the checkpoint is damaged, or does not fit this run.
        ValueError: an average's parameters have changed.
    """
    record = checkpointer.load(path, run_shards(engine, ema), verify)
    engine.written()
    engine.set_steps_taken(record.steps_taken)
    ema.load_state(record.ema)
    return record
