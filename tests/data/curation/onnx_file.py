"""An ONNX file of one 1 x 1 convolution and a sigmoid, written by hand (the onnx package is no dependency)."""

from pathlib import Path

import numpy as np


def _field(number: int, value: int | bytes | str) -> bytes:
    """A field of a Protocol Buffers message."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def _tensor(name: str, values: np.ndarray) -> bytes:
    dims = b"".join(_field(1, side) for side in values.shape)
    return dims + _field(2, 1) + _field(8, name) + _field(9, values.astype("<f4").tobytes())


def _value(name: str, dims: list[int | str]) -> bytes:
    shape = b"".join(_field(1, _field(1, d) if isinstance(d, int) else _field(2, d)) for d in dims)
    return _field(1, name) + _field(2, _field(1, _field(1, 1) + _field(2, shape)))


def write_convolution(path: Path, weights: np.ndarray, bias: np.ndarray) -> Path:
    """sigmoid(weights @ pixel + bias) at every pixel.

    Args:
        weights: (out, in).
        bias: (out,).
    """
    outputs, inputs = weights.shape
    nodes = [
        _field(1, "x") + _field(1, "w") + _field(1, "b") + _field(2, "z") + _field(4, "Conv"),
        _field(1, "z") + _field(2, "y") + _field(4, "Sigmoid"),
    ]
    graph = b"".join(_field(1, node) for node in nodes) + _field(2, "graph")
    graph += _field(5, _tensor("w", weights.reshape(outputs, inputs, 1, 1))) + _field(5, _tensor("b", bias))
    graph += _field(11, _value("x", [1, inputs, "h", "w"])) + _field(12, _value("y", [1, outputs, "h", "w"]))
    path.write_bytes(_field(1, 8) + _field(7, graph) + _field(8, _field(1, "") + _field(2, 13)))
    return path
