"""Weights in diffusers' layout: a folder with `config.json` and safetensors, whole or in shards with an index.

No pickle is read. A network meets this module through what `Pretrained` lists; everything else about its weights' names
stays beside its architecture.
"""

import inspect
import json
import re
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from models.autoencoder import AutoencoderKL
from models.mmdit import MMDiT

CLASSES: dict[str, type[nn.Module]] = {cls.diffusers_class: cls for cls in (MMDiT, AutoencoderKL)}
STEM = "diffusion_pytorch_model"
INDEX = f"{STEM}.safetensors.index.json"
# Written where a network did not come from a folder: the release whose layout this is.
DIFFUSERS_VERSION = "0.42.1"


@runtime_checkable
class Pretrained(Protocol):
    """A network with a counterpart in diffusers.

    `config` holds the counterpart's configuration: our constructor's arguments, what of it is fixed here, and any
    further keys that came with a folder. `own_config` are our arguments that it lacks, with the value that it acts by.
    """

    diffusers_class: ClassVar[str]
    own_config: ClassVar[dict[str, Any]]
    config: dict[str, Any]

    def to_diffusers(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """The tensor `name` of `state_dict` under the counterpart's names."""

    def from_diffusers(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """The tensor `name` of `state_dict`, made of what `read` gives for the counterpart's names."""


class ComponentFolder:
    """A component's folder, opened lazily: a tensor is read when it is asked for.

    Raises:
        ValueError: no `config.json`, no safetensors, or damaged ones.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder)
        if not (self.path / "config.json").exists():
            raise ValueError(f"{self.path} is no diffusers component: it has no config.json")
        self.config: dict[str, Any] = _json(self.path / "config.json")

    @cached_property
    def files(self) -> dict[str, Any]:
        """The open safetensors file of each tensor, by the tensor's name."""
        whole, index = self.path / f"{STEM}.safetensors", self.path / INDEX
        if index.exists():
            names = sorted(set(_json(index)["weight_map"].values()))
        elif whole.exists():
            names = [whole.name]
        else:
            raise ValueError(f"{self.path} holds neither {whole.name} nor {INDEX} (weights in pickle are never read)")
        missing = [name for name in names if not (self.path / name).exists()]
        if missing:
            raise ValueError(f"{self.path} lacks {_some(missing)}, which its index names")
        opened = [_open(self.path / name) for name in names]
        return {_modern_name(key): (file, key) for file in opened for key in file.keys()}  # noqa: SIM118

    def read(self, name: str) -> Tensor:
        """The tensor `name`, by diffusers' name, on the CPU."""
        file, key = self.files[name]
        return file.get_tensor(key)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor `name`, unread."""
        file, key = self.files[name]
        return tuple(file.get_slice(key).get_shape())

    def build(self) -> nn.Module:
        """The network that the configuration describes, unfilled, on torch's default device.

        Raises:
            ValueError: a class or a setting that is not implemented here.
        """
        name = self.config.get("_class_name")
        if name not in CLASSES:
            raise ValueError(f"{self.path}: _class_name is {name!r}; implemented are {sorted(CLASSES)}")
        parameters = inspect.signature(CLASSES[name]).parameters
        network = CLASSES[name](**{key: value for key, value in self.config.items() if key in parameters})
        assert isinstance(network, Pretrained)
        for key, fixed in network.config.items():
            if key in self.config and key not in parameters and self.config[key] != fixed:
                raise ValueError(f"{self.path}: {key} is {self.config[key]!r}, but {name} here has only {fixed!r}")
        network.config = {**self.config, **network.config}
        return network

    def check(self, network: nn.Module) -> None:
        """Compare the folder's tensors with the network's.

        Raises:
            ValueError: missing or unexpected tensors, or other shapes, by name.
        """
        assert isinstance(network, Pretrained), f"{type(network).__name__} has no counterpart in diffusers"
        expected = {
            key: tuple(meta.shape)
            for name, tensor in network.state_dict().items()
            for key, meta in network.to_diffusers(name, tensor.to("meta")).items()
        }
        missing = [key for key in expected if key not in self.files]
        unexpected = [key for key in self.files if key not in expected]
        shapes = [
            f"{key} {self.shape(key)} where the network has {shape}"
            for key, shape in expected.items()
            if key in self.files and self.shape(key) != shape
        ]
        faults = {"missing": missing, "unexpected": unexpected, "shapes": shapes}
        if any(faults.values()):
            described = "; ".join(f"{fault}: {_some(keys)}" for fault, keys in faults.items() if keys)
            raise ValueError(f"{self.path} does not fit {type(network).__name__}: {described}")

    @torch.no_grad()
    def fill(self, network: nn.Module) -> None:
        """Copy the folder's tensors into the network, one at a time, after `check`."""
        self.check(network)
        assert isinstance(network, Pretrained)
        for name, tensor in network.state_dict().items():
            tensor.copy_(network.from_diffusers(name, self.read))


def load(
    folder: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> MMDiT | AutoencoderKL:
    """The network of a component's folder, such as `stable-diffusion-3-medium-diffusers/transformer`.

    Raises:
        ValueError: see `ComponentFolder`.
    """
    component = ComponentFolder(folder)
    with torch.device("meta"):
        network = component.build()
    network.to(dtype).to_empty(device=device)
    component.fill(network)
    assert isinstance(network, MMDiT | AutoencoderKL)
    return network


def save(
    network: nn.Module,
    folder: str | Path,
    tensors: Mapping[str, Tensor] | None = None,
    shard_bytes: int = 10_000_000_000,
) -> None:
    """Write a component's folder that diffusers' `from_pretrained` reads, replacing the weights of a former one.

    Args:
        network: a network with a counterpart; it may be on the meta device if `tensors` are given.
        folder: is made where it does not exist.
        tensors: values by our names, in place of the network's own (an average, a checkpoint).
        shard_bytes: more than this goes into several files.
    """
    assert isinstance(network, Pretrained)
    state = {name: (tensors or {}).get(name, own).detach() for name, own in network.state_dict().items()}
    absent = [name for name, tensor in state.items() if tensor.is_meta]
    if absent:
        raise ValueError(f"cannot save {type(network).__name__} without values of {_some(absent)}")
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    for old in path.glob(f"{STEM}*.safetensors*"):
        old.unlink()

    sizes = {
        key: meta.nbytes
        for name, own in state.items()
        for key, meta in network.to_diffusers(name, own.to("meta")).items()
    }
    shards = _shards(sizes, shard_bytes)
    single = len(shards) == 1
    files = [
        f"{STEM}.safetensors" if single else f"{STEM}-{i:05d}-of-{len(shards):05d}.safetensors"
        for i in range(1, len(shards) + 1)
    ]

    pending: dict[str, Tensor] = {}
    remaining = list(zip(files, shards, strict=True))
    for name, tensor in state.items():
        pending.update(network.to_diffusers(name, tensor.cpu()))
        while remaining and pending.keys() >= set(remaining[0][1]):
            file, keys = remaining.pop(0)
            # safetensors refuses views of a shared storage, which fused weights split into: hence the copies.
            shard = {key: pending.pop(key).clone(memory_format=torch.contiguous_format) for key in keys}
            save_file(shard, path / file, metadata={"format": "pt"})
    if not single:
        weight_map = {key: file for file, keys in zip(files, shards, strict=True) for key in keys}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (path / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    silent = {key for key, value in network.own_config.items() if network.config[key] == value}
    config = {
        "_class_name": network.diffusers_class,
        "_diffusers_version": DIFFUSERS_VERSION,
        **{key: value for key, value in network.config.items() if key not in silent},
    }
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _shards(sizes: Mapping[str, int], shard_bytes: int) -> list[list[str]]:
    """Consecutive keys in groups of at most `shard_bytes` (or of a single larger one)."""
    shards: list[list[str]] = [[]]
    filled = 0
    for key, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += size
    return shards


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def _modern_name(name: str) -> str:
    """Today's name of a tensor: folders of 2022 call an autoencoder's attention layers otherwise."""
    today = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    return re.sub(r"(?<=\.attentions\.0\.)(query|key|value|proj_attn)(?=\.)", lambda match: today[match[0]], name)


def _some(names: list[str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
