"""Checkpoints: one format for every engine and world size (format.py says what a directory holds)."""

from trainer.checkpoint.checkpointer import Checkpointer, CheckpointPolicy, Found, load_shards
from trainer.checkpoint.format import CheckpointError, Record, check_files, read_record
from trainer.checkpoint.weights import load_tensors, load_weights, saved_shapes

__all__ = [
    "CheckpointError",
    "CheckpointPolicy",
    "Checkpointer",
    "Found",
    "Record",
    "check_files",
    "load_shards",
    "load_tensors",
    "load_weights",
    "read_record",
    "saved_shapes",
]
