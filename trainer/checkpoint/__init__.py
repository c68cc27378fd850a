"""Checkpoints: one format for every engine and world size (format.py says what a directory holds)."""

from trainer.checkpoint.checkpointer import Checkpointer, Found, load_shards
from trainer.checkpoint.format import CheckpointError, Record

__all__ = ["CheckpointError", "Checkpointer", "Found", "Record", "load_shards"]
