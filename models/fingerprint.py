"""Tells weights from other weights by a hash of their bytes."""

import json
from collections.abc import Iterable
from typing import Any

import torch
import xxhash
from torch import Tensor


def fingerprint(tensors: Iterable[tuple[str, Tensor]], settings: dict[str, Any] | None = None) -> str:
    """Of tensors by name, in any order, and of JSON values beside them: 32 hexadecimal digits."""
    digests = {name: _digest(tensor) for name, tensor in tensors}
    return xxhash.xxh3_128(json.dumps([digests, settings], sort_keys=True).encode()).hexdigest()


def _digest(tensor: Tensor) -> str:
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    told = f"{plain.dtype} {tuple(tensor.shape)} "
    return told + xxhash.xxh3_128(plain.view(torch.uint8).numpy().data).hexdigest()
