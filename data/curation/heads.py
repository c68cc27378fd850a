"""Small trained networks from an embedding to one number: aesthetic score, probability of nudity, of a watermark."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
import xxhash
from torch import Tensor
from torch.nn import functional as F

from conf.errors import first_line
from data.curation.base import GlobalFilter, ShardColumns
from data.curation.embeddings import read_vectors
from data.tracking import RunLog

_KEY = re.compile(r"(?:.+?\.)??(?:(\d+)\.)?(weight|bias)")


class Head:
    """Linear layers over unit-length embeddings, from the state dict of a single layer (`weight`, `bias`), as LAION's
    aesthetic predictors have it, or of a sequence of layers (`layers.0.weight` ...), as in the improved aesthetic
    predictor (layers 0, 2, 4, 6, 7, without activations) and LAION's safety classifier for ViT-H/14.

    Args:
        path: the weights: safetensors, or a file of torch's, of which nothing but tensors is read.
        activation: between two linear layers where the numbering shows that there was something else; state dicts do
            not tell dropout from an activation.
        sigmoid: make the output a probability.

    Attributes:
        width: of the embeddings.

    Raises:
        ValueError: no such file, or another network's weights.
    """

    def __init__(self, path: str, activation: Literal["none", "relu"] = "none", sigmoid: bool = False) -> None:
        if activation not in ("none", "relu"):
            raise ValueError(f"{path}: activation={activation!r} must be none or relu")
        self.activation, self.sigmoid = activation, sigmoid
        self._layers = _read_layers(Path(path))
        self.width = self._layers[0][1].shape[1]

    def settings(self) -> dict[str, Any]:
        """What makes its scores what they are."""
        digest = xxhash.xxh3_128()
        for number, weight, bias in self._layers:
            digest.update(f"{number} {tuple(weight.shape)}\n".encode())
            digest.update(weight.numpy().tobytes() + bias.numpy().tobytes())
        return {"weights": digest.hexdigest(), "activation": self.activation, "sigmoid": self.sigmoid}

    @torch.no_grad()
    def __call__(self, embeddings: np.ndarray) -> np.ndarray:
        """(n,) float32 scores of (n, width) float32 embeddings of length one."""
        values = torch.from_numpy(embeddings)
        before = None
        for number, weight, bias in self._layers:
            if before is not None and number > before + 1 and self.activation == "relu":
                values = values.relu()
            values, before = F.linear(values, weight, bias), number
        return (values.sigmoid() if self.sigmoid else values)[:, 0].numpy()


def _read_layers(path: Path) -> list[tuple[int, Tensor, Tensor]]:
    """Number, weight (out, in) and bias (out,) of each linear layer, in order."""
    state = _read_state(path)
    found: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():
        match = _KEY.fullmatch(key)
        if match is None or not isinstance(value, Tensor):
            raise ValueError(f"{path} is no head of linear layers: it holds {key!r}")
        found.setdefault(int(match[1] or 0), {})[match[2]] = value.float().contiguous()
    layers: list[tuple[int, Tensor, Tensor]] = []
    outputs = None
    for number, layer in sorted(found.items()):
        weight, bias = layer.get("weight"), layer.get("bias")
        if weight is None or bias is None or weight.ndim != 2 or bias.shape != weight.shape[:1]:
            break
        if outputs not in (None, weight.shape[1]):
            break
        layers.append((number, weight, bias))
        outputs = weight.shape[0]
    if len(layers) < len(found) or outputs != 1:
        described = ", ".join(f"{key} {tuple(value.shape)}" for key, value in state.items())
        raise ValueError(f"{path} is no chain of linear layers that ends in one number: {described or 'no tensors'}")
    return layers


def _read_state(path: Path) -> dict[str, Any]:
    from pickle import UnpicklingError

    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} holds no weights that can be read: {first_line(error)}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds no state dict but a {type(state).__name__}")
    return state


class EmbeddingHead(GlobalFilter):
    """A head's scores from stored embeddings: one more head needs no model and no picture again.

    Embeddings are stored in half precision, so that its scores differ in the fourth digit from those that `Clip` gives
    with the same head.

    Args:
        column: of the scores, also the name of the score file.
        head: what gives them.
        embedding: column of the embeddings.
    """

    def __init__(self, column: str, head: Head, embedding: str = "clip_embedding") -> None:
        self.name, self.head, self.needs = column, head, (embedding,)
        self.columns = pa.schema({column: pa.float32()})

    def settings(self) -> dict[str, Any]:
        return {"embedding": self.needs[0], **self.head.settings()}

    def score_all(
        self, shards: Sequence[ShardColumns], tasks: int = 1, log: RunLog | None = None
    ) -> Iterator[pa.Table]:
        """See `GlobalFilter`. One process does it all: it takes little more than reading the embeddings."""
        for shard in shards:
            present, vectors = read_vectors(shard, self.needs[0])
            if len(vectors) and vectors.shape[1] != self.head.width:
                raise ValueError(
                    f"{self.name}: the head takes embeddings of {self.head.width} numbers, the column {self.needs[0]!r}"
                    f" has {vectors.shape[1]}"
                )
            scores = np.zeros(shard.rows, np.float32)
            if len(vectors):
                scores[present] = self.head(vectors)
            yield pa.table({self.name: pa.array(scores, mask=~present)})
